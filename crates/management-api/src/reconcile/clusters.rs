//! Both database clusters run: one whose server is gone is started again, as at the start of this process.

use crate::{config::Layout, installation::Clusters};
use std::time::Duration;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

const PASS: Duration = Duration::from_secs(3);

/// Runs passes until `stop`. A start that is under way then comes to its end: whoever stops the clusters afterwards
/// must find what there is to stop.
pub(crate) async fn run(clusters: Clusters, layout: Layout, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(PASS);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        if clusters.control.is_alive().await && clusters.tenants.is_alive().await {
            continue;
        }
        tracing::warn!("a database cluster does not answer; starting it again");
        // Adopts the one that runs.
        if let Err(half) = Clusters::start(&layout).await {
            tracing::error!(
                error = format!("{:#}", half.error),
                "a database cluster could not be started; trying again"
            );
        }
    }
}
