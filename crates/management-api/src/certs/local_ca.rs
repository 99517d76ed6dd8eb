//! The CA of one installation, for zones that no public CA can certify.
//!
//! Whoever trusts it trusts it for little: a critical name constraint (RFC 5280, 4.2.1.10) limits it to the zone,
//! `localhost` and the loopback addresses, so that its key, stolen, certifies nothing else.
//!
//! | file | mode | holds |
//! |---|---|---|
//! | `ca-key.pem` | 0600 | the CA's key and certificate: together in one file, since half a pair is worth nothing |
//! | `ca.pem` | 0644 | the certificate, to be trusted; rewritten from the above |
//! | `edge.sealed` | 0600 | the edge's key and certificate, as [`CertificateFile`] |
//!
//! Each is written in one step. A crash between two of them leaves what the next start completes.

use super::{CertificateFile, CertificateFileError, EdgeCertificate, LOCALHOST, patterns};
use crate::seal::private_file::{self, PrivateFileError};
use chrono::{DateTime, TimeDelta, Utc};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, PKCS_ECDSA_P256_SHA256, SanType,
};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
    time::Duration,
};
use systemprompt_contract::{CertHost, Secret, Zone};
use x509_parser::{
    certificate::X509Certificate,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

/// A local CA that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CaError {
    #[error("the local CA's files")]
    File(#[from] PrivateFileError),
    #[error(
        "{path} is damaged ({what}): put the right file back, or remove it to make a new CA, which everybody must trust anew"
    )]
    Damaged { path: PathBuf, what: &'static str },
    #[error(
        "this data is for the zone {is}, not for {asked}: start with --zone {is}, or give another place for the data \
         with --data"
    )]
    OtherZone { is: String, asked: Zone },
    #[error("the edge's certificate")]
    Edge(#[from] CertificateFileError),
    #[error("a certificate could not be made")]
    Making(#[from] rcgen::Error),
}

/// The CA of one zone, kept in one directory.
pub(crate) struct LocalCa {
    directory: PathBuf,
    zone: Zone,
    authority: Pair,
    /// Names the authority's key on what it issued.
    key_id: Vec<u8>,
    edge: CertificateFile,
}

impl LocalCa {
    /// Reads the CA in `directory`, or makes one for `zone`; what it issues to the edge goes to `edge`. A CA that ends
    /// before a new certificate would is replaced, and the log says that the new one must be trusted.
    ///
    /// # Errors
    /// When its key can be read by others or the file is damaged: it is never replaced then, since people trust it.
    /// When it is for another zone: every route, link and image name is of that zone too.
    pub(crate) fn load_or_create(directory: &Path, zone: &Zone, edge: CertificateFile) -> Result<Self, CaError> {
        Self::at(directory, zone, edge, Utc::now())
    }

    fn at(directory: &Path, zone: &Zone, edge: CertificateFile, now: DateTime<Utc>) -> Result<Self, CaError> {
        private_file::create_directory(directory)?;
        let key_file = directory.join("ca-key.pem");
        let found = Pair::read(&key_file)?.map(|pair| pair.facts(&key_file).map(|facts| (pair, facts))).transpose()?;
        if let Some((_, facts)) = &found
            && !facts.has_names(permitted_names(zone))
        {
            let is = facts.names.iter().find(|name| *name != LOCALHOST).cloned().unwrap_or_default();
            return Err(CaError::OtherZone { is, asked: zone.clone() });
        }
        let authority = match found {
            Some((pair, facts)) if facts.ends - now > TimeDelta::days(LEAF_DAYS) => pair,
            found => {
                let pair = make_authority(zone, now)?;
                private_file::write(&key_file, pair.file_content().expose().as_bytes())?;
                if found.is_some() {
                    tracing::warn!(%zone, "the local CA would have ended soon; trust the new ca.pem");
                }
                pair
            }
        };
        let key_id = authority.facts(&key_file)?.key_id;
        let ca = Self { directory: directory.to_owned(), zone: zone.clone(), authority, key_id, edge };
        private_file::write_public(&ca.ca_file(), ca.authority.certificates_pem.as_bytes())?;
        Ok(ca)
    }

    /// The certificate to trust.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.directory.join("ca.pem")
    }

    /// What the edge serves: one certificate for the zone, every host right below it, `localhost` and loopback. The
    /// one on file is kept until a third of its 90 days is left.
    ///
    /// # Errors
    /// When the file cannot be read or written.
    pub(crate) fn certificates(&self) -> Result<Vec<EdgeCertificate>, CaError> {
        self.certificates_at(Utc::now())
    }

    /// Looks every so often whether the certificate has to be renewed, and renews it.
    pub(crate) async fn keep_renewed(&self, every: Duration, now: impl Fn() -> DateTime<Utc>) -> Infallible {
        let mut looks = tokio::time::interval(every);
        loop {
            looks.tick().await;
            if let Err(error) = self.certificates_at(now()) {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the edge's certificate could not be renewed; trying again later"
                );
            }
        }
    }

    fn certificates_at(&self, now: DateTime<Utc>) -> Result<Vec<EdgeCertificate>, CaError> {
        match self.edge.read() {
            Ok(Some(kept)) if self.is_good(&kept, now) => return Ok(kept),
            Err(CertificateFileError::File(error)) => return Err(error.into()),
            // Nobody trusts this certificate by itself, so a damaged or outdated file is simply made anew.
            _ => {}
        }
        let leaf = self.issue(now)?;
        // The CA's own certificate stays at home: who trusts it has it.
        let host = CertHost::Wildcard(self.zone.clone());
        let made = vec![EdgeCertificate::new(&host, leaf.certificates_pem, leaf.key_pem)];
        self.edge.write(&made)?;
        Ok(made)
    }

    fn is_good(&self, kept: &[EdgeCertificate], now: DateTime<Utc>) -> bool {
        let [kept] = kept else { return false };
        let pair = Pair { key_pem: kept.key_pem.clone(), certificates_pem: kept.chain_pem.clone() };
        kept.hosts == patterns(&CertHost::Wildcard(self.zone.clone()))
            && pair
                .facts(self.edge.path())
                .is_ok_and(|facts| facts.issuer_key_id == self.key_id && is_good_leaf(&facts, &self.zone, now))
    }

    fn issue(&self, now: DateTime<Utc>) -> Result<Pair, CaError> {
        let authority_key = KeyPair::from_pem(self.authority.key_pem.expose())?;
        let issuer = Issuer::from_ca_cert_pem(&self.authority.certificates_pem, authority_key)?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(self.zone.as_str());
        params.subject_alt_names = served_names(&self.zone)
            .into_iter()
            .map(|name| Ok(SanType::DnsName(name.try_into()?)))
            .chain(LOOPBACK.map(|address| Ok(SanType::IpAddress(address))))
            .collect::<Result<_, rcgen::Error>>()?;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        set_validity(&mut params, now, LEAF_DAYS);
        let certificate = params.signed_by(&key, &issuer)?;
        Ok(Pair { key_pem: Secret::new(key.serialize_pem()), certificates_pem: certificate.pem() })
    }
}

