//! Where the edge's certificates come from. Today a local CA; later ACME, behind the same [`EdgeCertificate`].

mod local_ca;

pub(crate) use local_ca::LocalCa;

use serde::{Deserialize, Serialize};
use systemprompt_contract::{CertHost, Hostname, Secret};
use systemprompt_edge::{CertPattern, Certificate};

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

    /// As the edge takes it.
    pub(crate) fn for_edge(&self) -> Certificate {
        Certificate { hosts: self.hosts.clone(), chain_pem: self.chain_pem.clone(), key_pem: self.key_pem.clone() }
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
