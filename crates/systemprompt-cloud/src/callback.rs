//! A listener on loopback that a browser is sent back to, once.
//!
//! | state | event | next |
//! |---|---|---|
//! | Waiting | a hit that `judge` takes | Received |
//! | Waiting | any other connection: another path, a wrong state, a browser's idle preconnection | Waiting |
//! | Waiting | the time is over | `TimedOut` |
//!
//! Whoever else on this machine calls the port can neither answer for the browser nor end the wait.

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use url::form_urlencoded;

const PATH: &str = "/callback";
const MAX_HEAD: usize = 16 * 1024;
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const MAX_CONNECTIONS: usize = 32;

/// Why nobody came back from the browser.
#[derive(Debug, thiserror::Error)]
pub enum CallbackError {
    /// No port on loopback.
    #[error("cannot listen on 127.0.0.1 for the browser's return: {0}")]
    Bind(#[source] std::io::Error),
    /// Too long.
    #[error("nobody came back from the browser within {} seconds", .0.as_secs())]
    TimedOut(Duration),
}

/// The parameters of a hit on `/callback`; the first of each name counts.
pub(crate) type Parameters = BTreeMap<String, String>;

/// What a hit means.
pub(crate) enum Verdict<T> {
    /// The one that was waited for.
    Take(T, Page),
    /// Not for us; the wait goes on.
    Refuse(Page),
}

/// What the browser shows; plain text, no script, no secret.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    pub(crate) title: &'static str,
    pub(crate) text: &'static str,
}

pub(crate) struct CallbackListener {
    listener: TcpListener,
    port: u16,
}

impl CallbackListener {
    /// Listens on the well-known port, or on a free one when it is taken.
    pub(crate) async fn bind(preferred: u16) -> Result<Self, CallbackError> {
        let listener = match TcpListener::bind((Ipv4Addr::LOCALHOST, preferred)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(CallbackError::Bind)?,
        };
        let port = listener.local_addr().map_err(CallbackError::Bind)?.port();
        Ok(Self { listener, port })
    }

    pub(crate) fn redirect_uri(&self) -> String {
        format!("http://127.0.0.1:{}{PATH}", self.port)
    }

    /// Waits for the hit that `judge` takes. Consumes the listener: after it, the port is closed.
    pub(crate) async fn wait<T>(
        self,
        within: Duration,
        judge: impl Fn(&Parameters) -> Verdict<T>,
    ) -> Result<T, CallbackError> {
        let serve = async {
            let mut connections = FuturesUnordered::new();
            loop {
                tokio::select! {
                    accepted = self.listener.accept(), if connections.len() < MAX_CONNECTIONS => {
                        if let Ok((stream, _)) = accepted {
                            connections.push(self.converse(stream, &judge));
                        }
                    }
                    Some(taken) = connections.next() => {
                        if let Some(value) = taken {
                            return value;
                        }
                    }
                }
            }
        };
        tokio::time::timeout(within, serve).await.map_err(|_| CallbackError::TimedOut(within))
    }

    async fn converse<T>(&self, mut stream: TcpStream, judge: &impl Fn(&Parameters) -> Verdict<T>) -> Option<T> {
        let head = tokio::time::timeout(HEAD_WITHIN, read_head(&mut stream)).await.ok()??;
        let (value, status, page) = match parse_hit(&head, self.port) {
            None => (None, "404 Not Found", NOTHING_HERE),
            Some(parameters) => match judge(&parameters) {
                Verdict::Take(value, page) => (Some(value), "200 OK", page),
                Verdict::Refuse(page) => (None, "400 Bad Request", page),
            },
        };
        // The value counts also when the browser leaves before it has seen the page.
        if stream.write_all(page.answer(status).as_bytes()).await.is_ok() {
            let _ = stream.shutdown().await;
        }
        value
    }
}

const NOTHING_HERE: Page =
    Page { title: "Nothing here", text: "This address is used by the systemprompt command line." };

impl Page {
    fn answer(self, status: &str) -> String {
        let Self { title, text } = self;
        let body = format!(
            "<!doctype html>\n<html lang=\"en\"><meta charset=\"utf-8\"><title>{title}</title>\
             <style>body{{font:1.1rem/1.5 system-ui,sans-serif;margin:20vh auto;max-width:32rem;padding:0 1rem}}</style>\
             <h1>{title}</h1><p>{text}</p></html>\n"
        );
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\
             Cache-Control: no-store\r\nReferrer-Policy: no-referrer\r\n\
             Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'\r\n\r\n{body}",
            body.len()
        )
    }
}

async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    let mut buffer = [0; 2048];
    while !head.windows(4).any(|window| window == b"\r\n\r\n") {
        let count = stream.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
        head.extend_from_slice(&buffer[..count]);
        if head.len() > MAX_HEAD {
            return None;
        }
    }
    String::from_utf8(head).ok()
}

/// The parameters of `GET /callback` under exactly our address; a page elsewhere that made its name point here
/// (DNS rebinding) sends another `Host`.
fn parse_hit(head: &str, port: u16) -> Option<Parameters> {
    let mut lines = head.split("\r\n");
    let target = lines.next()?.strip_prefix("GET ")?.strip_suffix(" HTTP/1.1")?;
    let ours = format!("127.0.0.1:{port}");
    let host = lines.filter_map(|line| line.split_once(':')).find(|(name, _)| name.eq_ignore_ascii_case("host"));
    if host.is_none_or(|(_, value)| value.trim() != ours) {
        return None;
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    if path != PATH {
        return None;
    }
    let mut parameters = Parameters::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        parameters.entry(name.into_owned()).or_insert_with(|| value.into_owned());
    }
    Some(parameters)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_callback_is_a_hit() {
        let head = |target: &str, host: &str| format!("GET {target} HTTP/1.1\r\nAccept: */*\r\nHost: {host}\r\n\r\n");
        let hit = parse_hit(&head("/callback?a=1&b=%20x&a=2", "127.0.0.1:8765"), 8765).expect("a hit");
        assert_eq!((hit["a"].as_str(), hit["b"].as_str()), ("1", " x"));
        assert!(parse_hit(&head("/callback", "127.0.0.1:8765"), 8765).expect("a hit").is_empty());
        for (target, host) in [
            ("/callback/", "127.0.0.1:8765"),
            ("/callbackx?a=1", "127.0.0.1:8765"),
            ("/favicon.ico", "127.0.0.1:8765"),
            ("/callback", "localhost:8765"),
            ("/callback", "evil.example:8765"),
            ("/callback", "127.0.0.1"),
        ] {
            assert!(parse_hit(&head(target, host), 8765).is_none(), "{target} {host}");
        }
        assert!(parse_hit("POST /callback HTTP/1.1\r\nHost: 127.0.0.1:8765\r\n\r\n", 8765).is_none());
        assert!(parse_hit("GET /callback HTTP/1.1\r\n\r\n", 8765).is_none());
    }
}
