//! From "wants to buy" to a tenant that waits for its first deploy.

use crate::{
    callback::{CallbackListener, Page, Parameters, Verdict},
    client::{CloudApiClient, EventStream},
    error::CloudError,
};
use std::{error::Error, time::Duration};
use systemprompt_contract::{
    CheckoutCreated, CheckoutId, CheckoutRequest, Event, ProvisioningEvent, ProvisioningEventType, RequestId, TenantId,
    token,
};

const PORT: u16 = 8766;

/// What happens while a checkout is waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CheckoutProgress {
    /// It exists: open its page, or have the operator confirm it.
    Created(CheckoutCreated),
    /// It was confirmed: this tenant will be. Comes once, before anything else about the tenant.
    Tenant {
        /// Its id.
        id: TenantId,
        /// Its name.
        name: String,
    },
    /// Another thing is done.
    Event(ProvisioningEvent),
}

/// A tenant whose infrastructure stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckoutOutcome {
    /// The checkout.
    pub checkout: CheckoutId,
    /// Its tenant.
    pub tenant: TenantId,
    /// Its name.
    pub name: String,
    /// Whether a deploy must follow.
    pub needs_deploy: bool,
}

/// Why a checkout did not lead to a tenant.
#[derive(Debug, thiserror::Error)]
pub enum CheckoutError {
    /// A call failed.
    #[error(transparent)]
    Cloud(#[from] CloudError),
    /// The payment page said no.
    #[error("the checkout was not completed: {reason}")]
    Declined {
        /// In the page's words.
        reason: String,
    },
    /// Phase 1 failed and was undone.
    #[error("the tenant could not be provisioned: {reason}")]
    Failed {
        /// In the server's words.
        reason: String,
    },
    /// It takes longer than the caller wants to wait; it goes on by itself.
    #[error("the checkout {checkout} is not through yet after {} seconds", within.as_secs())]
    NotYet {
        /// The checkout.
        checkout: CheckoutId,
        /// How long it was given.
        within: Duration,
    },
    /// The caller could not keep what it learned.
    #[error(transparent)]
    Sink(Box<dyn Error + Send + Sync>),
}

impl CheckoutError {
    /// For programs, lower snake case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Cloud(error) => error.code(),
            Self::Declined { .. } => "checkout_declined",
            Self::Failed { .. } => "provisioning_failed",
            Self::NotYet { .. } => "checkout_pending",
            Self::Sink(_) => "file",
        }
    }

    /// Finds the call that failed in the log of the cloud.
    pub fn request_id(&self) -> Option<RequestId> {
        match self {
            Self::Cloud(error) => error.request_id(),
            Self::Declined { .. } | Self::Failed { .. } | Self::NotYet { .. } | Self::Sink(_) => None,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Cloud(error) => error.hint(),
            Self::NotYet { checkout, .. } => Some(format!("Go on waiting: {}", resume_command(*checkout))),
            Self::Declined { .. } => Some("Start again: systemprompt cloud tenant create".to_owned()),
            Self::Failed { .. } => {
                Some("Nothing is left of it; start again: systemprompt cloud tenant create".to_owned())
            }
            Self::Sink(_) => None,
        }
    }
}

/// The command that waits for a checkout that was started before.
pub fn resume_command(checkout: CheckoutId) -> String {
    format!("systemprompt cloud tenant create --checkout {checkout}")
}

/// What a caller does with progress; an error ends the wait, not the checkout.
pub type CheckoutSink<'a> = dyn FnMut(CheckoutProgress) -> Result<(), Box<dyn Error + Send + Sync>> + Send + 'a;

