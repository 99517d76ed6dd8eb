//! What a page's form must bring before it is believed. Tenants live under the same registrable domain as we do, so
//! `SameSite` alone keeps none of them out (threat: cross-site request forgery from a sibling host).
//!
//! | check | keeps out |
//! |---|---|
//! | `Origin` is one of the pages' own, exactly | other sites, siblings, other ports, `null` |
//! | `Sec-Fetch-Site: same-origin` | the same, as the browser itself sees it |
//! | `__Host-` cookie, exactly one | cookies that a sibling host tossed over |
//! | form token = HMAC of the cookie | forms that were not given to this browser |

use crate::{app::Site, http::error::Failure};
use axum::http::{HeaderMap, HeaderValue, Uri, header};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use systemprompt_contract::{ErrorCode, PlatformHost, token};

/// One browser that was given a form. The value lives in a cookie for a quarter of an hour.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FormSession(String);

impl FormSession {
    /// The browser's session, if it brought one, else a new one.
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self::from_cookie(headers).unwrap_or_else(|| Self(token::random_text()))
    }

    /// Exactly one cookie of our name, of our form. Two of them mean that somebody else set one.
    fn from_cookie(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers
            .get_all(header::COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .filter_map(|(name, value)| (name == COOKIE).then_some(value));
        let (Some(value), None) = (values.next(), values.next()) else { return None };
        let well_formed = URL_SAFE_NO_PAD.decode(value).is_ok_and(|bytes| bytes.len() == 32);
        well_formed.then(|| Self(value.to_owned()))
    }

    /// `Set-Cookie` for this session.
    pub(super) fn cookie(&self) -> HeaderValue {
        let cookie = format!("{COOKIE}={}; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=900", self.0);
        HeaderValue::from_str(&cookie).expect("base64url and literals are visible ASCII")
    }

    /// What the form must send back.
    pub(super) fn form_token(&self, key: &[u8; 32]) -> String {
        URL_SAFE_NO_PAD.encode(self.mac(key).finalize().into_bytes())
    }

    fn permits(&self, key: &[u8; 32], form_token: &str) -> bool {
        URL_SAFE_NO_PAD.decode(form_token).is_ok_and(|tag| self.mac(key).verify_slice(&tag).is_ok())
    }

    fn mac(&self, key: &[u8; 32]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes a key of any length");
        mac.update(self.0.as_bytes());
        mac
    }
}

/// Ends the session in the browser.
pub(super) const EXPIRED_COOKIE: HeaderValue =
    HeaderValue::from_static("__Host-sp_form=; Path=/; Secure; HttpOnly; SameSite=Strict; Max-Age=0");

/// Checks that a submitted form comes from our own page in the browser that was given it.
///
/// # Errors
/// `forbidden`, saying which proof was missing.
pub(super) fn check(
    headers: &HeaderMap,
    site: &Site,
    key: &[u8; 32],
    form_token: &str,
) -> Result<FormSession, Failure> {
    let single = |name| {
        let mut values = headers.get_all(name).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => value.to_str().ok(),
            _ => None,
        }
    };
    if !single(header::ORIGIN.as_str()).is_some_and(|origin| is_own_origin(site, origin)) {
        return Err(refused("its Origin is not this page's"));
    }
    if single("sec-fetch-site") != Some("same-origin") {
        return Err(refused("its Sec-Fetch-Site is not same-origin"));
    }
    FormSession::from_cookie(headers)
        .filter(|session| session.permits(key, form_token))
        .ok_or_else(|| refused("it does not belong to this browser, or the page was open for too long"))
}

/// The pages are served under these names and no other.
fn is_own_origin(site: &Site, origin: &str) -> bool {
    let cloud = site.zone.platform(PlatformHost::Cloud);
    [cloud.as_str(), "localhost", "127.0.0.1"]
        .iter()
        .any(|host| origin.strip_prefix("https://") == Some(site.authority(host).as_str()))
}

/// Where a page with a form stands, for a browser that asked for it under the API's name, as the command line's links
/// have it: a form from there would have an Origin that is not the pages' own.
pub(super) fn home_of(site: &Site, headers: &HeaderMap, uri: &Uri) -> Option<String> {
    let called = headers.get(header::HOST)?.to_str().ok()?;
    let name = called.rsplit_once(':').map_or(called, |(name, _)| name);
    let api = site.zone.platform(PlatformHost::Api);
    let path = uri.path_and_query()?;
    name.eq_ignore_ascii_case(api.as_str()).then(|| format!("{}{path}", site.cloud_url()))
}

fn refused(why: &str) -> Failure {
    Failure::new(ErrorCode::Forbidden, format!("the form was not accepted: {why}"))
        .hint("load the page again in the browser, and allow it cookies")
}

