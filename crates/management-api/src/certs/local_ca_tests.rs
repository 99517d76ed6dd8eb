use super::*;
use crate::{certs, seal::Sealer};
use rustls::{
    RootCertStore,
    client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
    pki_types::{ServerName, UnixTime},
};
use std::{fs, os::unix::fs::PermissionsExt as _, process::Command, sync::Arc};

struct Rig {
    directory: tempfile::TempDir,
    zone: Zone,
    seal: Arc<Sealer>,
}

impl Rig {
    fn new() -> Self {
        let zone = "cloud.example.org".parse().unwrap();
        Self { directory: tempfile::tempdir().unwrap(), zone, seal: Arc::new(Sealer::ephemeral()) }
    }
    fn path(&self) -> PathBuf {
        self.directory.path().join("ca")
    }
    fn ca(&self) -> LocalCa {
        self.load(&self.zone).unwrap()
    }
    fn load(&self, zone: &Zone) -> Result<LocalCa, CaError> {
        LocalCa::load_or_create(&self.path(), zone, self.file())
    }
    fn file(&self) -> CertificateFile {
        CertificateFile::new(self.path().join("edge.sealed"), self.seal.clone())
    }
    fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.path().join(file)).unwrap()
    }
    fn content(&self, file: &str) -> String {
        fs::read_to_string(self.path().join(file)).unwrap()
    }
    fn mode(&self, file: &str) -> u32 {
        fs::metadata(self.path().join(file)).unwrap().permissions().mode() & 0o777
    }

    /// What `openssl verify` says of `leaf_pem` for a purpose such as `-verify_hostname x`.
    fn openssl_verify(&self, chain_pem: &str, arguments: &[&str]) -> Result<(), String> {
        let file = self.directory.path().join("leaf.pem");
        fs::write(&file, chain_pem).unwrap();
        let output = Command::new("openssl")
            .args(["verify", "-x509_strict", "-purpose", "sslserver", "-no-CApath", "-no-CAstore", "-CAfile"])
            .arg(self.path().join("ca.pem"))
            .args(arguments)
            .arg("-untrusted")
            .arg(&file)
            .arg(&file)
            .output()
            .expect("openssl is installed");
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        if output.status.success() { Ok(()) } else { Err(text) }
    }
}

fn chain_of(ca: &LocalCa) -> String {
    ca.certificates().unwrap()[0].chain_pem.clone()
}

/// A leaf that the CA's key was abused for.
fn forged(ca: &LocalCa, names: &[&str]) -> String {
    let issuer_key = KeyPair::from_pem(ca.authority.key_pem.expose()).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&ca.authority.certificates_pem, issuer_key).unwrap();
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = common_name("forged");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, Utc::now(), 90);
    params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().pem()
}

fn rustls_verify(ca: &LocalCa, chain_pem: &str, name: &str) -> Result<(), rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.authority.certificates_pem.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let leaf = CertificateDer::from_pem_slice(chain_pem.as_bytes()).unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    verifier.verify_server_cert(&leaf, &[], &name, &[], UnixTime::now()).map(drop)
}

#[test]
fn one_certificate_serves_the_zone_and_loopback() {
    let rig = Rig::new();
    let ca = rig.ca();
    let chain = chain_of(&ca);
    for host in ["cloud.example.org", "api.cloud.example.org", "999bc6549a64.cloud.example.org", "localhost"] {
        rig.openssl_verify(&chain, &["-verify_hostname", host]).unwrap();
        rustls_verify(&ca, &chain, host).unwrap();
    }
    for address in ["127.0.0.1", "::1"] {
        rig.openssl_verify(&chain, &["-verify_ip", address]).unwrap();
        rustls_verify(&ca, &chain, address).unwrap();
    }
    for host in ["a.b.cloud.example.org", "example.org", "other.example.org", "a.localhost"] {
        rig.openssl_verify(&chain, &["-verify_hostname", host]).unwrap_err();
        rustls_verify(&ca, &chain, host).unwrap_err();
    }
}

