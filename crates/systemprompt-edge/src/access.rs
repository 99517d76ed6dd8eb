//! The access log: one line a request, under the target `access`; costs nothing while that is off.

use http::HeaderValue;
use std::time::Instant;
use systemprompt_contract::{RequestId, TenantSlug};

/// What is known about a request before its answer.
pub(crate) struct Record {
    begun: Instant,
    id: RequestId,
    host: Option<HeaderValue>,
    slug: Option<TenantSlug>,
    status: u16,
}

impl Record {
    /// A record, if anybody listens.
    pub(crate) fn begin(id: RequestId) -> Option<Box<Self>> {
        tracing::enabled!(target: "access", tracing::Level::DEBUG)
            .then(|| Box::new(Self { begun: Instant::now(), id, host: None, slug: None, status: 0 }))
    }

    pub(crate) fn host(&mut self, host: &HeaderValue) {
        self.host = Some(host.clone());
    }

    pub(crate) fn slug(&mut self, slug: &TenantSlug) {
        self.slug = Some(slug.clone());
    }

    pub(crate) fn status(&mut self, status: u16) {
        self.status = status;
    }

    /// Writes the line. A record that is dropped before writes it with status 499.
    pub(crate) fn finish(mut self) {
        self.write();
        self.status = WRITTEN;
    }

    fn write(&self) {
        let slug = self.slug.as_ref().map_or("", TenantSlug::as_str);
        let host = self.host.as_ref().and_then(|host| host.to_str().ok()).unwrap_or_default();
        let duration_ms = self.begun.elapsed().as_secs_f64() * 1000.0;
        let (status, request_id) = (self.status, self.id);
        tracing::debug!(target: "access", { tenant.slug = slug, host, status, duration_ms, %request_id }, "request");
    }
}

/// No HTTP status.
const WRITTEN: u16 = u16::MAX;
/// The client went away before the end of the answer.
const CLIENT_GONE: u16 = 499;

impl Drop for Record {
    fn drop(&mut self) {
        if self.status != WRITTEN {
            self.status = CLIENT_GONE;
            self.write();
        }
    }
}
