//! The clear HTTP port: sends everybody to HTTPS, and nothing else.

use crate::{certs::CertTable, target::is_loopback};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode, Uri,
    header::{CACHE_CONTROL, CONNECTION, HOST, LOCATION},
};
use http_body_util::Full;
use systemprompt_contract::Hostname;

/// 308 to the same address under HTTPS (the method and the body stay), or 400 for a host that this edge
/// has no certificate for: redirecting anywhere else would lend our name to strangers.
pub(crate) fn redirect(uri: &Uri, headers: &HeaderMap, certs: &CertTable, port: u16) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    let location =
        headers.get(HOST).and_then(|host| host.to_str().ok()).and_then(|host| location(host, uri, certs, port));
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Some(location) = location {
        *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
        response.headers_mut().insert(LOCATION, location);
    } else {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        *response.body_mut() = Full::from("400: no such host here; ask for https://HOST/ by its name\n");
    }
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn location(host: &str, uri: &Uri, certs: &CertTable, port: u16) -> Option<HeaderValue> {
    let name = if is_loopback(host) {
        let end = host.rfind(':').filter(|end| host[*end..].len() > 1 && !host[*end..].contains(']'));
        host[..end.unwrap_or(host.len())].to_ascii_lowercase()
    } else {
        let host = Hostname::from_authority(host).ok()?;
        certs.find(&host)?;
        host.as_str().to_owned()
    };
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let path = if path.starts_with('/') { path } else { "/" };
    let port = if port == 443 { String::new() } else { format!(":{port}") };
    HeaderValue::from_str(&format!("https://{name}{port}{path}")).ok()
}
