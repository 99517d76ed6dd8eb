//! The inbox of signed events: verified, taken once, and applied in one transaction with the work it asks for.
//!
//! | delivery | answer | effect |
//! |---|---|---|
//! | forged, altered, stale, no JSON | 403 or 400 | none |
//! | fresh confirmation of an open checkout | accepted | checkout confirmed, tenant's row, provision enqueued, two events |
//! | fresh, but unknown kind or checkout, or confirmed before | accepted | the event is kept as `ignored` |
//! | seen before, in any order, however often | accepted | none |
//!
//! "Accepted" is one answer for all: a sender that repeats must not be told to repeat again.

use super::{
    checkouts,
    signature::{Signature, SignatureError},
};
use crate::{
    http::error::Failure,
    seal::Sealer,
    tenants::{
        provision::ProvisionTenant,
        store::{self, NewTenant},
    },
};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgTransaction;
use std::{sync::Arc, time::Duration};
use systemprompt_contract::{
    ApiError, CheckoutId, ErrorCode, Event, OperationId, ProvisioningEvent, ProvisioningEventType, Subject, TenantId,
    TenantStatus,
};
use systemprompt_workflow::{Db, EnqueueError, NewOperation, enqueue, events};

/// Where an event comes from; each source has keys of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The operator's confirmation, signed by ourselves.
    Manual,
}

impl Source {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Manual => "manual",
        }
    }
}

/// Verifies and takes events.
#[derive(Clone)]
pub(crate) struct Inbox {
    db: Db,
    /// The first signs, all verify.
    manual_keys: Arc<[[u8; 32]]>,
    tolerance: Duration,
}

/// Body of an event of the source `manual`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ManualEvent {
    pub(super) event_id: String,
    pub(super) kind: String,
    pub(super) checkout_id: Option<CheckoutId>,
    pub(super) occurred_at: DateTime<Utc>,
}

impl ManualEvent {
    /// The confirmation of a checkout. Its id is the checkout's, so a second one is a duplicate of the first.
    pub(super) fn confirmation(checkout: CheckoutId, occurred_at: DateTime<Utc>) -> Self {
        Self {
            event_id: format!("manual:{checkout}"),
            kind: CONFIRMED.to_owned(),
            checkout_id: Some(checkout),
            occurred_at,
        }
    }

    fn parse(body: &[u8]) -> Result<Self, InboxError> {
        let event: Self = serde_json::from_slice(body).map_err(InboxError::Body)?;
        let is_name =
            |text: &str, longest| (1..=longest).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic());
        if is_name(&event.event_id, 200) && is_name(&event.kind, 128) { Ok(event) } else { Err(InboxError::Name) }
    }

    /// What it asks for; none: we know nothing to do for it.
    fn confirms(&self) -> Option<CheckoutId> {
        self.checkout_id.filter(|_| self.kind == CONFIRMED)
    }
}

/// What became of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Receipt {
    /// The tenant to be, its provision enqueued.
    Applied(TenantId),
    /// Kept, nothing to do.
    Ignored,
    /// Taken before.
    Duplicate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "inbox_outcome", rename_all = "lowercase")]
enum Outcome {
    Applied,
    Ignored,
}

