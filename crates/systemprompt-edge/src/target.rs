//! Which host a request is for, and whether this connection may ask for it.

use crate::{certs::Served, tls::Sni};
use http::{HeaderMap, HeaderValue, Uri, header::HOST};
use systemprompt_contract::{Hostname, PlatformHost, Zone};

/// Whom a `Host` means on one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// API, registry or pages.
    Platform,
    /// A host that the connection's certificate is for; the route table knows more.
    Host(Hostname),
    /// As `Host`, on a connection that named no host: only a platform route may answer.
    Unnamed(Hostname),
    /// A host that the connection's certificate is not for.
    Misdirected,
    /// Not a host.
    Bad,
}

/// Decides about a `Host` on a connection with this SNI and certificate.
pub(crate) fn target(raw: &[u8], sni: &Sni, served: &Served, zone: &Zone) -> Target {
    let Ok(text) = std::str::from_utf8(raw) else { return Target::Bad };
    let named = matches!(sni, Sni::Host(_));
    if is_loopback(text) {
        let localhost = Hostname::from_authority("localhost").is_ok_and(|host| served.covers(&host));
        return if !named || localhost { Target::Platform } else { Target::Misdirected };
    }
    let Ok(host) = Hostname::from_authority(text) else { return Target::Bad };
    if !served.covers(&host) {
        Target::Misdirected
    } else if is_platform(&host, zone) {
        Target::Platform
    } else if named {
        Target::Host(host)
    } else {
        Target::Unnamed(host)
    }
}

/// `localhost`, `127.0.0.1` or `[::1]`, with or without a port: always the platform of this machine.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if is_port(port) => name,
        _ => host,
    };
    name.eq_ignore_ascii_case("localhost") || name == "127.0.0.1" || name == "[::1]"
}

fn is_port(text: &str) -> bool {
    (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_platform(host: &Hostname, zone: &Zone) -> bool {
    host.as_str() == zone.as_str()
        || host.split_first_label().is_some_and(|(label, rest)| {
            rest == zone.as_str() && PlatformHost::ALL.iter().any(|platform| platform.label() == label)
        })
}

/// The host a request names, if it names one and only one.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Named<'a> {
    One(&'a [u8]),
    None,
    Several,
}

/// Reads `:authority` (or an absolute target) and `Host`, which must agree (RFC 9113, 8.3.1).
pub(crate) fn named<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Named<'a> {
    let mut hosts = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
    let (host, second) = (hosts.next(), hosts.next());
    let authority = uri.authority().map(|authority| authority.as_str().as_bytes());
    match (authority, host, second) {
        (_, _, Some(_)) => Named::Several,
        (Some(authority), Some(host), None) if !authority.eq_ignore_ascii_case(host) => Named::Several,
        (Some(one), ..) | (None, Some(one), None) => Named::One(one),
        (None, None, None) => Named::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_has_three_spellings() {
        for host in ["localhost", "LOCALHOST:8443", "127.0.0.1", "127.0.0.1:8443", "[::1]", "[::1]:8443"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.", "localhost:", "localhost:x", "127.0.0.2", "::1", "a.localhost", "127.1", "0x7f.1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn platform_hosts_are_the_apex_and_four_labels() {
        let zone = Zone::default();
        for (host, expected) in [
            ("systemprompt.localhost", true),
            ("api.systemprompt.localhost", true),
            ("db.systemprompt.localhost", true),
            ("registry.systemprompt.localhost", true),
            ("cloud.systemprompt.localhost", true),
            ("x.api.systemprompt.localhost", false),
            ("apis.systemprompt.localhost", false),
            ("api.example.com", false),
        ] {
            assert_eq!(is_platform(&host.parse().expect("host"), &zone), expected, "{host}");
        }
    }

    #[test]
    fn authority_and_host_must_agree() {
        let headers = |hosts: &[&'static str]| -> HeaderMap {
            hosts.iter().map(|host| (HOST, HeaderValue::from_static(host))).collect()
        };
        let absolute: Uri = "https://A.example.com/x".parse().expect("uri");
        let origin: Uri = "/x".parse().expect("uri");
        for (uri, hosts, expected) in [
            (&origin, &["a.example.com"][..], Named::One(b"a.example.com")),
            (&origin, &[], Named::None),
            (&origin, &["a.example.com", "a.example.com"], Named::Several),
            (&absolute, &[], Named::One(b"A.example.com")),
            (&absolute, &["a.example.com"], Named::One(b"A.example.com")),
            (&absolute, &["b.example.com"], Named::Several),
        ] {
            let headers = headers(hosts);
            assert_eq!(named(uri, &headers), expected, "{uri} {hosts:?}");
        }
    }
}
