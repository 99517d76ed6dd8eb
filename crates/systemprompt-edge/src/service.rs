//! One request: find out whom it is for, then forward it or answer it.

use crate::{
    access::Record,
    answer::{Accept, Problem, answer},
    body::{BodyFailure, BodyLimits, RequestBody, ResponseBody},
    certs::Served,
    connection::Connection,
    exchange::{Activity, Exchange, ForwardError, forward},
    gate::{Refusal, Refused},
    headers::{Truth, detach, has_underscored_framing, prepare_request, prepare_response},
    pool::Claim,
    routes::{Route, Why},
    target::{Named, Target, named, target},
    tls::Sni,
    tunnel::Tunnel,
    unread::Unread,
    upload::Upload,
    worker::Worker,
};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE},
    uri::PathAndQuery,
};
use http_body::Body;
use hyper::{
    body::Incoming,
    upgrade::{self, OnUpgrade},
};
use std::{
    convert::Infallible,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};
use systemprompt_contract::{Hostname, RequestId};
use tokio::time::{Instant, timeout_at};

/// What all requests of one client connection have in common.
pub(crate) struct Client {
    worker: Arc<Worker>,
    connection: Arc<Connection>,
    address: HeaderValue,
    sni: Sni,
    served: Arc<Served>,
    /// The last `Host` and what it means: connections hardly ever change theirs.
    last: Mutex<Option<(HeaderValue, Arc<Target>)>>,
}

/// Where a request goes.
enum Decision {
    Forward(Claim, Scope),
    Hold,
    Refuse(Problem),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    Platform,
    Tenant,
}

/// A request that is about to be forwarded.
struct Forwarding {
    claim: Claim,
    scope: Scope,
    host: HeaderValue,
    id: RequestId,
    accept: Accept,
    activity: Activity,
    record: Option<Box<Record>>,
}

impl Client {
    pub(crate) fn new(
        worker: Arc<Worker>,
        connection: Arc<Connection>,
        address: IpAddr,
        sni: Sni,
        served: Arc<Served>,
    ) -> Self {
        // An IPv4 client of a dual-stack listener is still an IPv4 client.
        let address = HeaderValue::from_str(&address.to_canonical().to_string())
            .expect("an address is made of digits, letters, dots and colons");
        Self { worker, connection, address, sni, served, last: Mutex::default() }
    }

