//! What handlers and workflows share. Each part is cheap to clone and owns its own state.

use crate::{seal::Sealer, tenants::databases::TenantDatabases};
use std::{ops::Deref, path::PathBuf, sync::Arc, time::Duration};
use systemprompt_compute::ComputeDriver;
use systemprompt_contract::{Hostname, Plan, PlatformHost, TenantSlug, Zone};
use systemprompt_registry::{Registry, TokenKey};
use systemprompt_workflow::{Db, events::EventHub};
use tokio_util::sync::CancellationToken;

/// Names and addresses of this installation.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    pub(crate) zone: Zone,
    /// The HTTPS port clients use.
    pub(crate) https_port: u16,
}

impl Site {
    /// `https://{host}[:port]` without a slash at the end.
    pub(crate) fn url(&self, host: &Hostname) -> String {
        format!("https://{}", self.authority(host.as_str()))
    }
    pub(crate) fn api_url(&self) -> String {
        self.url(&self.zone.platform(PlatformHost::Api))
    }
    pub(crate) fn cloud_url(&self) -> String {
        self.url(&self.zone.platform(PlatformHost::Cloud))
    }
    pub(crate) fn app_url(&self, slug: &TenantSlug) -> String {
        self.url(&slug.hostname(&self.zone))
    }
    /// What to type to sign in here and nowhere else.
    pub(crate) fn sign_in_command(&self) -> String {
        format!("systemprompt cloud auth login --api-url {}", self.api_url())
    }
    /// `host[:port]`, the port left out where it is the scheme's own.
    pub(crate) fn authority(&self, host: &str) -> String {
        if self.https_port == 443 { host.to_owned() } else { format!("{host}:{}", self.https_port) }
    }
    /// The registry as clients may call it, first the public name.
    pub(crate) fn registry_authorities(&self) -> Vec<String> {
        let public = self.zone.platform(PlatformHost::Registry);
        [public.as_str(), "localhost", "127.0.0.1"].map(|host| self.authority(host)).to_vec()
    }
}

/// What workflow steps act upon.
#[derive(Debug, Clone)]
pub(crate) struct Infrastructure {
    pub(crate) site: Site,
    pub(crate) driver: Arc<dyn ComputeDriver>,
    pub(crate) databases: TenantDatabases,
    pub(crate) registry: Registry,
    pub(crate) seal: Arc<Sealer>,
    pub(crate) limits: DeployLimits,
}

/// How long a deploy may take where.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeployLimits {
    /// From launch to the second healthy answer.
    pub(crate) healthy_within: Duration,
    /// From SIGTERM to SIGKILL.
    pub(crate) stop_grace: Duration,
    pub(crate) max_pids: u32,
}

/// The control plane's state, shared by all handlers.
#[derive(Clone)]
pub(crate) struct App(Arc<Parts>);

pub(crate) struct Parts {
    pub(crate) db: Db,
    pub(crate) hub: EventHub,
    pub(crate) seal: Arc<Sealer>,
    pub(crate) site: Site,
    pub(crate) plans: Vec<Plan>,
    pub(crate) infrastructure: Infrastructure,
    pub(crate) registry_key: TokenKey,
    /// Where the first administrator's one-time token lies until it is used.
    pub(crate) setup_token_file: PathBuf,
    pub(crate) identity: crate::identity::Limits,
    /// Cancelled when this process drains: streams end then.
    pub(crate) stop: CancellationToken,
}

impl App {
    pub(crate) fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }
}

impl Deref for App {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}
