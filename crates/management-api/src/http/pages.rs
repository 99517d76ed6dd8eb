//! The few HTML pages: plain, without scripts, readable without style, and everything dynamic escaped by type.

use crate::app::App;
use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use sha2::{Digest as _, Sha256};
use std::fmt::Write as _;
use systemprompt_contract::{ApiError, ErrorCode};

/// HTML that is safe to send: literals of ours, and text that was escaped on its way in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Markup(String);

impl Markup {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Appends markup from the program's text; `&'static str` keeps input of strangers out.
    #[must_use]
    pub(crate) fn raw(mut self, markup: &'static str) -> Self {
        self.0.push_str(markup);
        self
    }

    /// Appends text, safe between tags and inside double-quoted attributes.
    #[must_use]
    pub(crate) fn text(mut self, text: &str) -> Self {
        for c in text.chars() {
            match c {
                '&' => self.0.push_str("&amp;"),
                '<' => self.0.push_str("&lt;"),
                '>' => self.0.push_str("&gt;"),
                '"' => self.0.push_str("&quot;"),
                '\'' => self.0.push_str("&#39;"),
                // Not allowed in HTML text; a browser would show a replacement as well.
                c if c.is_control() && !matches!(c, '\n' | '\t') => self.0.push('\u{fffd}'),
                c => self.0.push(c),
            }
        }
        self
    }

    /// `<p>` around one sentence.
    #[must_use]
    pub(crate) fn paragraph(self, text: &str) -> Self {
        self.raw("<p>").text(text).raw("</p>")
    }

    /// A command to type.
    #[must_use]
    pub(crate) fn command(self, command: &str) -> Self {
        self.raw("<pre><code>").text(command).raw("</code></pre>")
    }

    /// A field of a form that the person does not see.
    #[must_use]
    pub(crate) fn hidden(self, name: &'static str, value: &str) -> Self {
        self.raw("<input type=\"hidden\" name=\"").raw(name).raw("\" value=\"").text(value).raw("\">")
    }

    /// A labelled field.
    #[must_use]
    pub(crate) fn field(self, field: &Field, value: &str) -> Self {
        self.raw("<label for=\"")
            .raw(field.name)
            .raw("\">")
            .raw(field.label)
            .raw("</label><input id=\"")
            .raw(field.name)
            .raw("\" name=\"")
            .raw(field.name)
            .raw("\" type=\"")
            .raw(field.kind)
            .raw("\" autocomplete=\"")
            .raw(field.autocomplete)
            .raw("\" value=\"")
            .text(value)
            .raw("\" required>")
    }

    /// What went wrong, announced by screen readers.
    #[must_use]
    pub(crate) fn problem(self, message: &str) -> Self {
        self.raw("<p class=\"problem\" role=\"alert\">").text(message).raw("</p>")
    }
}

/// One labelled input.
pub(crate) struct Field {
    pub(crate) name: &'static str,
    pub(crate) label: &'static str,
    /// `email`, `password`, `text`.
    pub(crate) kind: &'static str,
    pub(crate) autocomplete: &'static str,
}

/// A whole page.
pub(crate) struct Page {
    pub(crate) status: StatusCode,
    pub(crate) title: &'static str,
    pub(crate) body: Markup,
    /// Where the answer to the page's form may redirect to: browsers apply `form-action` to redirects too.
    pub(crate) form_target: Option<String>,
}

impl Page {
    pub(crate) fn new(title: &'static str, body: Markup) -> Self {
        Self { status: StatusCode::OK, title, body, form_target: None }
    }

    /// The page for a failure; its status is the code's.
    pub(crate) fn failure(title: &'static str, error: &ApiError) -> Self {
        let mut body = Markup::new().problem(&error.message);
        if let Some(hint) = &error.hint {
            body = body.paragraph(hint);
        }
        body = body.raw("<p class=\"small\">Request ").text(&super::error::request_id().to_string()).raw("</p>");
        Self { status: status_of(error.code), ..Self::new(title, body) }
    }

    #[must_use]
    pub(crate) fn status(self, code: ErrorCode) -> Self {
        Self { status: status_of(code), ..self }
    }
}

impl IntoResponse for Page {
    fn into_response(self) -> Response {
        let title = Markup::new().text(self.title).0;
        let document = format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
             <title>{title} · SystemPrompt Cloud</title><style>{STYLE}</style></head>\
             <body><main><h1>{title}</h1>{}</main></body></html>",
            self.body.0
        );
        let mut response = (self.status, document).into_response();
        protect(response.headers_mut(), self.form_target.as_deref());
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        response
    }
}

/// The headers of every page.
///
/// `Referrer-Policy: same-origin` and not `no-referrer`: with the latter browsers send `Origin: null` with the page's
/// own form (Fetch, "append a request Origin header"), and the Origin check could not tell it from a stranger's.
fn protect(headers: &mut HeaderMap, form_target: Option<&str>) {
    let style = STANDARD.encode(Sha256::digest(STYLE.as_bytes()));
    let mut policy = format!(
        "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
    );
    if let Some(target) = form_target {
        let _ = write!(policy, " {target}");
    }
    let policy = HeaderValue::from_str(&policy).unwrap_or(HeaderValue::from_static("default-src 'none'"));
    headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    for (name, value) in [
        (header::CACHE_CONTROL, "no-store"),
        (header::REFERRER_POLICY, "same-origin"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

/// `GET /` of `cloud.{zone}`: what this is and where to begin.
pub(crate) async fn landing(State(app): State<App>) -> Page {
    let body = Markup::new()
        .paragraph(
            "This is an installation of SystemPrompt Cloud. It builds, runs and serves SystemPrompt projects, each \
             under a host name of its own, with its own database.",
        )
        .raw("<p>Sign in from the command line:</p>")
        .command(&app.site.sign_in_command())
        .raw("<p>Then make a tenant and deploy your project:</p>")
        .command("systemprompt cloud tenant create\nsystemprompt cloud deploy")
        .raw("<p>Is this a fresh installation? <a href=\"/setup\">Make the first account</a>.</p>");
    Page::new("SystemPrompt Cloud", body)
}

fn status_of(code: ErrorCode) -> StatusCode {
    StatusCode::from_u16(code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

const STYLE: &str = "\
body{font:1rem/1.5 system-ui,sans-serif;margin:0;padding:2rem 1rem;color:#1b1f24;background:#fff}\
main{max-width:34rem;margin:0 auto}h1{font-size:1.5rem}label{display:block;margin:1rem 0 .25rem}\
input{font:inherit;width:100%;box-sizing:border-box;padding:.5rem;border:1px solid #57606a;border-radius:.25rem}\
button{font:inherit;margin-top:1.25rem;padding:.5rem 1.25rem;border:0;border-radius:.25rem;background:#0b57d0;color:#fff}\
pre{padding:.75rem;background:#f2f4f7;overflow-x:auto}dt{font-weight:600}dd{margin:0 0 .5rem}\
.problem{padding:.75rem;border-left:.25rem solid #b3261e;background:#fceeee}.small{font-size:.875rem;color:#57606a}\
@media(prefers-color-scheme:dark){body{color:#e6e8eb;background:#14171a}pre{background:#22262b}\
input{background:#22262b;color:inherit}.problem{background:#3a1f1e}.small{color:#a7b0ba}}";

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::BodyExt as _;

    async fn html(page: Page) -> String {
        let bytes = page.into_response().into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn what_strangers_send_is_text() {
        let nasty = "</p><script>alert(1)</script>\" onload='x' &amp; \u{0}";
        let body = Markup::new().paragraph(nasty).hidden("state", nasty).problem(nasty).command(nasty);
        let html = html(Page::new("Test", body)).await;
        assert!(!html.contains("<script") && !html.contains("\" onload") && !html.contains('\0'), "{html}");
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot; onload=&#39;x&#39; &amp;amp; \u{fffd}"));
    }

    #[tokio::test]
    async fn every_page_is_locked_down() {
        let page = Page { form_target: Some("http://127.0.0.1:9".to_owned()), ..Page::new("Test", Markup::new()) };
        let response = page.into_response();
        let headers = response.headers();
        let policy = headers[header::CONTENT_SECURITY_POLICY].to_str().unwrap();
        assert!(
            policy.starts_with("default-src 'none'; ") && policy.ends_with("form-action 'self' http://127.0.0.1:9")
        );
        assert!(!policy.contains("unsafe-inline") && policy.contains("frame-ancestors 'none'"));
        assert_eq!(headers[header::CACHE_CONTROL], "no-store");
        assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(headers[header::REFERRER_POLICY], "same-origin");
        assert_eq!(headers[header::CONTENT_TYPE], "text/html; charset=utf-8");
    }
}