    /// Answers one request; every failure is an answer too.
    pub(crate) async fn serve(
        self: Arc<Self>,
        request: Request<Incoming>,
    ) -> Result<Response<ResponseBody>, Infallible> {
        let is_h2 = request.version() == Version::HTTP_2;
        let (head, incoming) = request.into_parts();
        let upload = Upload::new(incoming, &head);
        let mut response = self.respond(Request::from_parts(head, upload)).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            self.connection.upgraded();
        } else {
            self.connection.answered();
        }
        // hyper writes the version of the connection itself.
        *response.version_mut() = Version::HTTP_11;
        if is_h2 {
            response.body_mut().watch(Unread::current());
        }
        Ok(response)
    }

    async fn respond(&self, request: Request<Upload>) -> Response<ResponseBody> {
        let activity = Activity::begin(&self.connection);
        let id = self.worker.request_id();
        let mut record = Record::begin(id);
        let accept = Accept::header(request.headers());
        if let Some(refusal) = self.connection.refusal(Refused::Head) {
            return refuse(Problem::Refused(refusal), &accept, id, record);
        }
        let (host, target) = match self.target(&request) {
            Ok(found) => found,
            Err(problem) => return refuse(problem, &accept, id, record),
        };
        if let Some(record) = &mut record {
            record.host(&host);
        }
        match self.route(&target, record.as_deref_mut()).await {
            Ok((claim, scope)) => {
                self.forward(request, Forwarding { claim, scope, host, id, accept, activity, record }).await
            }
            Err(problem) => refuse(problem, &accept, id, record),
        }
    }

    fn target(&self, request: &Request<Upload>) -> Result<(HeaderValue, Arc<Target>), Problem> {
        let raw = match named(request.uri(), request.headers()) {
            Named::One(raw) => raw,
            Named::None => return Err(Problem::BadHost),
            Named::Several => return Err(Problem::AmbiguousHost),
        };
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((host, target)) = last.as_ref()
            && host.as_bytes() == raw
        {
            return Ok((host.clone(), Arc::clone(target)));
        }
        let host = HeaderValue::from_bytes(raw).map_err(|_| Problem::BadHost)?;
        let target = Arc::new(target(raw, &self.sni, &self.served, &self.worker.config.zone));
        *last = Some((host.clone(), Arc::clone(&target)));
        Ok((host, target))
    }

    /// Claims the upstream of a target, waiting while its tenant starts.
    async fn route(&self, target: &Target, mut record: Option<&mut Record>) -> Result<(Claim, Scope), Problem> {
        match self.decide(target, record.as_deref_mut()) {
            Decision::Forward(claim, scope) => return Ok((claim, scope)),
            Decision::Refuse(problem) => return Err(problem),
            Decision::Hold => {}
        }
        let starting = Problem::Unavailable(Why::Starting);
        let _held = self.worker.hold().ok_or(starting)?;
        let deadline = Instant::now() + self.worker.config.hold;
        let mut changes = self.worker.changes();
        loop {
            match self.decide(target, record.as_deref_mut()) {
                Decision::Forward(claim, scope) => return Ok((claim, scope)),
                Decision::Refuse(problem) => return Err(problem),
                Decision::Hold => match timeout_at(deadline, changes.changed()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) | Err(_) => return Err(starting),
                },
            }
        }
    }

    /// Looks the route up and claims its upstream, without a pause in between.
    fn decide(&self, target: &Target, record: Option<&mut Record>) -> Decision {
        let (host, named): (&Hostname, bool) = match target {
            Target::Platform => return self.platform(),
            Target::Host(host) => (host, true),
            Target::Unnamed(host) => (host, false),
            Target::Misdirected => return Decision::Refuse(Problem::Misdirected),
            Target::Bad => return Decision::Refuse(Problem::BadHost),
        };
        let routes = self.worker.routes();
        let route = routes.lookup(host);
        if let (Some(record), Some(Route::Tenant { slug, .. } | Route::Unavailable { slug, .. })) = (record, route) {
            record.slug(slug);
        }
        match route {
            Some(Route::Platform) => self.platform(),
            _ if !named => Decision::Refuse(Problem::Misdirected),
            Some(Route::Tenant { upstream, .. }) => Decision::Forward(self.worker.pool.claim(upstream), Scope::Tenant),
            Some(Route::Unavailable { why: Why::Starting, .. }) => Decision::Hold,
            Some(Route::Unavailable { why, .. }) => Decision::Refuse(Problem::Unavailable(*why)),
            None => Decision::Refuse(Problem::TenantNotFound),
        }
    }

    fn platform(&self) -> Decision {
        Decision::Forward(self.worker.pool.claim(&self.worker.config.platform), Scope::Platform)
    }

    async fn forward(&self, mut request: Request<Upload>, forwarding: Forwarding) -> Response<ResponseBody> {
        let Forwarding { claim, scope, host, id, accept, activity, record } = forwarding;
        let limits = &self.worker.config.limits;
        let is_h2 = request.version() == Version::HTTP_2;
        let Some(uri) = origin_form(request.method(), request.uri()) else {
            return refuse(Problem::BadTarget, &accept, id, record);
        };
        let cap = body_cap(scope, uri.path(), limits.body_bytes);
        if cap.is_some_and(|cap| announced(request.headers()).is_some_and(|length| length > cap)) {
            return refuse(Problem::BodyTooLarge, &accept, id, record);
        }
        if is_h2 && has_underscored_framing(request.headers()) {
            return refuse(Problem::Refused(Refusal::Underscore), &accept, id, record);
        }
        let upgrade = Upgrade::wanted(&mut request);
        let request_id = request_id_value(id);
        let (mut head, upload) = request.into_parts();
        prepare_request(&mut head.headers, &Truth { client: &self.address, host: &host, request_id: &request_id });
        if let Some(upgrade) = &upgrade {
            upgrade.write(&mut head.headers);
        }
        let (body, progress) = if upload.is_end_stream() {
            (RequestBody::none(), None)
        } else {
            let (body, progress) = RequestBody::stream(upload, BodyLimits::new(limits, cap));
            if !head.headers.contains_key(CONTENT_LENGTH) {
                // hyper would send no body with methods that seldom have one.
                head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
            (body, Some(progress))
        };
        (head.uri, head.version) = (uri, Version::HTTP_11);
        head.extensions.clear();
        let request = Request::from_parts(head, body);
        let (mut response, link) = match forward(&claim, request, progress.as_ref(), limits).await {
            Ok(answered) => answered,
            Err(error) => {
                tracing::debug!(upstream = %claim.upstream(), %error, request_id = %id, "no answer from upstream");
                let refused = self.connection.refusal(Refused::Body).map(Problem::Refused);
                return refuse(refused.unwrap_or_else(|| problem(&error, scope)), &accept, id, record);
            }
        };
        let mut record = record;
        if let Some(record) = &mut record {
            record.status(response.status().as_u16());
        }
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            let Some(upgrade) = upgrade else {
                return refuse(
                    problem(&ForwardError::Unreachable("101 unasked".to_owned()), scope),
                    &accept,
                    id,
                    record,
                );
            };
            drop(activity);
            link.leave();
            return self.switch(response, upgrade, claim, request_id, record);
        }
        prepare_response(response.headers_mut(), request_id);
        if is_h2 {
            detach(response.headers_mut());
        }
        let exchange = Exchange { claim, link, progress, activity, record };
        response.map(|incoming| ResponseBody::upstream(incoming, exchange))
    }

    /// The upstream agreed to leave HTTP: from the answer on, bytes go both ways.
    fn switch(
        &self,
        mut response: Response<Incoming>,
        upgrade: Upgrade,
        claim: Claim,
        request_id: HeaderValue,
        record: Option<Box<Record>>,
    ) -> Response<ResponseBody> {
        let protocol = response.headers().get(UPGRADE).cloned();
        let upstream = upgrade::on(&mut response);
        let mut answer = Response::new(ResponseBody::from(bytes::Bytes::new()));
        *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        prepare_response(response.headers_mut(), request_id);
        *answer.headers_mut() = std::mem::take(response.headers_mut());
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        answer.headers_mut().insert(UPGRADE, protocol.unwrap_or(upgrade.protocol));
        let tunnel = Tunnel {
            client: upgrade.client,
            upstream,
            claim,
            place: self.worker.connections.enter(),
            idle: self.worker.config.limits.tunnel_idle,
        };
        tokio::spawn(async move {
            tunnel.run().await;
            if let Some(record) = record {
                record.finish();
            }
        });
        answer
    }
}