fn make_authority(zone: &Zone, now: DateTime<Utc>) -> Result<Pair, CaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(&format!("SystemPrompt Cloud local CA for {zone}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: permitted_names(zone)
            .into_iter()
            .map(GeneralSubtree::DnsName)
            .chain(LOOPBACK.map(|address| GeneralSubtree::IpAddress(whole_address(address))))
            .collect(),
        excluded_subtrees: Vec::new(),
    });
    set_validity(&mut params, now, AUTHORITY_DAYS);
    let certificate = params.self_signed(&key)?;
    Ok(Pair { key_pem: Secret::new(key.serialize_pem()), certificates_pem: certificate.pem() })
}

/// Names on the edge's certificate.
fn served_names(zone: &Zone) -> [String; 3] {
    [format!("*.{zone}"), zone.to_string(), LOCALHOST.to_owned()]
}

/// Names the CA is good for, each with everything below it.
fn permitted_names(zone: &Zone) -> [String; 2] {
    [zone.to_string(), LOCALHOST.to_owned()]
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

fn whole_address(address: IpAddr) -> CidrSubnet {
    match address {
        IpAddr::V4(address) => CidrSubnet::V4(address.octets(), [0xff; 4]),
        IpAddr::V6(address) => CidrSubnet::V6(address.octets(), [0xff; 16]),
    }
}

/// From an hour ago, for clocks that differ, to `days` from now.
fn set_validity(params: &mut CertificateParams, now: DateTime<Utc>, days: i64) {
    let at = |when: DateTime<Utc>| {
        let seconds = u64::try_from(when.timestamp()).unwrap_or(0);
        rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(seconds)
    };
    params.not_before = at(now - TimeDelta::hours(1));
    params.not_after = at(now + TimeDelta::days(days));
}

/// A key and its certificate, leaf first.
struct Pair {
    key_pem: Secret,
    certificates_pem: String,
}

impl Pair {
    /// What [`Pair::file_content`] wrote.
    fn read(path: &Path) -> Result<Option<Self>, CaError> {
        let damaged = |what| CaError::Damaged { path: path.to_owned(), what };
        let Some(content) = private_file::read(path)? else { return Ok(None) };
        let text = std::str::from_utf8(&content).map_err(|_| damaged("not text"))?;
        let begin = text.find(BEGIN_CERTIFICATE).ok_or_else(|| damaged("no certificate in it"))?;
        let (key, certificates) = text.split_at(begin);
        KeyPair::from_pem(key).map_err(|_| damaged("no private key in it"))?;
        Ok(Some(Self { key_pem: Secret::new(key), certificates_pem: certificates.to_owned() }))
    }

    fn file_content(&self) -> Secret {
        Secret::new([self.key_pem.expose(), &self.certificates_pem].concat())
    }

    /// What the first certificate says.
    fn facts(&self, path: &Path) -> Result<Facts, CaError> {
        let damaged = |what| CaError::Damaged { path: path.to_owned(), what };
        let der = CertificateDer::from_pem_slice(self.certificates_pem.as_bytes())
            .map_err(|_| damaged("its certificate is not PEM"))?;
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| damaged("its certificate is not X.509"))?;
        let key = KeyPair::from_pem(self.key_pem.expose()).map_err(|_| damaged("no private key in it"))?;
        if certificate.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(damaged("its key is not its certificate's"));
        }
        Facts::of(&certificate).ok_or_else(|| damaged("its certificate's extensions cannot be read"))
    }
}

