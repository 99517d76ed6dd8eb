//! Server-sent events: the log of a tenant or a checkout, replayed and then live, resumable by `Last-Event-ID`.

use super::store::Tenant;
use crate::{app::App, http::error::Failure};
use axum::{
    Extension,
    extract::State,
    response::sse::{self, Sse},
};
use futures_util::{Stream, StreamExt as _};
use http::HeaderMap;
use std::{convert::Infallible, time::Duration};
use systemprompt_contract::{CheckoutId, ErrorCode, EventId, Subject};

/// Comments in between, so that nobody on the way takes the silence for an end.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(super) async fn tenant_events(
    State(app): State<App>,
    Extension(tenant): Extension<Tenant>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, Failure> {
    follow(&app, Subject::Tenant(tenant.id), &headers)
}

pub(super) async fn checkout_events(
    State(app): State<App>,
    Extension(checkout): Extension<CheckoutId>,
    headers: HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>>>, Failure> {
    follow(&app, Subject::Checkout(checkout), &headers)
}

fn follow(
    app: &App,
    subject: Subject,
    headers: &HeaderMap,
) -> Result<Sse<impl Stream<Item = Result<sse::Event, Infallible>> + use<>>, Failure> {
    let after = EventId(last_event_id(headers)?.map_or(Ok(0), str::parse).map_err(|_| bad_id())?);
    let events = app.hub.subscribe(subject, after).filter_map(|next| async {
        match next {
            Ok((id, event)) => {
                Some(Ok(sse::Event::default().id(id.0.to_string()).event(event.name()).data(event.data())))
            }
            Err(error) => {
                // The stream ends here; the client comes back with the last id it saw and loses nothing.
                tracing::warn!(%error, "reading the event log");
                None
            }
        }
    });
    let events = events.take_until(app.stop.clone().cancelled_owned());
    Ok(Sse::new(events).keep_alive(sse::KeepAlive::new().interval(KEEP_ALIVE)))
}

/// Where a resuming client stopped.
pub(super) fn last_event_id(headers: &HeaderMap) -> Result<Option<&str>, Failure> {
    headers.get("last-event-id").map(|value| value.to_str().map_err(|_| bad_id())).transpose()
}

fn bad_id() -> Failure {
    Failure::new(ErrorCode::BadRequest, "expected a Last-Event-ID that this stream sent before")
}
