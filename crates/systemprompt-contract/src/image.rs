//! The one image a tenant may run: `{authority}/systemprompt-images:tenant-{uuid}`.

use crate::ids::TenantId;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// The shared repository name; behind it every tenant has storage of its own.
pub const IMAGE_REPOSITORY: &str = "systemprompt-images";

/// The tag `tenant-{uuid}`; prints and parses that and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantTag(pub TenantId);

impl fmt::Display for TenantTag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenant-{}", self.0)
    }
}

impl FromStr for TenantTag {
    type Err = crate::InvalidId;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.strip_prefix("tenant-").ok_or_else(|| crate::InvalidId(text.chars().take(80).collect()))?.parse().map(Self)
    }
}

/// A full image name that was checked against the tenant it is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantImage {
    /// `host[:port]` of the registry, as the client calls it.
    pub authority: String,
    /// Whose image it is.
    pub tenant: TenantId,
}

/// An image name other than the one this tenant must use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected the image {expected}, got {got:?}")]
pub struct ImageMismatch {
    /// The name that would have been accepted.
    pub expected: String,
    /// What came, cut to 300 characters.
    pub got: String,
}

impl TenantImage {
    /// The exact check of the deploy call: repository, tag and one of the `authorities`, nothing else.
    ///
    /// # Errors
    /// [`ImageMismatch`] naming the image that was expected.
    pub fn check(text: &str, tenant: TenantId, authorities: &[String]) -> Result<Self, ImageMismatch> {
        authorities
            .iter()
            .map(|authority| Self { authority: authority.clone(), tenant })
            .find(|image| image.to_string() == text)
            .ok_or_else(|| ImageMismatch {
                expected: Self { authority: authorities.first().cloned().unwrap_or_default(), tenant }.to_string(),
                got: text.chars().take(300).collect(),
            })
    }
}

impl fmt::Display for TenantImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{IMAGE_REPOSITORY}:{}", self.authority, TenantTag(self.tenant))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_image_passes() {
        let tenant = TenantId::new();
        let authorities = ["registry.systemprompt.localhost:8443".to_owned(), "localhost:8443".to_owned()];
        let good = format!("localhost:8443/systemprompt-images:tenant-{tenant}");
        assert!(TenantImage::check(&good, tenant, &authorities).is_ok());
        for bad in [
            good.to_uppercase(),
            good.replace("localhost:8443", "localhost"),
            good.replace("localhost:8443", "evil.example"),
            format!("{good}@sha256:{}", "0".repeat(64)),
            format!("localhost:8443/systemprompt-images:tenant-{}", TenantId::new()),
            format!("localhost:8443/systemprompt-images/x:tenant-{tenant}"),
        ] {
            assert!(TenantImage::check(&bad, tenant, &authorities).is_err(), "{bad}");
        }
    }
}