/// What decides whether a certificate on file is still good.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Facts {
    ends: DateTime<Utc>,
    /// Subject alternative names, or the permitted names of a CA; sorted.
    names: Vec<String>,
    /// Of its own key; certificates of a CA only.
    key_id: Vec<u8>,
    /// Of the key that issued it; no CA's certificate has it.
    issuer_key_id: Vec<u8>,
}

impl Facts {
    fn of(certificate: &X509Certificate<'_>) -> Option<Self> {
        let ends = DateTime::from_timestamp(certificate.validity().not_after.timestamp(), 0)?;
        let served = certificate.subject_alternative_name().ok()?;
        let permitted = certificate.name_constraints().ok()?;
        let served = served.iter().flat_map(|extension| &extension.value.general_names);
        let permitted = permitted
            .iter()
            .filter_map(|extension| extension.value.permitted_subtrees.as_ref())
            .flatten()
            .map(|subtree| &subtree.base);
        let mut names: Vec<_> = served.chain(permitted).filter_map(dns_name).collect();
        names.sort_unstable();
        let (mut key_id, mut issuer_key_id) = (Vec::new(), Vec::new());
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => id.0.clone_into(&mut key_id),
                ParsedExtension::AuthorityKeyIdentifier(issuer) => {
                    issuer.key_identifier.as_ref()?.0.clone_into(&mut issuer_key_id);
                }
                _ => {}
            }
        }
        Some(Self { ends, names, key_id, issuer_key_id })
    }

    fn has_names(&self, expected: impl IntoIterator<Item = String>) -> bool {
        let mut expected: Vec<_> = expected.into_iter().collect();
        expected.sort_unstable();
        self.names == expected
    }
}

fn dns_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    }
}

fn is_good_leaf(facts: &Facts, zone: &Zone, now: DateTime<Utc>) -> bool {
    facts.has_names(served_names(zone)) && facts.ends - now > TimeDelta::days(LEAF_DAYS) / 3
}

const LOOPBACK: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
const LEAF_DAYS: i64 = 90;
const AUTHORITY_DAYS: i64 = 3650;
const BEGIN_CERTIFICATE: &str = "-----BEGIN CERTIFICATE-----";

#[cfg(test)]
#[path = "local_ca_tests.rs"]
mod tests;
