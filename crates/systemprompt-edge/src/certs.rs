//! Certificates by name: what the edge shows for an SNI, and which hosts may be asked for on it.

use rustls::{
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fmt, str::FromStr, sync::Arc};
use systemprompt_contract::{Hostname, Secret};

/// A certificate as it is stored: what it is for, its chain and its key.
#[derive(Debug, Clone)]
pub struct Certificate {
    /// The names it serves. Names in the certificate itself that are missing here are not served.
    pub hosts: Vec<CertPattern>,
    /// PEM, the leaf first.
    pub chain_pem: String,
    /// PEM: PKCS#8, SEC1 or PKCS#1.
    pub key_pem: Secret,
}

/// Names a certificate serves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CertPattern {
    /// One name.
    Exact(Hostname),
    /// `*.{parent}`: exactly one label below it (RFC 9525, 6.3).
    Wildcard(Hostname),
}

impl CertPattern {
    /// Whether the pattern stands for the host.
    pub fn covers(&self, host: &Hostname) -> bool {
        match self {
            Self::Exact(name) => name == host,
            Self::Wildcard(parent) => host.split_first_label().is_some_and(|(_, rest)| rest == parent.as_str()),
        }
    }
}

impl fmt::Display for CertPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(name) => name.fmt(f),
            Self::Wildcard(parent) => write!(f, "*.{parent}"),
        }
    }
}

impl FromStr for CertPattern {
    type Err = systemprompt_contract::InvalidName;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("*.") {
            Some(parent) => parent.parse().map(Self::Wildcard),
            None => text.parse().map(Self::Exact),
        }
    }
}

impl Serialize for CertPattern {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CertPattern {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a list of certificates cannot be served. Names the certificate by its hosts, never its key.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    /// The list is empty.
    #[error("expected at least one certificate, the platform's; got none")]
    Empty,
    /// The chain holds no certificate or is not PEM.
    #[error("certificate for {hosts}: expected a PEM chain, the leaf first: {reason}")]
    Chain {
        /// What it is for.
        hosts: String,
        /// What the parser said.
        reason: String,
    },
    /// The key is not PEM or of no supported type.
    #[error("certificate for {hosts}: expected a PEM private key (ECDSA, RSA or Ed25519): {reason}")]
    Key {
        /// What it is for.
        hosts: String,
        /// What the parser said.
        reason: String,
    },
    /// The key belongs to another certificate.
    #[error("certificate for {hosts}: the private key is not the leaf's; renew the certificate with its key")]
    Mismatch {
        /// What it is for.
        hosts: String,
    },
}

/// All certificates of the edge, by name. Immutable; a renewal makes a new table.
#[derive(Debug)]
pub struct CertTable {
    exact: HashMap<Hostname, Arc<Served>>,
    /// By the parent of the wildcard.
    wildcard: HashMap<String, Arc<Served>>,
    platform: Arc<Served>,
}

/// A certificate ready to be shown.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) hosts: Vec<CertPattern>,
    pub(crate) key: Arc<CertifiedKey>,
}

impl Served {
    pub(crate) fn covers(&self, host: &Hostname) -> bool {
        self.hosts.iter().any(|pattern| pattern.covers(host))
    }
}

impl CertTable {
    /// Reads and checks all certificates. The first is the platform's: it is shown to clients that name
    /// no host (no SNI, or an address) and to those that name `localhost`, and is good for the platform
    /// only then. When two serve the same name the later wins.
    ///
    /// # Errors
    /// When the list is empty, or a chain or key cannot be used.
    pub fn new(certificates: Vec<Certificate>) -> Result<Self, CertError> {
        let mut exact = HashMap::new();
        let mut wildcard = HashMap::new();
        let mut platform = None;
        for certificate in certificates {
            let served = Arc::new(load(certificate)?);
            platform.get_or_insert_with(|| Arc::clone(&served));
            for pattern in &served.hosts {
                match pattern {
                    CertPattern::Exact(name) => drop(exact.insert(name.clone(), Arc::clone(&served))),
                    CertPattern::Wildcard(parent) => {
                        wildcard.insert(parent.as_str().to_owned(), Arc::clone(&served));
                    }
                }
            }
        }
        Ok(Self { exact, wildcard, platform: platform.ok_or(CertError::Empty)? })
    }

    /// The certificate for a host: its own before a wildcard's.
    pub(crate) fn find(&self, host: &Hostname) -> Option<&Arc<Served>> {
        self.exact.get(host).or_else(|| self.wildcard.get(host.split_first_label()?.1))
    }

    /// The certificate for clients that name no host.
    pub(crate) fn platform(&self) -> &Arc<Served> {
        &self.platform
    }
}

fn load(certificate: Certificate) -> Result<Served, CertError> {
    let hosts = || certificate.hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let chain = CertificateDer::pem_slice_iter(certificate.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| CertError::Chain { hosts: hosts(), reason: error.to_string() })?;
    if chain.is_empty() {
        return Err(CertError::Chain { hosts: hosts(), reason: "no CERTIFICATE section".to_owned() });
    }
    let key_error = |reason: String| CertError::Key { hosts: hosts(), reason };
    let key = PrivateKeyDer::from_pem_slice(certificate.key_pem.expose().as_bytes())
        .map_err(|error| key_error(error.to_string()))?;
    let signer = any_supported_type(&key).map_err(|error| key_error(error.to_string()))?;
    let key = CertifiedKey::new(chain, signer);
    match key.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => {}
        Err(rustls::Error::InconsistentKeys(_)) => return Err(CertError::Mismatch { hosts: hosts() }),
        Err(error) => return Err(CertError::Chain { hosts: hosts(), reason: error.to_string() }),
    }
    Ok(Served { key: Arc::new(key), hosts: certificate.hosts })
}
