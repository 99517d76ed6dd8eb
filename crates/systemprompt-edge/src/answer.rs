//! What the edge answers by itself: a page for browsers, JSON for everything else.

use crate::{
    body::ResponseBody,
    gate::Refusal,
    headers::{X_REQUEST_ID, X_SYSTEMPROMPT_ERROR},
    routes::Why,
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER},
};
use systemprompt_contract::{ApiError, ErrorBody, ErrorCode, RequestId};

/// Why a request was not forwarded, or not answered by its upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Problem {
    Refused(Refusal),
    NotHere,
    BadHost,
    AmbiguousHost,
    BadTarget,
    Misdirected,
    TenantNotFound,
    Unavailable(Why),
    AppUnreachable,
    AppTimeout,
    PlatformUnreachable,
    BodyTooLarge,
    BodyTooSlow,
}

struct Text {
    code: ErrorCode,
    message: &'static str,
    hint: &'static str,
    /// Seconds after which another try makes sense.
    retry_after: Option<u16>,
}

impl Problem {
    fn text(self) -> Text {
        let (code, message, hint, retry_after) = match self {
            Self::Refused(Refusal::TooLarge) => (
                ErrorCode::HeaderTooLarge,
                "The head of the request is larger than 16 KiB, or has more than 100 fields.",
                "Send fewer or shorter header fields; cookies are the usual cause.",
                None,
            ),
            Self::Refused(refusal) => (
                ErrorCode::BadRequest,
                refusal.message(),
                "Send requests as RFC 9112 has them; the connection was closed.",
                None,
            ),
            Self::NotHere => (
                ErrorCode::BadRequest,
                "There is no such host here.",
                "Ask for https://HOST/ by a name of this installation.",
                None,
            ),
            Self::BadHost => (
                ErrorCode::BadRequest,
                "The Host of the request is not a host name.",
                "Ask for the name as it is in the address, without a dot at the end.",
                None,
            ),
            Self::AmbiguousHost => (
                ErrorCode::BadRequest,
                "The request names two different hosts.",
                "Send one host: `host` and `:authority` must agree.",
                None,
            ),
            Self::BadTarget => (
                ErrorCode::BadRequest,
                "The request target is not one this server takes.",
                "Ask for a path that begins with a slash.",
                None,
            ),
            Self::Misdirected => (
                ErrorCode::MisdirectedRequest,
                "This connection's certificate is not for the host of the request.",
                "Open a new connection for this host, with its name in the TLS handshake (SNI).",
                None,
            ),
            Self::TenantNotFound => (
                ErrorCode::TenantNotFound,
                "There is no tenant at this address.",
                "Check the address; `systemprompt cloud tenant list` shows yours.",
                None,
            ),
            Self::Unavailable(why) => return why.text(),
            Self::AppUnreachable => (
                ErrorCode::AppUnreachable,
                "The application does not answer.",
                "`systemprompt cloud logs` shows why.",
                None,
            ),
            Self::AppTimeout => (
                ErrorCode::AppTimeout,
                "The application took too long to answer.",
                "Try again; `systemprompt cloud logs` shows what it does.",
                None,
            ),
            Self::PlatformUnreachable => (
                ErrorCode::Unavailable,
                "The management API does not answer; running tenants are not affected.",
                "Try again in a few seconds.",
                Some(5),
            ),
            Self::BodyTooLarge => {
                (ErrorCode::TooLarge, "The body of the request is too large.", "Send at most 100 MiB.", None)
            }
            Self::BodyTooSlow => {
                (ErrorCode::RequestTimeout, "The body of the request came too slowly.", "Try again.", None)
            }
        };
        Text { code, message, hint, retry_after }
    }
}

