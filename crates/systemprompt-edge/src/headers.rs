//! Which fields cross the edge, and what it says about the client itself.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CONNECTION, CONTENT_LENGTH, COOKIE, HOST, TRANSFER_ENCODING},
};

pub(crate) const X_SYSTEMPROMPT_ERROR: HeaderName = HeaderName::from_static("x-systemprompt-error");
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// What the edge itself knows about a request; overrides whatever the client says.
pub(crate) struct Truth<'a> {
    pub(crate) client: &'a HeaderValue,
    pub(crate) host: &'a HeaderValue,
    pub(crate) request_id: &'a HeaderValue,
}

/// Makes a client's fields fit for an upstream: hop-by-hop fields, those that `Connection` names, and
/// everything that claims to come from a proxy go; then ours are written.
pub(crate) fn prepare_request(headers: &mut HeaderMap, truth: &Truth<'_>) {
    strip(headers, |name| is_hop_by_hop(name) || is_claim(name) || name == "expect");
    join_cookies(headers);
    headers.insert(HOST, truth.host.clone());
    headers.insert(X_FORWARDED_FOR, truth.client.clone());
    headers.insert(X_REAL_IP, truth.client.clone());
    headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static("https"));
    headers.insert(X_FORWARDED_HOST, truth.host.clone());
    headers.insert(X_REQUEST_ID, truth.request_id.clone());
}