#[test]
fn a_stolen_key_certifies_nothing_outside_the_constraint() {
    let rig = Rig::new();
    let ca = rig.ca();
    for (name, kind) in [
        ("bank.example", "-verify_hostname"),
        ("example.org", "-verify_hostname"),
        ("evilcloud.example.org", "-verify_hostname"),
        ("10.0.0.1", "-verify_ip"),
        ("127.0.0.2", "-verify_ip"),
        ("::2", "-verify_ip"),
    ] {
        let chain = forged(&ca, &[name]);
        let said = rig.openssl_verify(&chain, &[kind, name]).unwrap_err();
        assert!(said.contains("permitted subtree violation"), "{name}: {said}");
        rustls_verify(&ca, &chain, name).unwrap_err();
        // Hidden behind a permitted name it is refused as well.
        let chain = forged(&ca, &["cloud.example.org", name]);
        rig.openssl_verify(&chain, &["-verify_hostname", "cloud.example.org"]).unwrap_err();
    }
    let inside = forged(&ca, &["deep.below.cloud.example.org"]);
    rig.openssl_verify(&inside, &["-verify_hostname", "deep.below.cloud.example.org"])
        .expect("the forgery differs from a good one in its name only");
}

#[test]
fn the_constraint_is_critical_and_the_ca_makes_no_other_ca() {
    let rig = Rig::new();
    drop(rig.ca());
    let output =
        Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(rig.path().join("ca.pem")).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    assert!(text.contains("X509v3 Name Constraints: critical"), "{text}");
    assert!(text.contains("CA:TRUE, pathlen:0"), "{text}");
    for permitted in ["DNS:cloud.example.org", "DNS:localhost", "IP:127.0.0.1/255.255.255.255"] {
        assert!(text.contains(permitted), "{permitted} in {text}");
    }
}

#[test]
fn what_is_on_file_is_kept_and_private() {
    let rig = Rig::new();
    let first = chain_of(&rig.ca());
    assert_eq!((rig.mode("ca-key.pem"), rig.mode("edge.sealed"), rig.mode("ca.pem")), (0o600, 0o600, 0o644));
    assert!(!rig.content("ca.pem").contains("PRIVATE KEY"));
    assert!(!rig.bytes("edge.sealed").windows(11).any(|bytes| bytes == b"PRIVATE KEY"), "the edge's key is sealed");
    let files = ["ca-key.pem", "ca.pem", "edge.sealed"].map(|file| rig.bytes(file));
    assert_eq!(chain_of(&rig.ca()), first);
    assert_eq!(["ca-key.pem", "ca.pem", "edge.sealed"].map(|file| rig.bytes(file)), files);
    assert_eq!(fs::read_dir(rig.path()).unwrap().count(), 3, "no temporary file is left");
}

#[test]
fn a_crash_between_any_two_files_is_completed_under_the_same_ca() {
    let rig = Rig::new();
    drop(chain_of(&rig.ca()));
    let authority = rig.content("ca-key.pem");
    for lost in [&["edge.sealed"][..], &["ca.pem", "edge.sealed"], &["ca.pem"]] {
        for file in lost {
            fs::remove_file(rig.path().join(file)).unwrap();
        }
        fs::write(rig.path().join(".tmpAbCdEf"), "half a fi").unwrap();
        let ca = rig.ca();
        rig.openssl_verify(&chain_of(&ca), &["-verify_hostname", "api.cloud.example.org"]).unwrap();
        assert_eq!(rig.content("ca-key.pem"), authority, "after losing {lost:?}");
        assert!(authority.ends_with(&rig.content("ca.pem")));
    }
}