impl Why {
    fn text(self) -> Text {
        let (code, message, hint, retry_after) = match self {
            Self::AwaitingDeploy => (
                ErrorCode::AwaitingDeploy,
                "This tenant is ready and waits for its first deploy.",
                "Run `systemprompt cloud deploy`.",
                Some(10),
            ),
            Self::Suspended => (
                ErrorCode::Suspended,
                "This tenant is suspended.",
                "Its owner finds the reason and the way back under billing in the dashboard.",
                None,
            ),
            Self::Starting => {
                (ErrorCode::AppStarting, "The application is being started.", "Try again in a few seconds.", Some(5))
            }
            Self::Stopped => (
                ErrorCode::AppStopped,
                "This tenant was stopped by its owner.",
                "`systemprompt cloud deploy` starts it again.",
                Some(60),
            ),
            Self::Failed => (
                ErrorCode::AppFailed,
                "The application could not be started.",
                "`systemprompt cloud logs` shows why; then deploy again.",
                Some(60),
            ),
        };
        Text { code, message, hint, retry_after }
    }
}

/// The answer to a problem.
pub(crate) fn answer(problem: Problem, accept: &Accept, id: RequestId) -> Response<ResponseBody> {
    let text = problem.text();
    let (content_type, body) = match accept.form() {
        Form::Page => ("text/html; charset=utf-8", page(&text, id)),
        Form::Json => ("application/json", json(&text, id)),
    };
    let mut response = Response::new(ResponseBody::from(Bytes::from(body)));
    *response.status_mut() = StatusCode::from_u16(text.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_SYSTEMPROMPT_ERROR, HeaderValue::from_static(text.code.as_str()));
    if let Ok(value) = HeaderValue::from_str(&id.to_string()) {
        headers.insert(X_REQUEST_ID, value);
    }
    if let Some(seconds) = text.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    }
    response
}

/// A client's `Accept`, kept aside in case the edge has to answer by itself.
pub(crate) struct Accept(Option<HeaderValue>);

/// In which form a client wants to be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Page,
    Json,
}

impl Accept {
    pub(crate) fn header(headers: &HeaderMap) -> Self {
        Self(headers.get(ACCEPT).cloned())
    }

    /// Whichever of the two is named first; programs that name neither get JSON.
    fn form(&self) -> Form {
        let ranges = self.0.iter().flat_map(|value| value.as_bytes().split(|byte| *byte == b','));
        let mut kinds = ranges.map(|range| range.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii());
        kinds
            .find_map(|kind| match kind {
                kind if kind.eq_ignore_ascii_case(b"text/html") => Some(Form::Page),
                kind if kind.eq_ignore_ascii_case(b"application/json") => Some(Form::Json),
                _ => None,
            })
            .unwrap_or(Form::Json)
    }
}

fn json(text: &Text, id: RequestId) -> String {
    let mut error = ApiError::new(text.code, text.message).hint(text.hint);
    error.request_id = Some(id);
    serde_json::to_string(&ErrorBody { error }).expect("texts and ids always serialise")
}

fn page(text: &Text, id: RequestId) -> String {
    let Text { code, message, hint, .. } = text;
    let status = code.status();
    // All texts are our own constants; backquotes are their only markup.
    let hint = hint.split('`').enumerate().fold(String::new(), |html, (index, part)| match index % 2 {
        0 => html + part,
        _ => format!("{html}<code>{part}</code>"),
    });
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{status} {code}</title>\n\
         <style>body{{font:1rem/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem;\
         color:#222;background:#fff}}small{{color:#666}}\
         @media(prefers-color-scheme:dark){{body{{color:#ddd;background:#181818}}small{{color:#999}}}}</style>\n\
         <h1>{status}</h1>\n<p>{message}</p>\n<p>{hint}</p>\n\
         <p><small>{code} · request {id}</small></p>\n</html>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn browsers_get_pages_and_programs_get_json() {
        for (accept, expected) in [
            ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", Form::Page),
            ("application/json", Form::Json),
            ("application/json, text/html", Form::Json),
            ("Text/HTML;q=1", Form::Page),
            ("*/*", Form::Json),
        ] {
            assert_eq!(Accept(Some(HeaderValue::from_static(accept))).form(), expected, "{accept}");
        }
        assert_eq!(Accept(None).form(), Form::Json);
    }

    #[test]
    fn a_page_shows_code_and_request() {
        let id = RequestId::new();
        let page = page(&Problem::Unavailable(Why::AwaitingDeploy).text(), id);
        assert!(page.contains("<code>systemprompt cloud deploy</code>") && page.contains(&id.to_string()), "{page}");
        assert!(page.contains("<title>503 awaiting_deploy</title>"), "{page}");
    }
}
