//! A registry that listens on a free port, and images small enough to look at.

use axum::Router;
use chrono::{TimeDelta, Utc};
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use std::{io::Write, path::PathBuf, sync::Arc};
use systemprompt_contract::{IMAGE_REPOSITORY, TenantId, TenantTag};
use systemprompt_oci::{Digest, media_type};
use systemprompt_registry::{Grant, Registry, RegistryConfig, TokenKey};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_rustls::TlsAcceptor;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) struct Server {
    pub(crate) registry: Registry,
    pub(crate) address: String,
    pub(crate) http: reqwest::Client,
    key: TokenKey,
    task: JoinHandle<()>,
    dir: Option<tempfile::TempDir>,
}

pub(crate) fn config(root: impl Into<PathBuf>) -> RegistryConfig {
    RegistryConfig {
        root: root.into(),
        max_blob_bytes: 64 * MIB,
        tenant_quota_bytes: 128 * MIB,
        max_unpacked_bytes: 256 * MIB,
    }
}

fn key() -> TokenKey {
    TokenKey::from_bytes(&[42; 32])
}

impl Server {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("dir");
        let mut server = Self::start_in(config(dir.path().join("registry"))).await;
        server.dir = Some(dir);
        server
    }

    pub(crate) async fn start_in(config: RegistryConfig) -> Self {
        Self::start_with(config, |router| router).await
    }

    /// `around` may put something between the network and the registry.
    pub(crate) async fn start_with(config: RegistryConfig, around: impl FnOnce(Router) -> Router) -> Self {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let registry = Registry::open(config, key()).expect("registry");
        let router = around(registry.router());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound").to_string();
        let task = tokio::spawn(async move { axum::serve(listener, router).await.expect("serves") });
        let http = reqwest::Client::builder().no_proxy().build().expect("client");
        Self { registry, address, http, key: key(), task, dir: None }
    }

    /// The same registry over TLS, with its certificate in PEM form.
    pub(crate) async fn listen_tls(&self) -> (String, String) {
        let certified = rcgen::generate_simple_self_signed(["localhost".into(), "127.0.0.1".into()]).expect("cert");
        let pem = certified.cert.pem();
        let private = rustls::pki_types::PrivateKeyDer::try_from(certified.signing_key.serialize_der()).expect("key");
        let tls = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certified.cert.der().clone()], private)
            .expect("TLS");
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let router = self.registry.router();
        tokio::spawn(async move {
            loop {
                let Ok((stream, _)) = listener.accept().await else { break };
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    let service = hyper_util::service::TowerToHyperService::new(router);
                    let io = hyper_util::rt::TokioIo::new(stream);
                    let executor = hyper_util::rt::TokioExecutor::new();
                    let _ = hyper_util::server::conn::auto::Builder::new(executor).serve_connection(io, service).await;
                });
            }
        });
        (format!("localhost:{port}"), pem)
    }

    /// Stops listening and lets go of the folder, as a killed process would.
    pub(crate) async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
        drop(self.registry);
    }

    pub(crate) fn token(&self, tenant: TenantId) -> String {
        self.token_of(&Grant { tenant, push: true, pull: true, expires_at: Utc::now() + TimeDelta::minutes(10) })
    }

    pub(crate) fn token_of(&self, grant: &Grant) -> String {
        self.key.mint(grant).expose().to_owned()
    }

    pub(crate) fn tenant(&self) -> Tenant<'_> {
        self.as_tenant(TenantId::new())
    }

    pub(crate) fn as_tenant(&self, id: TenantId) -> Tenant<'_> {
        Tenant { server: self, id, token: self.token(id) }
    }
}

/// What one tenant sees.
pub(crate) struct Tenant<'a> {
    pub(crate) server: &'a Server,
    pub(crate) id: TenantId,
    pub(crate) token: String,
}

