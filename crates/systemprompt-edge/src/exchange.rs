//! One request and its answer: what they hold while they last, and how a request reaches its upstream.

use crate::{
    access::Record,
    body::{BodyFailure, Progress, RequestBody},
    config::Limits,
    connection::Connection,
    pool::Claim,
    upstream::{self, Link, SendError},
};
use http::{Method, Request, Response, header::UPGRADE};
use hyper::body::Incoming;
use std::sync::Arc;
use tokio::time::timeout;

/// A request in flight, a handshake or a tunnel: its connection does not count as idle.
pub(crate) struct Activity(Arc<Connection>);

impl Activity {
    pub(crate) fn begin(connection: &Arc<Connection>) -> Self {
        connection.begin();
        Self(Arc::clone(connection))
    }
}

impl Drop for Activity {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// What a forwarded request holds until the last byte of its answer. Dropping it breaks the exchange
/// off: the connection to the upstream is closed, the claim ends.
pub(crate) struct Exchange {
    pub(crate) claim: Claim,
    pub(crate) link: Link,
    pub(crate) progress: Option<Arc<Progress>>,
    pub(crate) activity: Activity,
    pub(crate) record: Option<Box<Record>>,
}

impl Exchange {
    /// The answer came to its regular end. The connection is kept only when the request did too: after
    /// an early answer nobody knows what the upstream makes of the rest.
    pub(crate) fn complete(self) {
        let Self { claim, link, progress, activity, record } = self;
        if progress.is_none_or(|progress| progress.is_sent()) {
            claim.give_back(link);
        }
        drop((claim, activity));
        if let Some(record) = record {
            record.finish();
        }
    }
}

/// Why an upstream gave no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    /// No connection, or it broke before the answer's head.
    #[error("{0}")]
    Unreachable(String),
    /// No head within [`Limits::response_timeout`].
    #[error("the answer did not begin in time")]
    TimedOut,
    /// The client's own body was at fault.
    #[error("{0}")]
    Body(BodyFailure),
}

/// Sends a request and waits for the head of its answer.
///
/// A kept connection may have been closed by the upstream in this very moment. Then the request is sent
/// once more on a fresh one, but only if it never began to go out, or is harmless to repeat (RFC 9110,
/// 9.2.2), has no body, and not one byte came back.
pub(crate) async fn forward(
    claim: &Claim,
    request: Request<RequestBody>,
    progress: Option<&Arc<Progress>>,
    limits: &Limits,
) -> Result<(Response<Incoming>, Link), ForwardError> {
    let failed = |error: hyper::Error| match progress.and_then(|progress| progress.failure()) {
        Some(failure) => ForwardError::Body(failure),
        None => ForwardError::Unreachable(error.to_string()),
    };
    // A body goes up while the answer comes down, and neither may wait for the other.
    let duplex = progress.is_some() || request.headers().contains_key(UPGRADE);
    let mut request = request;
    if let Some(mut link) = ready_link(claim, limits).await {
        if duplex {
            link.detach();
        }
        let copy = (progress.is_none() && is_idempotent(request.method())).then(|| copy_head(&request));
        let mut error = match link.send(request, progress.map(Arc::as_ref)).await {
            Ok(response) => return Ok((response, link)),
            Err(SendError::Late) => return Err(ForwardError::TimedOut),
            Err(SendError::Http(error)) => error,
        };
        let again = error.take_message().or_else(|| copy.filter(|_| !link.is_answered()));
        match again {
            Some(again) => request = again,
            None => return Err(failed(error.into_error())),
        }
    }
    let mut link = connect(claim, limits).await?;
    if duplex {
        link.detach();
    }
    match link.send(request, progress.map(Arc::as_ref)).await {
        Ok(response) => Ok((response, link)),
        Err(SendError::Late) => Err(ForwardError::TimedOut),
        Err(SendError::Http(error)) => Err(failed(error.into_error())),
    }
}

async fn ready_link(claim: &Claim, limits: &Limits) -> Option<Link> {
    loop {
        let mut link = claim.take_idle()?;
        // Its last exchange is over, so it gets ready within one turn or was closed; unless the upstream has left the
        // end of a body in the socket, and then it never gets ready.
        if timeout(limits.connect_timeout, link.is_ready()).await == Ok(true) {
            return Some(link);
        }
    }
}

async fn connect(claim: &Claim, limits: &Limits) -> Result<Link, ForwardError> {
    match timeout(limits.connect_timeout, upstream::connect(claim.upstream(), claim.clock())).await {
        Ok(Ok(link)) => Ok(link),
        Ok(Err(upstream::ConnectError::Io(error))) => Err(ForwardError::Unreachable(error.to_string())),
        Ok(Err(upstream::ConnectError::Http(error))) => Err(ForwardError::Unreachable(error.to_string())),
        Err(_) => Err(ForwardError::Unreachable("connecting took too long".to_owned())),
    }
}

fn is_idempotent(method: &Method) -> bool {
    method.is_idempotent()
}

fn copy_head(request: &Request<RequestBody>) -> Request<RequestBody> {
    let mut copy = Request::new(RequestBody::none());
    copy.method_mut().clone_from(request.method());
    copy.uri_mut().clone_from(request.uri());
    copy.headers_mut().clone_from(request.headers());
    copy
}