/// Starts a checkout, lets the payment page return to loopback, and waits until the infrastructure stands.
///
/// The event stream decides; the browser's return only ends it when the page says no. Cancelling leaves the checkout
/// as it is: [`follow_checkout`] goes on with it.
///
/// # Errors
/// [`CheckoutError`].
pub async fn run_checkout_callback_flow(
    client: &CloudApiClient,
    mut request: CheckoutRequest,
    within: Duration,
    sink: &mut CheckoutSink<'_>,
) -> Result<CheckoutOutcome, CheckoutError> {
    // Without a port for the return the page simply ends in the browser.
    let listener = CallbackListener::bind(PORT).await.ok();
    request.redirect_uri = listener.as_ref().map(CallbackListener::redirect_uri);
    let created = client.create_checkout(&request, &token::random_text()).await?;
    let id = created.checkout_session_id;
    sink(CheckoutProgress::Created(created)).map_err(CheckoutError::Sink)?;
    let declined = async {
        let Some(listener) = listener else { return std::future::pending().await };
        match listener.wait(within, |parameters| judge(parameters, id)).await {
            Ok(Some(reason)) => reason,
            Ok(None) | Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        outcome = follow_checkout(client, id, within, sink) => outcome,
        reason = declined => Err(CheckoutError::Declined { reason }),
    }
}

/// Waits for a checkout that exists until its tenant's infrastructure stands, with everything that happened before.
///
/// # Errors
/// [`CheckoutError`]; [`CheckoutError::NotYet`] after `within`.
pub async fn follow_checkout(
    client: &CloudApiClient,
    checkout: CheckoutId,
    within: Duration,
    sink: &mut CheckoutSink<'_>,
) -> Result<CheckoutOutcome, CheckoutError> {
    // A stream waits for a cloud that is away; whoever asks for the first time should learn it at once.
    client.checkout(checkout).await?;
    let events = client.checkout_events(checkout);
    let wait = wait_for_infrastructure(events, checkout, sink);
    tokio::time::timeout(within, wait).await.unwrap_or(Err(CheckoutError::NotYet { checkout, within }))
}

async fn wait_for_infrastructure(
    mut events: EventStream,
    checkout: CheckoutId,
    sink: &mut CheckoutSink<'_>,
) -> Result<CheckoutOutcome, CheckoutError> {
    let mut known = false;
    loop {
        let (_, Event::Provisioning(event)) = events.next().await? else { continue };
        if !std::mem::replace(&mut known, true) {
            let tenant = CheckoutProgress::Tenant { id: event.tenant_id, name: event.tenant_name.clone() };
            sink(tenant).map_err(CheckoutError::Sink)?;
        }
        let step = step(checkout, &event);
        sink(CheckoutProgress::Event(event)).map_err(CheckoutError::Sink)?;
        if let Some(outcome) = step {
            return outcome;
        }
    }
}

/// What an event on the checkout's stream means for who waits.
fn step(checkout: CheckoutId, event: &ProvisioningEvent) -> Option<Result<CheckoutOutcome, CheckoutError>> {
    let ready = |needs_deploy| {
        let (tenant, name) = (event.tenant_id, event.tenant_name.clone());
        Some(Ok(CheckoutOutcome { checkout, tenant, name, needs_deploy }))
    };
    match event.event_type {
        ProvisioningEventType::InfrastructureReady => ready(true),
        ProvisioningEventType::TenantReady => ready(false),
        ProvisioningEventType::ProvisioningFailed => {
            let reason = event.message.clone().unwrap_or_else(|| "the server did not say why".to_owned());
            Some(Err(CheckoutError::Failed { reason }))
        }
        _ => None,
    }
}

/// Only this checkout's return counts; a reason when it was declined.
fn judge(parameters: &Parameters, checkout: CheckoutId) -> Verdict<Option<String>> {
    let ours = parameters.get("checkout_session_id").is_some_and(|id| *id == checkout.to_string());
    match parameters.get("error") {
        _ if !ours => Verdict::Refuse(NOT_OURS),
        Some(error) => Verdict::Take(Some(error.clone()), DECLINED),
        None => Verdict::Take(None, RECEIVED),
    }
}

const RECEIVED: Page = Page { title: "Thank you", text: "Your tenant is being set up. Return to the terminal." };
const DECLINED: Page = Page { title: "Not completed", text: "The checkout was not completed. Return to the terminal." };
const NOT_OURS: Page = Page { title: "Not from this terminal", text: "The terminal waits for another checkout." };

#[cfg(test)]
mod tests {
    use super::{ProvisioningEventType as T, *};

    #[test]
    fn the_words_that_end_the_wait() {
        let event = |event_type| ProvisioningEvent {
            checkout_session_id: None,
            tenant_id: TenantId::new(),
            tenant_name: "n".to_owned(),
            event_type,
            status: "provisioning".to_owned(),
            message: Some("m".to_owned()),
            app_url: None,
            fly_app_name: None,
        };
        let id = CheckoutId::new();
        assert!(step(id, &event(T::InfrastructureReady)).expect("ends").expect("well").needs_deploy);
        assert!(!step(id, &event(T::TenantReady)).expect("ends").expect("well").needs_deploy);
        let failed = step(id, &event(T::ProvisioningFailed)).expect("ends").expect_err("failed");
        assert_eq!(failed.to_string(), "the tenant could not be provisioned: m");
        for on in [T::SubscriptionCreated, T::TenantCreated, T::DatabaseCreated, T::SecretsStored, T::VmProvisioned] {
            assert!(step(id, &event(on)).is_none());
        }
    }

    #[test]
    fn another_checkouts_return_is_refused() {
        let id = CheckoutId::new();
        let hit = |pairs: &[(&str, String)]| {
            judge(&pairs.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect(), id)
        };
        assert!(matches!(hit(&[("checkout_session_id", id.to_string())]), Verdict::Take(None, _)));
        let no = [("checkout_session_id", id.to_string()), ("error", "declined".to_owned())];
        assert!(matches!(hit(&no), Verdict::Take(Some(_), _)));
        assert!(matches!(hit(&[("error", "declined".to_owned())]), Verdict::Refuse(_)));
        assert!(matches!(hit(&[("checkout_session_id", CheckoutId::new().to_string())]), Verdict::Refuse(_)));
    }
}