#[test]
fn a_damaged_edge_file_is_made_anew_and_a_damaged_ca_is_not() {
    let rig = Rig::new();
    drop(chain_of(&rig.ca()));
    for content in [vec![], rig.seal.seal("edge_certificates", b"[]"), rig.seal.seal("elsewhere", b"[]"), vec![0]] {
        private_file::write(rig.file().path(), &content).unwrap();
        let ca = rig.ca();
        rig.openssl_verify(&chain_of(&ca), &["-verify_hostname", "localhost"]).unwrap();
    }
    let good = rig.content("ca-key.pem");
    let other_key = KeyPair::generate().unwrap().serialize_pem();
    let certificate = &good[good.find(BEGIN_CERTIFICATE).unwrap()..];
    for content in ["", "nonsense", &good[..good.len() / 2], certificate, &format!("{other_key}{certificate}")] {
        private_file::write(&rig.path().join("ca-key.pem"), content.as_bytes()).unwrap();
        let error = rig.load(&rig.zone).err().expect("refused");
        assert!(matches!(error, CaError::Damaged { .. }), "{error}");
        assert_eq!(rig.content("ca-key.pem"), content);
    }
    private_file::write(&rig.path().join("ca-key.pem"), good.as_bytes()).unwrap();
    fs::set_permissions(rig.path().join("ca-key.pem"), fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(rig.load(&rig.zone), Err(CaError::File(PrivateFileError::Exposed { mode: 0o640, .. }))));
}

#[test]
fn the_edges_certificate_is_renewed_when_a_third_of_its_time_is_left() {
    let rig = Rig::new();
    let ca = rig.ca();
    let first = ca.certificates().unwrap();
    let after = |days| ca.certificates_at(Utc::now() + TimeDelta::days(days)).unwrap();
    assert_eq!(after(59), first);
    let renewed = after(61);
    assert_ne!(renewed, first);
    assert_eq!(after(61 + 59), renewed, "and kept on file");
}

#[tokio::test]
async fn an_edge_serves_a_renewed_certificate_without_a_restart() {
    let rig = Rig::new();
    let ca = rig.ca();
    let first = ca.certificates().unwrap();
    let served = tokio::sync::watch::Sender::new(Arc::new(certs::table(&first).unwrap()));
    let mut seen = served.subscribe();
    let often = Duration::from_millis(5);
    let now = || Utc::now() + TimeDelta::days(61);
    let file = rig.file();
    let renewal = async { tokio::time::timeout(Duration::from_secs(10), seen.changed()).await.unwrap().unwrap() };
    tokio::select! {
        () = renewal => {}
        never = ca.keep_renewed(often, now) => match never {},
        never = file.follow(first.clone(), &served, often) => match never {},
    }
    assert_ne!(rig.file().read().unwrap().unwrap(), first);
}

#[test]
fn an_ending_ca_is_replaced_and_one_of_another_zone_stays() {
    let rig = Rig::new();
    drop(chain_of(&rig.ca()));
    let first = rig.content("ca.pem");
    let later = Utc::now() + TimeDelta::days(AUTHORITY_DAYS - LEAF_DAYS + 1);
    drop(LocalCa::at(&rig.path(), &rig.zone, rig.file(), later).unwrap());
    let second = rig.content("ca.pem");
    assert_ne!(first, second);

    let other: Zone = "other.example.org".parse().unwrap();
    let error = rig.load(&other).err().expect("refused").to_string();
    assert!(error.contains("--zone cloud.example.org") && error.contains("--data"), "{error}");
    assert_eq!(rig.content("ca.pem"), second);
}

#[test]
fn the_edge_takes_it() {
    let rig = Rig::new();
    let certificates = rig.ca().certificates().unwrap();
    certs::table(&certificates).unwrap();
    let stored = serde_json::to_string(&certificates).unwrap();
    assert_eq!(serde_json::from_str::<Vec<EdgeCertificate>>(&stored).unwrap(), certificates);
    assert!(!format!("{certificates:?}").contains("PRIVATE KEY"));
}
