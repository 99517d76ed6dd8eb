//! The programs people push and pull with, over TLS.

use crate::support::{Image, Server, Tenant};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Output,
};
use systemprompt_contract::{IMAGE_REPOSITORY, TenantId};
use systemprompt_oci::Digest;
use tokio::process::Command;

async fn run(command: &mut Command) -> Output {
    let output = command.kill_on_drop(true).output().await;
    let output =
        output.unwrap_or_else(|error| panic!("{command:?}: {error}; `cargo xtask test` installs what is missing"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// An OCI image layout with one image in it, as skopeo's `oci:` transport reads it.
fn write_layout(dir: &Path, image: &Image) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("folders");
    for blob in [&image.layer, &image.config, &image.manifest] {
        fs::write(blobs.join(Digest::of(blob).hex()), blob).expect("write");
    }
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("write");
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": systemprompt_oci::media_type::OCI_MANIFEST,
        "digest": image.digest(),
        "size": image.manifest.len(),
    }]});
    fs::write(dir.join("index.json"), index.to_string()).expect("write");
}

fn reference(address: &str, tenant: &Tenant<'_>) -> String {
    format!("{address}/{IMAGE_REPOSITORY}:{}", tenant.tag())
}

/// A folder with the registry's certificate, as `--cert-dir` wants it.
fn cert_dir(dir: &Path, pem: &str) -> PathBuf {
    let certs = dir.join("certs");
    fs::create_dir_all(&certs).expect("folder");
    fs::write(certs.join("ca.crt"), pem).expect("write");
    certs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn skopeo_pushes_and_pulls_the_same_bytes() {
    let dir = tempfile::tempdir().expect("dir");
    let server = Server::start().await;
    let tenant = server.tenant();
    let (address, pem) = server.listen_tls().await;
    let certs = cert_dir(dir.path(), &pem);
    let image = Image::new("app/program", &crate::support::noise(2 << 20, 12));
    write_layout(&dir.path().join("in"), &image);
    let remote = format!("docker://{}", reference(&address, &tenant));
    let local = |name: &str| format!("oci:{}", dir.path().join(name).display());
    let skopeo = |source: &str, target: &str, flags: &[String]| {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--preserve-digests"]).args(flags).args([source, target]);
        command
    };
    let basic =
        ["--dest-cert-dir".into(), certs.display().to_string(), "--dest-creds".into(), format!("x:{}", tenant.token)];
    run(&mut skopeo(&local("in"), &remote, &basic)).await;
    assert_eq!(server.registry.resolve(tenant.id).await.expect("disk"), Some(image.digest()));

    // With Basic as the only challenge skopeo uses credentials alone, never `--src-registry-token`.
    let basic_source = basic.clone().map(|flag: String| flag.replace("--dest", "--src"));
    run(&mut skopeo(&remote, &local("out"), &basic_source)).await;
    for blob in [&image.layer, &image.config, &image.manifest] {
        let pulled = fs::read(dir.path().join("out/blobs/sha256").join(Digest::of(blob).hex())).expect("pulled");
        assert_eq!(&pulled, blob);
    }
    run(&mut skopeo(&local("in"), &remote, &basic)).await; // everything is there: HEADs only

    let mut as_docker = Command::new("skopeo");
    as_docker.args(["--insecure-policy", "copy", "--format", "v2s2"]).args(&basic).args([local("in"), remote.clone()]);
    run(&mut as_docker).await;
    let digest = server.registry.resolve(tenant.id).await.expect("disk").expect("pushed");
    let stored = server.registry.image(tenant.id, &digest).await.expect("runs here");
    assert_eq!(stored.manifest.media_type, systemprompt_oci::media_type::DOCKER_MANIFEST);

    let stranger = server.tenant();
    let creds =
        ["--dest-cert-dir".into(), certs.display().to_string(), "--dest-creds".into(), format!("x:{}", stranger.token)];
    let refused = skopeo(&local("in"), &remote, &creds).output().await.expect("starts");
    assert!(!refused.status.success(), "another tenant's tag");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn podman_pushes_and_pulls_the_same_image() {
    // Podman takes the path of a layout for an image name, which must be in lower case, and wants it short.
    let name = format!("podman-{}", TenantId::new().slug());
    let dir = tempfile::Builder::new().prefix(&name).rand_bytes(0).tempdir().expect("dir");
    let server = Server::start().await;
    let tenant = server.tenant();
    let (address, pem) = server.listen_tls().await;
    let certs = cert_dir(dir.path(), &pem);
    let image = Image::new("app/program", &crate::support::noise(1 << 20, 13));
    write_layout(&dir.path().join("in"), &image);
    let remote = reference(&address, &tenant);
    let podman = |store: &str, arguments: &[&str]| {
        let mut command = Command::new("podman");
        let below = |name: &str| dir.path().join(format!("{store}-{name}"));
        command.arg("--root").arg(below("root")).arg("--runroot").arg(below("run"));
        command.args(["--storage-driver", "vfs", "--runtime", "runc", "--cgroup-manager", "cgroupfs"]);
        command.env("TMPDIR", dir.path()).args(arguments);
        command
    };
    let policy = dir.path().join("policy.json");
    fs::write(&policy, r#"{"default":[{"type":"insecureAcceptAnything"}]}"#).expect("write");
    let (certs, policy) = (certs.display().to_string(), policy.display().to_string());
    let creds = format!("x:{}", tenant.token);
    let access = ["--cert-dir", &certs, "--creds", &creds];
    let layout = format!("oci:{}", dir.path().join("in").display());
    let pulled = run(&mut podman("one", &["pull", "-q", "--signature-policy", &policy, &layout])).await;
    let id = String::from_utf8(pulled.stdout).expect("an id").trim().to_owned();
    assert_eq!(id, Digest::of(&image.config).hex());
    let mut push = vec!["push", "-q", "--signature-policy", &policy];
    push.extend(access);
    push.extend([id.as_str(), remote.as_str()]);
    run(&mut podman("one", &push)).await;

    let digest = server.registry.resolve(tenant.id).await.expect("disk").expect("pushed");
    let stored = server.registry.image(tenant.id, &digest).await.expect("runs here");
    assert_eq!(stored.manifest.config.digest, Digest::of(&image.config), "the configuration byte by byte");
    let mut pull = vec!["pull", "-q", "--signature-policy", &policy];
    pull.extend(access);
    pull.push(&remote);
    let again = run(&mut podman("two", &pull)).await;
    assert_eq!(String::from_utf8(again.stdout).expect("an id").trim(), id, "and the content, by its image id");
    for store in ["one", "two"] {
        run(&mut podman(store, &["rmi", "--all", "--force"])).await;
    }
}
