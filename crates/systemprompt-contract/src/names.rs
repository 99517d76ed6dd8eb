//! Names and hosts. Parsed once at the door; nothing inside checks again.

use crate::ids::TenantId;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A name that does not have the form its type demands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what}: expected {expected}, got {got:?}")]
pub struct InvalidName {
    /// Which name was parsed.
    pub what: &'static str,
    /// The form that was expected.
    pub expected: &'static str,
    /// What came, cut to 80 characters.
    pub got: String,
}

impl InvalidName {
    fn new(what: &'static str, expected: &'static str, got: &str) -> Self {
        Self { what, expected, got: got.chars().take(80).collect() }
    }
}

macro_rules! text_type {
    ($name:ident) => {
        impl $name {
            /// The text itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

/// First twelve hex digits of a tenant's id; unique in the database.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TenantSlug(String);
text_type!(TenantSlug);

impl TenantId {
    /// `999bc654-9a64-…` -> `999bc6549a64`.
    pub fn slug(self) -> TenantSlug {
        TenantSlug(self.uuid().simple().to_string()[..12].to_owned())
    }
}

impl TenantSlug {
    /// `sp-999bc6549a64`: the tenant's app at every compute driver.
    pub fn app_name(&self) -> AppName {
        AppName(format!("sp-{}", self.0))
    }
    /// `999bc6549a64.{zone}`: where the tenant is reached.
    pub fn hostname(&self, zone: &Zone) -> Hostname {
        Hostname(format!("{}.{}", self.0, zone.0))
    }
    /// `sp_999bc6549a64`: the tenant's role and its database, which bear the same name.
    pub fn database(&self) -> DatabaseName {
        DatabaseName(format!("sp_{}", self.0))
    }
}

impl FromStr for TenantSlug {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        if is_slug(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("tenant slug", "12 lower-case hex digits", text))
        }
    }
}

fn is_slug(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// The name of a tenant's app at a compute driver: `sp-` and the slug.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppName(String);
text_type!(AppName);

impl AppName {
    /// The slug inside the name.
    pub fn slug(&self) -> TenantSlug {
        TenantSlug(self.0[3..].to_owned())
    }
}

impl FromStr for AppName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text.strip_prefix("sp-") {
            Some(slug) if is_slug(slug) => Ok(Self(text.to_owned())),
            _ => Err(InvalidName::new("app name", "sp- and 12 lower-case hex digits", text)),
        }
    }
}

/// A tenant's PostgreSQL role and database: `sp_` and the slug. Safe to quote into SQL as an identifier.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DatabaseName(String);
text_type!(DatabaseName);

impl FromStr for DatabaseName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text.strip_prefix("sp_") {
            Some(slug) if is_slug(slug) => Ok(Self(text.to_owned())),
            _ => Err(InvalidName::new("database name", "sp_ and 12 lower-case hex digits", text)),
        }
    }
}

/// A host name in its one spelling: lower-case A-labels, no dot at the end, no port, at most 253 bytes.
///
/// Nothing else reaches routing, certificates or placement. IP addresses are not host names.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Hostname(String);
text_type!(Hostname);

const HOSTNAME_FORM: &str = "a lower-case DNS name without port or trailing dot";

impl Hostname {
    /// Parses the value of a `Host` header or `:authority`: any ASCII case, an optional `:port`.
    ///
    /// # Errors
    /// When the rest is not a host name; userinfo, a trailing dot, an underscore or a bad port is refused.
    pub fn from_authority(authority: &str) -> Result<Self, InvalidName> {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit()) => {
                host
            }
            Some(_) => return Err(InvalidName::new("host", HOSTNAME_FORM, authority)),
            None => authority,
        };
        host.to_ascii_lowercase().parse()
    }

    /// The part before the first dot and the part after it.
    pub fn split_first_label(&self) -> Option<(&str, &str)> {
        self.0.split_once('.')
    }
}

impl FromStr for Hostname {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let labels_ok = text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'))
                && !label.starts_with('-')
                && !label.ends_with('-')
        });
        let numeric_tail = text.rsplit('.').next().is_some_and(|label| label.bytes().all(|b| b.is_ascii_digit()));
        if labels_ok && text.len() <= 253 && !numeric_tail {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("host", HOSTNAME_FORM, text))
        }
    }
}

/// The DNS zone of an installation, e.g. `systemprompt.localhost`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Zone(String);
text_type!(Zone);

impl Zone {
    /// A host of the platform itself.
    pub fn platform(&self, host: PlatformHost) -> Hostname {
        Hostname(format!("{}.{}", host.label(), self.0))
    }
    /// The zone's own name.
    pub fn apex(&self) -> Hostname {
        Hostname(self.0.clone())
    }
    /// Whether this zone exists on this machine only (RFC 6761 `localhost`).
    pub fn is_local(&self) -> bool {
        self.0 == "localhost" || self.0.ends_with(".localhost")
    }
    /// The slug, when `host` is `{slug}.{zone}`.
    pub fn tenant_slug(&self, host: &Hostname) -> Option<TenantSlug> {
        let (label, rest) = host.split_first_label()?;
        (rest == self.0).then(|| label.parse().ok()).flatten()
    }
}

impl Default for Zone {
    fn default() -> Self {
        Self("systemprompt.localhost".to_owned())
    }
}

impl FromStr for Zone {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        match text.parse::<Hostname>() {
            Ok(host) if text.contains('.') && text.len() <= 200 => Ok(Self(host.0)),
            _ => Err(InvalidName::new("zone", "a DNS name of two labels or more", text)),
        }
    }
}

