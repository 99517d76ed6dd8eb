//! The health probe of deploys: the same client code that forwards requests asks an instance directly.

use crate::{
    body::RequestBody,
    config::Upstream,
    upstream::{self, ConnectError, SendError},
};
use bytes::{Bytes, BytesMut};
use http::{
    HeaderValue, Request, Uri,
    header::{CONNECTION, HOST, USER_AGENT},
};
use http_body_util::BodyExt;
use std::{sync::Arc, time::Duration};
use systemprompt_contract::Hostname;

/// What an instance answered. An open port alone is never an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeAnswer {
    /// The HTTP status.
    pub status: u16,
    /// The body, cut to 64 KiB.
    pub body: Bytes,
}

/// Why an instance gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nothing accepts connections there yet.
    #[error("no connection to {upstream}")]
    Connect {
        /// Who was asked.
        upstream: Upstream,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It accepted the connection and did not speak HTTP/1.1.
    #[error("{upstream} did not answer in HTTP/1.1")]
    Protocol {
        /// Who was asked.
        upstream: Upstream,
        /// What the client said.
        #[source]
        source: hyper::Error,
    },
    /// The path cannot be asked for.
    #[error("expected a path such as /api/v1/health, got {0:?}")]
    Path(String),
    /// No whole answer in time.
    #[error("{upstream} did not answer within {} ms", timeout.as_millis())]
    Timeout {
        /// Who was asked.
        upstream: Upstream,
        /// How long it had.
        timeout: Duration,
    },
}

/// Asks `GET path` as `host` on a fresh connection and reads the answer (64 KiB of the body at most).
///
/// Cancel-safe: dropping the future closes the connection. Sends nothing but the one request.
///
/// # Errors
/// When there is no connection, no HTTP answer, or not the whole within `timeout`.
pub async fn probe(
    upstream: &Upstream,
    host: &Hostname,
    path: &str,
    timeout: Duration,
) -> Result<ProbeAnswer, ProbeError> {
    let late = || ProbeError::Timeout { upstream: upstream.clone(), timeout };
    tokio::time::timeout(timeout, ask(upstream, host, path, late)).await.map_err(|_| late())?
}

async fn ask(
    upstream: &Upstream,
    host: &Hostname,
    path: &str,
    late: impl Fn() -> ProbeError,
) -> Result<ProbeAnswer, ProbeError> {
    let uri: Uri = path.parse().map_err(|_| ProbeError::Path(path.to_owned()))?;
    if !path.starts_with('/') || uri.path_and_query().is_none() {
        return Err(ProbeError::Path(path.to_owned()));
    }
    let protocol = |source| ProbeError::Protocol { upstream: upstream.clone(), source };
    let mut link = upstream::connect(upstream, &Arc::default()).await.map_err(|error| match error {
        ConnectError::Io(source) => ProbeError::Connect { upstream: upstream.clone(), source },
        ConnectError::Http(source) => protocol(source),
    })?;
    let mut request = Request::new(RequestBody::none());
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    let host = HeaderValue::from_str(host.as_str()).expect("a host name is made of letters, digits, hyphens and dots");
    headers.insert(HOST, host);
    headers.insert(USER_AGENT, HeaderValue::from_static("systemprompt-probe"));
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    link.detach();
    let response = link.send(request, None).await.map_err(|error| match error {
        SendError::Http(error) => protocol(error.into_error()),
        SendError::Late => late(),
    })?;
    let status = response.status().as_u16();
    let mut incoming = response.into_body();
    let mut body = BytesMut::new();
    while body.len() < BODY_BYTES {
        let Some(frame) = incoming.frame().await else { break };
        if let Ok(data) = frame.map_err(protocol)?.into_data() {
            body.extend_from_slice(&data[..data.len().min(BODY_BYTES - body.len())]);
        }
    }
    Ok(ProbeAnswer { status, body: body.freeze() })
}

/// What is read of an answer's body.
const BODY_BYTES: usize = 64 * 1024;
