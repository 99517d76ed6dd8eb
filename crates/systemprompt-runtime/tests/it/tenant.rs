//! A server of its own for one test.

use std::{fs, net::SocketAddr, path::Path, time::Duration};
use systemprompt_contract::Secret;
use systemprompt_postgres::testing::TestCluster;
use systemprompt_runtime::{RuntimeConfig, RuntimeError, serve, serve_on};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::oneshot,
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) struct Tenant {
    pub(crate) address: SocketAddr,
    pub(crate) web: TempDir,
    pub(crate) stop: CancellationToken,
    pub(crate) served: JoinHandle<Result<(), RuntimeError>>,
}

pub(crate) fn config(database_url: &str, web: &Path) -> RuntimeConfig {
    RuntimeConfig {
        host: [127, 0, 0, 1].into(),
        port: 0,
        web_dir: web.to_owned(),
        services_path: web.to_owned(),
        database_url: Secret::new(database_url),
        drain: Duration::from_secs(5),
    }
}

impl Tenant {
    /// A server with a page, a style sheet, a directory, and a file above the site that nobody may have.
    pub(crate) async fn start(database_url: &str) -> Self {
        Self::start_with(database_url, |config| config).await
    }

    pub(crate) async fn start_with(database_url: &str, change: impl FnOnce(RuntimeConfig) -> RuntimeConfig) -> Self {
        let web = tempfile::tempdir().expect("a directory");
        for (path, text) in [
            ("dist/index.html", "<h1>hello</h1>"),
            ("dist/style.css", "body{}"),
            ("dist/docs/index.html", "docs"),
            ("dist/.env", "SECRET"),
            ("secret.txt", "SECRET"),
        ] {
            let path = web.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).expect("made");
            fs::write(path, text).expect("written");
        }
        let (sender, receiver) = oneshot::channel();
        let stop = CancellationToken::new();
        let config = change(config(database_url, web.path()));
        let serving = serve_on(config, stop.clone(), |address| sender.send(address).expect("the test waits"));
        let served = tokio::spawn(serving);
        let address = tokio::time::timeout(SOON, receiver).await.expect("in time").expect("bound");
        Self { address, web, stop, served }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Sends bytes as they are and reads to the end of the connection.
    pub(crate) async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("connected");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        let read = tokio::time::timeout(SOON, stream.read_to_end(&mut answer)).await.expect("in time");
        read.expect("read");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// One GET of a path exactly as it is, which clients would tidy up.
    pub(crate) async fn get(&self, path: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")).await
    }

    pub(crate) async fn end(self) -> Result<(), RuntimeError> {
        self.stop.cancel();
        tokio::time::timeout(SOON, self.served).await.expect("in time").expect("no panic")
    }
}

pub(crate) fn http() -> reqwest::Client {
    let policy = reqwest::redirect::Policy::none();
    reqwest::Client::builder().redirect(policy).tls_certs_only([]).build().expect("a client")
}

/// The name at the end of a database's URL.
pub(crate) fn database_name(url: &str) -> String {
    let path = url.split('?').next().and_then(|url| url.rsplit('/').next());
    path.expect("a path").to_owned()
}

/// What `serve` ends with, for servers that must not start.
pub(crate) async fn refusal(config: RuntimeConfig) -> RuntimeError {
    let served = tokio::time::timeout(SOON, serve(config, CancellationToken::new()));
    served.await.expect("in time").expect_err("it must not serve")
}

pub(crate) async fn cluster() -> (TestCluster, String) {
    let cluster = TestCluster::start().await;
    let url = cluster.create_database().await;
    (cluster, url)
}