/// Hosts of the platform; a tenant can never bear one of these labels, since a slug is 12 hex digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PlatformHost {
    /// Management API.
    Api,
    /// Login, checkout and dashboard pages.
    Cloud,
    /// Image registry.
    Registry,
    /// Tenant databases.
    Db,
}

impl PlatformHost {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Api, Self::Cloud, Self::Registry, Self::Db];
    /// The label below the zone.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Cloud => "cloud",
            Self::Registry => "registry",
            Self::Db => "db",
        }
    }
}

/// What a certificate at the edge is for. A platform name under the zone has no other form than the
/// zone's wildcard, so a certificate for a single tenant host of the zone cannot be expressed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CertHost {
    /// `*.{zone}` and the names that go with it on the same certificate.
    Wildcard(Zone),
    /// One name outside the zone: a custom domain.
    Exact(Hostname),
}

impl CertHost {
    /// The certificate that serves `host` in an installation of `zone`.
    pub fn covering(host: &Hostname, zone: &Zone) -> Self {
        let inside = host.as_str() == zone.as_str()
            || host.as_str().strip_suffix(zone.as_str()).is_some_and(|rest| rest.ends_with('.'));
        if inside { Self::Wildcard(zone.clone()) } else { Self::Exact(host.clone()) }
    }
}

/// A tenant's display name: 1 to 64 characters, no control or bidirectional-override characters, no
/// white space at the ends.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct TenantName(String);
text_type!(TenantName);

impl FromStr for TenantName {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let bad = |c: char| {
            c.is_control()
                || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
        };
        let count = text.chars().count();
        if (1..=64).contains(&count) && text.trim() == text && !text.chars().any(bad) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidName::new("tenant name", "1 to 64 printable characters without white space at the ends", text))
        }
    }
}

/// Where a tenant asked to live. One host accepts all eight and stores what was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "airport codes of the existing client")]
pub enum Region {
    #[default]
    Iad,
    Lhr,
    Fra,
    Ams,
    Sin,
    Nrt,
    Syd,
    Gru,
}

impl Region {
    /// All codes.
    pub const ALL: [Self; 8] = [Self::Iad, Self::Lhr, Self::Fra, Self::Ams, Self::Sin, Self::Nrt, Self::Syd, Self::Gru];
    /// The code, e.g. `iad`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Iad => "iad",
            Self::Lhr => "lhr",
            Self::Fra => "fra",
            Self::Ams => "ams",
            Self::Sin => "sin",
            Self::Nrt => "nrt",
            Self::Syd => "syd",
            Self::Gru => "gru",
        }
    }
}

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Region {
    type Err = InvalidName;
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::ALL
            .into_iter()
            .find(|region| region.as_str() == text)
            .ok_or_else(|| InvalidName::new("region", "one of iad, lhr, fra, ams, sin, nrt, syd, gru", text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn derivations_of_the_post_mortem_tenant() {
        let id: TenantId = "999bc654-9a64-49bc-98be-db976fc84e76".parse().expect("id");
        let zone: Zone = "systemprompt.io".parse().expect("zone");
        assert_eq!(id.slug().as_str(), "999bc6549a64");
        assert_eq!(id.slug().app_name().as_str(), "sp-999bc6549a64");
        assert_eq!(id.slug().hostname(&zone).as_str(), "999bc6549a64.systemprompt.io");
        assert_eq!(id.slug().database().as_str(), "sp_999bc6549a64");
        assert_eq!(id.slug().app_name().slug(), id.slug());
        assert_eq!(zone.tenant_slug(&id.slug().hostname(&zone)), Some(id.slug()));
    }

    #[test]
    fn thirteen_spellings_that_a_text_guard_lets_pass() {
        for bad in [
            "999BC6549A64.systemprompt.io",
            "a.systemprompt.io.",
            "a.systemprompt.io:443",
            "a\u{3002}systemprompt.io",
            "a\u{ad}.systemprompt.io",
            "a\0.systemprompt.io",
            "",
            ".",
            "a..b",
            "-a.b",
            "a_b.c",
            "user@a.b",
            "127.0.0.1",
        ] {
            assert!(bad.parse::<Hostname>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_authority_may_have_a_port_and_capitals() {
        assert_eq!(Hostname::from_authority("A.Example.com:8443").expect("ok").as_str(), "a.example.com");
        for bad in ["a.b:", "a.b:123456", "a.b:x", "u@a.b", "[::1]:80", "a.b.", "a b"] {
            assert!(Hostname::from_authority(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_tenant_host_of_the_zone_is_always_the_wildcard() {
        let zone = Zone::default();
        let tenant = TenantId::new().slug().hostname(&zone);
        assert_eq!(CertHost::covering(&tenant, &zone), CertHost::Wildcard(zone.clone()));
        let custom: Hostname = "shop.example.com".parse().expect("host");
        assert_eq!(CertHost::covering(&custom, &zone), CertHost::Exact(custom));
        let near: Hostname = "evilsystemprompt.localhost".parse().expect("host");
        assert!(matches!(CertHost::covering(&near, &zone), CertHost::Exact(_)));
    }

    proptest! {
        #[test]
        fn a_parsed_host_is_a_fixed_point(text in "\\PC{0,40}") {
            if let Ok(host) = Hostname::from_authority(&text) {
                prop_assert_eq!(Hostname::from_authority(host.as_str()).expect("fixed point"), host);
            }
        }

        #[test]
        fn slugs_never_collide_with_platform_hosts(_n in 0..64u8) {
            let slug = TenantId::new().slug();
            prop_assert!(PlatformHost::ALL.iter().all(|host| host.label() != slug.as_str()));
        }
    }
}
