//! Buying a tenant. A checkout waits until it is confirmed; a confirmation comes as a signed event into the inbox,
//! which takes it once and enqueues the provision in the same transaction.
//!
//! Provider `manual`: the operator confirms, and we sign the event ourselves. A payment provider will be another
//! [`inbox::Source`] with its own keys and its own event bodies; everything behind the inbox stays as it is.

mod checkouts;
mod handlers;
pub(crate) mod inbox;
mod signature;

#[cfg(test)]
mod tests;

pub(crate) use checkouts::buyer;

use crate::{
    app::{App, Site},
    http::{Access, Endpoints},
};
use axum::{extract::FromRef, routing::MethodFilter as M};
use inbox::Inbox;
use systemprompt_contract::Plan;
use systemprompt_workflow::Db;

/// What the handlers of this module need, and nothing else of the application.
#[derive(Clone)]
pub(crate) struct Billing {
    db: Db,
    site: Site,
    plans: Vec<Plan>,
    inbox: Inbox,
}

impl FromRef<App> for Billing {
    fn from_ref(app: &App) -> Self {
        Self {
            db: app.db.clone(),
            site: app.site.clone(),
            plans: app.plans.clone(),
            inbox: Inbox::new(app.db.clone(), &app.seal),
        }
    }
}

pub(crate) fn endpoints(endpoints: Endpoints) -> Endpoints {
    endpoints
        .add(M::GET, "/api/v1/checkout/plans", Access::SignedIn, handlers::plans)
        .add(M::POST, "/api/v1/checkout", Access::SignedIn, handlers::create)
        .add(M::GET, "/api/v1/checkout/{id}", Access::Checkout, handlers::show)
        .add(M::POST, "/api/v1/checkout/{id}/confirm", Access::Checkout, handlers::confirm)
        .add(M::GET, "/checkout/{id}", Access::Public, handlers::page)
        .add(M::POST, "/webhooks/manual", Access::Public, handlers::webhook)
}

/// What can be bought where nothing else is configured.
pub(crate) fn default_plans() -> Vec<Plan> {
    vec![Plan {
        id: "standard".to_owned(),
        name: "Standard".to_owned(),
        paddle_price_id: "pri_standard".to_owned(),
        memory_mb_default: 512,
        volume_gb: 1,
        max_tenants: None,
    }]
}
