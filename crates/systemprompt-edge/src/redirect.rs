//! The clear HTTP port: sends everybody to HTTPS, and nothing else.

use crate::{answer::Problem, body::ResponseBody, certs::CertTable, target::is_loopback};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode, Uri,
    header::{CACHE_CONTROL, HOST, LOCATION},
};
use systemprompt_contract::Hostname;

/// 308 to the same address under HTTPS (the method and the body stay). A host that this edge has no
/// certificate for is a problem: redirecting anywhere else would lend our name to strangers.
pub(crate) fn redirect(
    uri: &Uri,
    headers: &HeaderMap,
    certs: &CertTable,
    port: u16,
) -> Result<Response<ResponseBody>, Problem> {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    let location = host.and_then(|host| location(host, uri, certs, port)).ok_or(Problem::NotHere)?;
    let mut response = Response::new(ResponseBody::from(Bytes::new()));
    *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response.headers_mut().insert(LOCATION, location);
    Ok(response)
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
