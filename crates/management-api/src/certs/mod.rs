//! Where the edge's certificates come from. Today a local CA; later ACME, behind the same [`EdgeCertificate`].
//!
//! `serve` alone issues, renews and writes them; whichever edge runs, in `serve` or beside it, follows the file.

mod local_ca;

pub(crate) use local_ca::LocalCa;

use crate::seal::{
    SealError, Sealer,
    private_file::{self, PrivateFileError},
};
use serde::{Deserialize, Serialize};
use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_contract::{CertHost, Hostname, Secret};
use systemprompt_edge::{CertError, CertPattern, CertTable, Certificate};
use tokio::sync::watch;

/// A certificate with its key, as it is kept and handed to the edge.
///
/// It can only be made for a [`CertHost`]: for the zone's wildcard or for a custom domain, never for one tenant's
/// host under the zone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct EdgeCertificate {
    hosts: Vec<CertPattern>,
    chain_pem: String,
    key_pem: Secret,
}

impl EdgeCertificate {
    fn new(host: &CertHost, chain_pem: String, key_pem: Secret) -> Self {
        Self { hosts: patterns(host), chain_pem, key_pem }
    }

    fn for_edge(&self) -> Certificate {
        Certificate { hosts: self.hosts.clone(), chain_pem: self.chain_pem.clone(), key_pem: self.key_pem.clone() }
    }
}

/// Certificates as the edge takes them.
///
/// # Errors
/// When there is none, and when chain and key of one do not fit.
pub(crate) fn table(certificates: &[EdgeCertificate]) -> Result<CertTable, CertError> {
    CertTable::new(certificates.iter().map(EdgeCertificate::for_edge).collect())
}

/// Certificates that cannot be read from their file, or not written to it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateFileError {
    #[error(transparent)]
    File(#[from] PrivateFileError),
    #[error("{path} does not open; was keys/seal.key replaced? `management-api serve` makes it anew")]
    Sealed {
        path: PathBuf,
        #[source]
        source: SealError,
    },
    #[error("{path} is damaged; `management-api serve` makes it anew")]
    Damaged {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// The edge's certificates on disk: sealed, since the keys of the whole zone are in it, and mode 0600.
#[derive(Debug, Clone)]
pub(crate) struct CertificateFile {
    path: PathBuf,
    seal: Arc<Sealer>,
}

impl CertificateFile {
    pub(crate) fn new(path: PathBuf, seal: Arc<Sealer>) -> Self {
        Self { path, seal }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What is in it; none when it was never written.
    ///
    /// # Errors
    /// When others can read it, it was sealed by another key, or it is damaged.
    pub(crate) fn read(&self) -> Result<Option<Vec<EdgeCertificate>>, CertificateFileError> {
        let path = || self.path.clone();
        let Some(sealed) = private_file::read(&self.path)? else { return Ok(None) };
        let plain = self.seal.open(SEAL_CONTEXT, &sealed);
        let plain = plain.map_err(|source| CertificateFileError::Sealed { path: path(), source })?;
        let parsed = serde_json::from_slice(&plain);
        parsed.map(Some).map_err(|source| CertificateFileError::Damaged { path: path(), source })
    }

    fn write(&self, certificates: &[EdgeCertificate]) -> Result<(), PrivateFileError> {
        let plain = Secret::new(serde_json::to_string(certificates).expect("certificates are plain data"));
        private_file::write(&self.path, &self.seal.seal(SEAL_CONTEXT, plain.expose().as_bytes()))
    }

    /// Hands what is in the file to `served` whenever it is not `current` any more, looking every so often. What
    /// cannot be read is said, and the edge keeps what it has.
    pub(crate) async fn follow(
        &self,
        mut current: Vec<EdgeCertificate>,
        served: &watch::Sender<Arc<CertTable>>,
        every: Duration,
    ) -> Infallible {
        let mut looks = tokio::time::interval(every);
        loop {
            looks.tick().await;
            let found = match self.read() {
                Ok(Some(found)) if found != current => found,
                Ok(_) => continue,
                Err(error) => {
                    tracing::error!(error = &error as &dyn std::error::Error, "the edge's certificates cannot be read");
                    continue;
                }
            };
            match table(&found) {
                Ok(table) => {
                    served.send_replace(Arc::new(table));
                    current = found;
                    tracing::info!("serving renewed certificates");
                }
                Err(error) => tracing::error!(%error, "the edge's renewed certificates cannot be served"),
            }
        }
    }
}

/// The names to serve with the certificate of `host`. Addresses need none: a client that dials one names no host, and
/// gets the platform's certificate.
fn patterns(host: &CertHost) -> Vec<CertPattern> {
    match host {
        CertHost::Wildcard(zone) => {
            let localhost: Hostname = LOCALHOST.parse().expect("localhost is a host name");
            vec![CertPattern::Wildcard(zone.apex()), CertPattern::Exact(zone.apex()), CertPattern::Exact(localhost)]
        }
        CertHost::Exact(name) => vec![CertPattern::Exact(name.clone())],
    }
}

const LOCALHOST: &str = "localhost";
const SEAL_CONTEXT: &str = "edge_certificates";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_host_can_only_be_served_by_the_wildcard() {
        let zone = systemprompt_contract::Zone::default();
        let tenant = systemprompt_contract::TenantId::new().slug().hostname(&zone);
        let served = patterns(&CertHost::covering(&tenant, &zone));
        assert!(served.contains(&CertPattern::Wildcard(zone.apex())));
        assert!(!served.contains(&CertPattern::Exact(tenant)));
    }
}