impl Tenant<'_> {
    /// `path` below the repository, or whole when it starts with `/`.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/v2/{IMAGE_REPOSITORY}/{path}") };
        let url = format!("http://{}{path}", self.server.address);
        self.server.http.request(method, url).basic_auth("any", Some(&self.token))
    }

    pub(crate) async fn send(&self, method: Method, path: &str) -> Response {
        self.request(method, path).send().await.expect("an answer")
    }

    pub(crate) async fn status(&self, method: Method, path: &str) -> StatusCode {
        self.send(method, path).await.status()
    }

    pub(crate) fn tag(&self) -> String {
        TenantTag(self.id).to_string()
    }

    /// Path of a new upload.
    pub(crate) async fn begin(&self) -> String {
        let response = self.send(Method::POST, "blobs/uploads/").await;
        assert_eq!(response.status(), StatusCode::ACCEPTED);
        location(&response)
    }

    pub(crate) async fn push_blob(&self, content: &[u8]) -> Digest {
        let digest = Digest::of(content);
        let path = format!("blobs/uploads/?digest={digest}");
        let response = self.request(Method::POST, &path).body(content.to_vec()).send().await.expect("an answer");
        assert_eq!(response.status(), StatusCode::CREATED, "{}", response.text().await.expect("text"));
        digest
    }

    pub(crate) async fn put_manifest(&self, reference: &str, manifest: &[u8]) -> Response {
        self.request(Method::PUT, &format!("manifests/{reference}"))
            .header("content-type", media_type::OCI_MANIFEST)
            .body(manifest.to_vec())
            .send()
            .await
            .expect("an answer")
    }

    /// Pushes everything of the image and its tag.
    pub(crate) async fn push(&self, image: &Image) -> Digest {
        for blob in [&image.config, &image.layer] {
            self.push_blob(blob).await;
        }
        let response = self.put_manifest(&self.tag(), &image.manifest).await;
        assert_eq!(response.status(), StatusCode::CREATED, "{}", response.text().await.expect("text"));
        image.digest()
    }
}

pub(crate) fn location(response: &Response) -> String {
    response.headers()["location"].to_str().expect("a path").to_owned()
}

/// Code of the error document.
pub(crate) async fn error_code(response: Response) -> String {
    let body: serde_json::Value = response.json().await.expect("an error document");
    body["errors"][0]["code"].as_str().expect("a code").to_owned()
}

/// One layer, one configuration.
#[derive(Clone)]
pub(crate) struct Image {
    pub(crate) layer: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl Image {
    /// With one file of this name and content.
    pub(crate) fn new(name: &str, content: &[u8]) -> Self {
        Self::with_command(name, content, &["/app"])
    }

    pub(crate) fn with_command(name: &str, content: &[u8], command: &[&str]) -> Self {
        let tar = tar_of(name, content);
        let config = serde_json::json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "Entrypoint": command },
            "rootfs": { "type": "layers", "diff_ids": [Digest::of(&tar)] },
        });
        Self::of(gzip(&tar), config.to_string().into_bytes())
    }

    pub(crate) fn of(layer: Vec<u8>, config: Vec<u8>) -> Self {
        let describe = |kind: &str, blob: &[u8]| serde_json::json!({ "mediaType": kind, "digest": Digest::of(blob), "size": blob.len() });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": media_type::OCI_MANIFEST,
            "config": describe(media_type::OCI_CONFIG, &config),
            "layers": [describe(media_type::OCI_LAYER_GZIP, &layer)],
        });
        Self { layer, config, manifest: manifest.to_string().into_bytes() }
    }

    pub(crate) fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }
}

pub(crate) fn architecture() -> &'static str {
    if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }
}

pub(crate) fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    builder.append_data(&mut header, name, content).expect("memory");
    builder.into_inner().expect("memory")
}

pub(crate) fn gzip(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(content).expect("memory");
    encoder.finish().expect("memory")
}

/// Bytes that do not compress.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut next).flatten().take(length).collect()
}