/// A client's wish to leave HTTP on this connection (RFC 9110, 7.8).
struct Upgrade {
    protocol: HeaderValue,
    client: OnUpgrade,
}

impl Upgrade {
    /// The same rule as the framing gate's: HTTP/1.1 GET without a body, one `Upgrade` to a WebSocket, and
    /// `Connection` that lists it. What else an app would agree to could carry requests past the edge.
    fn wanted(request: &mut Request<Upload>) -> Option<Self> {
        let protocol = request.headers().get(UPGRADE)?.clone();
        let fits = request.version() == Version::HTTP_11
            && request.method() == Method::GET
            && request.headers().get_all(UPGRADE).iter().count() == 1
            && lists_upgrade(request.headers())
            && request.body().is_end_stream();
        if !fits || !protocol.as_bytes().eq_ignore_ascii_case(b"websocket") {
            return None;
        }
        Some(Self { protocol, client: upgrade::on(request) })
    }

    fn write(&self, headers: &mut HeaderMap) {
        headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
        headers.insert(UPGRADE, self.protocol.clone());
    }
}

fn lists_upgrade(headers: &HeaderMap) -> bool {
    headers
        .get_all(CONNECTION)
        .iter()
        .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
        .any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

/// The target as an upstream wants it: path and query, or `*` for OPTIONS.
fn origin_form(method: &Method, uri: &Uri) -> Option<Uri> {
    let target = uri.path_and_query()?;
    let fits = match target.as_str() {
        "*" => method == Method::OPTIONS,
        text => text.starts_with('/') && method != Method::CONNECT,
    };
    fits.then(|| if uri.authority().is_none() { uri.clone() } else { Uri::from(PathAndQuery::clone(target)) })
}

/// Image layers are as large as they are; everything else is bounded.
fn body_cap(scope: Scope, path: &str, limit: u64) -> Option<u64> {
    (scope == Scope::Tenant || !path.starts_with("/v2/")).then_some(limit)
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

fn request_id_value(id: RequestId) -> HeaderValue {
    let mut text = uuid::Uuid::encode_buffer();
    HeaderValue::from_str(id.uuid().hyphenated().encode_lower(&mut text))
        .expect("a UUID is made of digits, letters and hyphens")
}

fn problem(error: &ForwardError, scope: Scope) -> Problem {
    match (error, scope) {
        (ForwardError::Body(BodyFailure::TooLarge), _) => Problem::BodyTooLarge,
        (ForwardError::Body(BodyFailure::TooSlow | BodyFailure::Aborted), _) => Problem::BodyTooSlow,
        (ForwardError::TimedOut, Scope::Tenant) => Problem::AppTimeout,
        (ForwardError::Unreachable(_), Scope::Tenant) => Problem::AppUnreachable,
        (_, Scope::Platform) => Problem::PlatformUnreachable,
    }
}

fn refuse(problem: Problem, accept: &Accept, id: RequestId, record: Option<Box<Record>>) -> Response<ResponseBody> {
    let response = answer(problem, accept, id);
    if let Some(mut record) = record {
        record.status(response.status().as_u16());
        record.finish();
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_become_paths() {
        for (method, target, expected) in [
            (Method::GET, "/a?b", Some("/a?b")),
            (Method::GET, "https://h.example.com/a?b", Some("/a?b")),
            (Method::GET, "https://h.example.com", Some("/")),
            (Method::OPTIONS, "*", Some("*")),
            (Method::GET, "*", None),
            (Method::CONNECT, "h.example.com:443", None),
        ] {
            let uri: Uri = target.parse().expect("uri");
            let got = origin_form(&method, &uri).map(|uri| uri.to_string());
            assert_eq!(got.as_deref(), expected, "{method} {target}");
        }
    }

    #[test]
    fn only_uploads_to_the_registry_are_unbounded() {
        assert_eq!(body_cap(Scope::Platform, "/v2/x/blobs/uploads/", 5), None);
        assert_eq!(body_cap(Scope::Platform, "/api/v1/tenants", 5), Some(5));
        assert_eq!(body_cap(Scope::Tenant, "/v2/x", 5), Some(5));
    }
}