/// `__Host-`: browsers take it only over TLS, for this host alone, from this host alone.
const COOKIE: &str = "__Host-sp_form";

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: [u8; 32] = [7; 32];

    fn site() -> Site {
        Site { zone: "example.org".parse().unwrap(), https_port: 8443 }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn session() -> (FormSession, String, String) {
        let session = FormSession::of(&HeaderMap::new());
        let (cookie, token) = (format!("{COOKIE}={}", session.0), session.form_token(&KEY));
        (session, cookie, token)
    }

    #[test]
    fn our_own_form_passes() {
        let (session, cookie, token) = session();
        for origin in ["https://cloud.example.org:8443", "https://localhost:8443", "https://127.0.0.1:8443"] {
            let headers = headers(&[("origin", origin), ("sec-fetch-site", "same-origin"), ("cookie", &cookie)]);
            assert_eq!(check(&headers, &site(), &KEY, &token).unwrap(), session);
            assert_eq!(FormSession::of(&headers), session, "a second tab keeps the session");
        }
    }

    #[test]
    fn every_other_origin_is_refused() {
        let (_, cookie, token) = session();
        for origin in [
            "",
            "null",
            "https://999bc6549a64.example.org:8443",
            "https://example.org:8443",
            "https://api.example.org:8443",
            "http://cloud.example.org:8443",
            "https://cloud.example.org",
            "https://cloud.example.org:8444",
            "https://x.cloud.example.org:8443",
            "https://cloud.example.org:8443.evil.example",
            "https://evilcloud.example.org:8443",
            "https://cloud.example.org:8443/",
            "https://CLOUD.example.org:8443",
        ] {
            let headers = headers(&[("origin", origin), ("sec-fetch-site", "same-origin"), ("cookie", &cookie)]);
            assert!(check(&headers, &site(), &KEY, &token).is_err(), "{origin}");
        }
        let own = "https://cloud.example.org:8443";
        for fetch_site in ["same-site", "cross-site", "none", ""] {
            let headers = headers(&[("origin", own), ("sec-fetch-site", fetch_site), ("cookie", &cookie)]);
            assert!(check(&headers, &site(), &KEY, &token).is_err(), "{fetch_site}");
        }
        for missing in [
            headers(&[("sec-fetch-site", "same-origin"), ("cookie", &cookie)]),
            headers(&[("origin", own), ("cookie", &cookie)]),
            headers(&[("origin", own), ("origin", own), ("sec-fetch-site", "same-origin"), ("cookie", &cookie)]),
        ] {
            assert!(check(&missing, &site(), &KEY, &token).is_err(), "{missing:?}");
        }
    }

    #[test]
    fn a_tossed_or_foreign_cookie_is_refused() {
        let (_, cookie, token) = session();
        let (_, other_cookie, other_token) = session();
        let with = |cookie: &str, token: &str| {
            let base =
                [("origin", "https://cloud.example.org:8443"), ("sec-fetch-site", "same-origin"), ("cookie", cookie)];
            check(&headers(&base), &site(), &KEY, token)
        };
        assert!(with(&cookie, &token).is_ok());
        assert!(with(&cookie, &other_token).is_err());
        assert!(with(&other_cookie, &token).is_err());
        assert!(with(&format!("{cookie}; {other_cookie}"), &token).is_err(), "two of them");
        assert!(with(&cookie.replace("__Host-", ""), &token).is_err());
        assert!(with(&format!("{COOKIE}="), &token).is_err());
        assert!(with("", &token).is_err());
        assert!(with(&cookie, "").is_err());
    }

    #[test]
    fn only_a_page_under_the_apis_name_stands_elsewhere() {
        let home =
            |host: &str| home_of(&site(), &headers(&[("host", host)]), &Uri::from_static("/login?state=x&a=%20"));
        let there = "https://cloud.example.org:8443/login?state=x&a=%20";
        for api in ["api.example.org:8443", "api.example.org", "API.example.org:8443"] {
            assert_eq!(home(api).as_deref(), Some(there), "{api}");
        }
        for own in ["cloud.example.org:8443", "localhost:8443", "127.0.0.1:8443", "api.evil.example", ""] {
            assert_eq!(home(own), None, "{own}");
        }
        assert_eq!(home_of(&site(), &HeaderMap::new(), &Uri::from_static("/login")), None);
    }

    #[test]
    fn the_cookie_has_every_protection() {
        let cookie = session().0.cookie();
        let text = cookie.to_str().unwrap();
        for part in ["__Host-sp_form=", "; Path=/", "; Secure", "; HttpOnly", "; SameSite=Strict", "; Max-Age=900"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("Domain"));
    }
}