/// An event that was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InboxError {
    #[error("an event has at most {MAX_BODY_BYTES} bytes")]
    TooLarge,
    #[error(transparent)]
    Signature(#[from] SignatureError),
    #[error("the event is not what this source sends: {0}")]
    Body(serde_json::Error),
    #[error("expected an event_id of 1 to 200 and a kind of 1 to 128 visible characters")]
    Name,
    #[error("the event could not be stored")]
    Database(#[from] sqlx::Error),
    #[error("the provision could not be enqueued")]
    Enqueue(#[from] EnqueueError),
}

impl From<InboxError> for Failure {
    fn from(error: InboxError) -> Self {
        let code = match error {
            InboxError::TooLarge => ErrorCode::TooLarge,
            InboxError::Signature(_) => ErrorCode::Forbidden,
            InboxError::Body(_) | InboxError::Name => ErrorCode::BadRequest,
            InboxError::Database(error) | InboxError::Enqueue(EnqueueError::Database(error)) => return error.into(),
            InboxError::Enqueue(error) => return Self::internal(&error),
        };
        Self(ApiError::new(code, error.to_string()))
    }
}

impl Inbox {
    /// An inbox with the key for `manual` derived from the installation's.
    pub(crate) fn new(db: Db, sealer: &Sealer) -> Self {
        Self { db, manual_keys: Arc::new([sealer.derive("inbox/manual")]), tolerance: TOLERANCE }
    }

    /// The header that makes [`Inbox::receive`] believe `body`.
    pub(super) fn sign(&self, source: Source, body: &[u8], now: DateTime<Utc>) -> String {
        Signature::new(&self.keys(source)[..1], now.timestamp(), body).header()
    }

    /// Takes one delivery. Idempotent by event id: of any number of deliveries, also at once, one is applied.
    ///
    /// # Errors
    /// See [`InboxError`]; nothing was changed then. Dropping the returned future changes nothing or everything.
    pub(crate) async fn receive(
        &self,
        source: Source,
        signature: &str,
        body: &[u8],
        now: DateTime<Utc>,
    ) -> Result<Receipt, InboxError> {
        if body.len() > MAX_BODY_BYTES {
            return Err(InboxError::TooLarge);
        }
        let signature: Signature = signature.parse()?;
        signature.verify(self.keys(source), body, now.timestamp(), self.tolerance)?;
        let event = ManualEvent::parse(body)?;
        let mut tx = self.db.begin().await?;
        if !record(&mut tx, source, &event, body).await? {
            return Ok(Receipt::Duplicate);
        }
        let receipt = apply(&mut tx, &event).await?;
        tx.commit().await?;
        tracing::info!(event.id = event.event_id, event.kind = event.kind, ?receipt, "took an event");
        Ok(receipt)
    }

    fn keys(&self, source: Source) -> &[[u8; 32]] {
        match source {
            Source::Manual => &self.manual_keys,
        }
    }
}

/// Stores the event; false when it is there already. The conflicting insert waits for the other transaction: when
/// that one rolls back, ours is the first.
async fn record(
    tx: &mut PgTransaction<'_>,
    source: Source,
    event: &ManualEvent,
    body: &[u8],
) -> Result<bool, sqlx::Error> {
    // It was parsed as JSON, so it is UTF-8.
    let body = String::from_utf8_lossy(body);
    let inserted = sqlx::query!(
        "INSERT INTO inbox_events (event_id, source, kind, occurred_at, body, outcome) VALUES ($1, $2, $3, $4, $5, $6)
         ON CONFLICT (event_id) DO NOTHING",
        event.event_id,
        source.as_str(),
        event.kind,
        event.occurred_at,
        &*body,
        Outcome::Ignored as Outcome,
    )
    .execute(&mut **tx)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

async fn apply(tx: &mut PgTransaction<'_>, event: &ManualEvent) -> Result<Receipt, InboxError> {
    let Some(checkout) = event.confirms() else { return Ok(Receipt::Ignored) };
    let tenant = TenantId::new();
    let Some(order) = checkouts::confirm(tx, checkout, tenant).await? else { return Ok(Receipt::Ignored) };
    let provision = ProvisionTenant { tenant, checkout, name: order.name };
    let new = NewOperation { input: &provision, subject: Subject::Tenant(tenant), key: &event.event_id };
    let operation = enqueue(tx, new).await?.id;
    // With the id that is handed out goes the row that answers to it.
    let row = NewTenant {
        id: tenant,
        account: order.account,
        checkout,
        name: &provision.name,
        region: order.region,
        memory_mb: order.memory_mb,
        operation,
    };
    store::insert(tx, &row).await?;
    announce(tx, &provision, operation).await?;
    sqlx::query!(
        "UPDATE inbox_events SET outcome = $2 WHERE event_id = $1",
        event.event_id,
        Outcome::Applied as Outcome
    )
    .execute(&mut **tx)
    .await?;
    Ok(Receipt::Applied(tenant))
}

/// `subscription_created` on the checkout's and on the tenant's stream.
async fn announce(
    tx: &mut PgTransaction<'_>,
    provision: &ProvisionTenant,
    operation: OperationId,
) -> Result<(), sqlx::Error> {
    for (subject, checkout_session_id) in
        [(Subject::Checkout(provision.checkout), Some(provision.checkout)), (Subject::Tenant(provision.tenant), None)]
    {
        let event = Event::Provisioning(ProvisioningEvent {
            checkout_session_id,
            tenant_id: provision.tenant,
            tenant_name: provision.name.to_string(),
            event_type: ProvisioningEventType::SubscriptionCreated,
            status: TenantStatus::Provisioning.as_str().to_owned(),
            message: Some("The order is confirmed; the tenant is being made.".to_owned()),
            app_url: None,
            fly_app_name: Some(provision.tenant.slug().app_name().to_string()),
        });
        events::append(tx, subject, &event, Some(operation)).await?;
    }
    Ok(())
}

/// Header of the signature.
pub(super) const SIGNATURE_HEADER: &str = "x-systemprompt-signature";
/// A checkout was paid, or its operator says so.
pub(super) const CONFIRMED: &str = "checkout.confirmed";
/// Largest event.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;
/// How far a signature's time may lie from ours: what Paddle's own libraries allow.
const TOLERANCE: Duration = Duration::from_secs(5);
