use reqwest::{
    NoProxy, Proxy,
    dns::{Addrs, Name, Resolve, Resolving},
};
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

/// A name stands for those below it too.
const DIRECT: &str = "localhost,127.0.0.0/8,::1";

/// Why no HTTP client could be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum HttpClientError {
    #[error("expected CA certificates in PEM form: {0}")]
    Certificates(#[source] reqwest::Error),
    #[error("expected CA certificates in PEM form, found none")]
    NoCertificates,
    #[error("no TLS client could be set up; if the machine has no CA certificates, install `ca-certificates`: {0}")]
    Setup(#[source] reqwest::Error),
}

/// The one way to make an HTTP client in this workspace.
///
/// It trusts the machine's certificate authorities and those of `extra_ca_pem` (a bundle; may be empty),
/// resolves `localhost` and `*.localhost` to the loopback address itself, since plain Debian does not, asks no
/// proxy of the environment (`https_proxy`, `http_proxy`, `all_proxy`, `no_proxy`) for them, and
/// gives up connecting after ten seconds. There is no limit on a whole exchange: event streams and uploads
/// last as long as they last.
///
/// # Errors
/// [`HttpClientError`] when the bundle cannot be read or TLS cannot be set up.
pub fn http_client(extra_ca_pem: &[u8]) -> Result<reqwest::Client, HttpClientError> {
    let extra = reqwest::Certificate::from_pem_bundle(extra_ca_pem).map_err(HttpClientError::Certificates)?;
    if extra.is_empty() && !extra_ca_pem.is_empty() {
        return Err(HttpClientError::NoCertificates);
    }
    match builder().tls_certs_merge(extra.clone()).build() {
        // A machine without any CA certificate can still talk to the one authority it was given.
        Err(_) if !extra.is_empty() => builder().tls_certs_only(extra).build(),
        built => built,
    }
    .map_err(HttpClientError::Setup)
}

fn builder() -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder()
        .user_agent(concat!("systemprompt/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
        .tcp_nodelay(true)
        .dns_resolver(LoopbackForLocalhost);
    proxies().into_iter().fold(builder.no_proxy(), reqwest::ClientBuilder::proxy)
}

/// Those of the environment, spelled in either case as for curl. A proxy's loopback is not ours: it could not
/// reach what this machine calls `localhost`.
fn proxies() -> Vec<Proxy> {
    let variable = |name: &str| std::env::var(name).or_else(|_| std::env::var(name.to_ascii_uppercase())).ok();
    let direct = format!("{DIRECT},{}", variable("no_proxy").unwrap_or_default());
    let proxy = |name: &str, of: fn(String) -> reqwest::Result<Proxy>| {
        let url = variable(name).filter(|url| !url.is_empty())?;
        Some(of(url).ok()?.no_proxy(NoProxy::from_string(&direct)))
    };
    let (https, http, all) =
        (proxy("https_proxy", Proxy::https), proxy("http_proxy", Proxy::http), proxy("all_proxy", Proxy::all));
    [https, http, all].into_iter().flatten().collect()
}

/// RFC 6761, 6.3: names below `localhost` are the loopback address, whatever the system's resolver says.
struct LoopbackForLocalhost;

impl Resolve for LoopbackForLocalhost {
    fn resolve(&self, name: Name) -> Resolving {
        let name = name.as_str().to_ascii_lowercase();
        Box::pin(async move {
            if is_localhost(&name) {
                let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
                return Ok(Box::new(std::iter::once(loopback)) as Addrs);
            }
            let addresses: Vec<_> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

#[cfg(test)]
mod tests {
    use super::is_localhost;

    #[test]
    fn only_whole_labels_count_as_localhost() {
        assert!(is_localhost("localhost") && is_localhost("a.systemprompt.localhost."));
        assert!(!is_localhost("notlocalhost") && !is_localhost("localhost.example.com"));
    }
}
