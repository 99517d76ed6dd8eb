//! The process driver on real parts: bubblewrap, control groups, network namespaces, iptables. As root.

mod host;
mod images;
mod isolation;
mod launching;
mod limits;
mod refusal;
mod survival;

use host::Host;
use systemprompt_compute::testing::conformance;

#[tokio::test(flavor = "multi_thread")]
async fn the_process_driver_conforms() {
    let host = Host::new();
    conformance(&|| Box::new(host.driver()), &host.fixture()).await;
    host.check_nothing_left();
}