/// Makes an upstream's fields fit for a client: hop-by-hop fields, those that `Connection` names, instructions
/// to proxies (`fly-*`) and what is the edge's own voice go. So does a length beside chunks, which did not count
/// (RFC 9112, 6.3).
pub(crate) fn prepare_response(headers: &mut HeaderMap, request_id: HeaderValue) {
    let unwanted =
        |name: &str| is_hop_by_hop(name) || starts_with(name, "fly-") || name == X_SYSTEMPROMPT_ERROR.as_str();
    if strip(headers, unwanted).contains(&TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    headers.insert(X_REQUEST_ID, request_id);
}

/// Whether a framing field is spelt as some servers take for the real one; the gate looks for HTTP/1.1.
pub(crate) fn has_underscored_framing(headers: &HeaderMap) -> bool {
    ["content_length", "transfer_encoding"].iter().any(|name| headers.contains_key(*name))
}

/// Removes the fields that match and, where `Connection` is one of them, those it names (RFC 9110, 7.6.1). A name
/// that frames or addresses the message cannot be nominated away. Answers the names that matched.
fn strip(headers: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) -> Vec<HeaderName> {
    // Usually there are few or none, so names are collected and not the map rebuilt.
    let matched: Vec<HeaderName> = headers.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    if matched.contains(&CONNECTION) {
        let nominated: Vec<HeaderName> = headers
            .get_all(CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .filter_map(|token| HeaderName::from_bytes(token.trim_ascii()).ok())
            .filter(|name| !matches!(name.as_str(), "host" | "content-length" | "close" | "keep-alive"))
            .collect();
        for name in nominated {
            headers.remove(name);
        }
    }
    for name in &matched {
        headers.remove(name);
    }
    matched
}

fn is_hop_by_hop(name: &str) -> bool {
    matches!(
        name,
        "connection"
            | "keep-alive"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-connection"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// Whether a field claims what only a proxy in front of the app may say. `_` counts as `-`: servers that
/// map fields to variables cannot tell them apart.
fn is_claim(name: &str) -> bool {
    // Most fields end here: a claim begins with one of four letters.
    match name.as_bytes().first() {
        Some(b'x') => {
            ["x-forwarded-", "x-tenant-", "x-real-ip", "x-request-id", "x-client-ip", "x-cluster-client-ip"]
                .into_iter()
                .any(|claim| starts_with(name, claim))
                || is(name, "x-forwarded")
        }
        Some(b'f') => is(name, "forwarded") || starts_with(name, "fly-"),
        Some(b'c') => starts_with(name, "cf-connecting-"),
        Some(b't') => is(name, "true-client-ip"),
        _ => false,
    }
}

fn starts_with(name: &str, claim: &str) -> bool {
    name.len() >= claim.len() && is(&name[..claim.len()], claim)
}

fn is(name: &str, claim: &str) -> bool {
    name.len() == claim.len()
        && name.bytes().zip(claim.bytes()).all(|(have, want)| have == want || (have == b'_' && want == b'-'))
}

/// HTTP/2 may split the cookie into several fields; HTTP/1.1 knows one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let twice = headers.len() > headers.keys_len();
    if !twice || headers.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let joined = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b"; "[..]);
    if let Ok(value) = HeaderValue::from_bytes(&joined) {
        headers.insert(COOKIE, value);
    }
}

/// Copies all values. Values of an HTTP/1 head share its read buffer, and an HTTP/2 connection keeps
/// values in its compression table: uncopied, a few bytes there would keep the whole buffer alive.
pub(crate) fn detach(headers: &mut HeaderMap) {
    for value in headers.values_mut() {
        if let Ok(copy) = HeaderValue::from_bytes(value.as_bytes()) {
            *value = copy;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &'static str) -> HeaderValue {
        HeaderValue::from_static(text)
    }

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|(name, text)| (HeaderName::from_static(name), value(text))).collect()
    }

    fn prepared(mut headers: HeaderMap) -> Vec<String> {
        let (client, host, request_id) = (value("203.0.113.9"), value("a.example.com"), value("id"));
        prepare_request(&mut headers, &Truth { client: &client, host: &host, request_id: &request_id });
        let ours = ["host", "x-forwarded-for", "x-real-ip", "x-forwarded-proto", "x-forwarded-host", "x-request-id"];
        for name in ours {
            assert_eq!(headers.get_all(name).iter().count(), 1, "{name}");
        }
        assert_eq!(headers["x-forwarded-for"], "203.0.113.9");
        let mut rest: Vec<String> = headers
            .iter()
            .filter(|(name, _)| !ours.contains(&name.as_str()))
            .map(|(name, value)| format!("{name}: {}", value.to_str().expect("text")))
            .collect();
        rest.sort();
        rest
    }

    #[test]
    fn every_claim_of_a_client_is_deleted() {
        for name in [
            "x-forwarded-for",
            "x-forwarded-proto",
            "x-forwarded-host",
            "x-forwarded-port",
            "x-forwarded-prefix",
            "x-forwarded",
            "x_forwarded_for",
            "x-forwarded_for",
            "forwarded",
            "x-real-ip",
            "x_real_ip",
            "cf-connecting-ip",
            "cf_connecting_ip",
            "true-client-ip",
            "x-client-ip",
            "fly-client-ip",
            "fly-replay-src",
            "fly_force_instance_id",
            "x-request-id",
            "x_request_id",
            "x-tenant-id",
            "x_tenant_id",
            "te",
            "upgrade",
            "proxy-authorization",
            "keep-alive",
            "expect",
        ] {
            let fields = [(name, "forged"), (name, "twice"), ("accept", "*/*")];
            assert_eq!(prepared(map(&fields)), ["accept: */*"], "{name}");
        }
    }

    #[test]
    fn what_only_looks_like_a_claim_stays() {
        let fields = [("x-forward", "1"), ("flying", "2"), ("x-tenantry", "3"), ("cf-ray", "4"), ("x-realm", "5")];
        assert_eq!(prepared(map(&fields)).len(), fields.len());
    }

    #[test]
    fn a_nominated_field_goes_but_never_ours() {
        let fields = [
            ("connection", "x-forwarded-for, X-Private, host, content-length, x-request-id"),
            ("x-private", "1"),
            ("content-length", "5"),
        ];
        assert_eq!(prepared(map(&fields)), ["content-length: 5"]);
    }

    #[test]
    fn split_cookies_are_joined() {
        assert_eq!(prepared(map(&[("cookie", "a=1"), ("cookie", "b=2")])), ["cookie: a=1; b=2"]);
    }

    #[test]
    fn a_length_beside_chunks_goes() {
        let mut headers = map(&[("content-length", "3"), ("transfer-encoding", "chunked")]);
        prepare_response(&mut headers, value("id"));
        assert_eq!(headers, map(&[("x-request-id", "id")]));
    }

    #[test]
    fn a_tenant_cannot_instruct_a_proxy() {
        let mut headers = map(&[
            ("fly-replay", "app=other"),
            ("fly-replay-cache", "x"),
            ("connection", "x-internal"),
            ("x-internal", "1"),
            ("content-type", "text/plain"),
        ]);
        prepare_response(&mut headers, value("id"));
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["content-type", "x-request-id"]);
    }
}
