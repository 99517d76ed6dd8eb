//! Ports that are taken, and those that are free.

use crate::harness::*;
use std::{net::TcpListener, sync::Arc};
use systemprompt_edge::{BindError, CertTable, Edge, EdgeConfig, RouteTable};
use tokio::sync::watch;

async fn bind(config: EdgeConfig) -> Result<systemprompt_edge::BoundEdge, BindError> {
    let (_, routes) = watch::channel(Arc::new(RouteTable::new()));
    let (_, certs) = watch::channel(Arc::new(CertTable::new(certificates()).expect("certificates")));
    Edge::new(config, routes, certs).bind().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_names_the_address_the_holder_and_the_option() {
    let holder = TcpListener::bind("127.0.0.1:0").expect("bind");
    let taken = holder.local_addr().expect("address");
    let own = format!("(pid {})", std::process::id());
    for (option, https) in [("--https PORT", true), ("--http PORT", false)] {
        let mut config = config(&nobody());
        *(if https { &mut config.https } else { &mut config.http }) = vec![taken];
        let message = bind(config).await.err().expect("taken").to_string();
        for part in [&taken.to_string(), option, &own] {
            assert!(message.contains(part), "{part} in: {message}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_edges_do_not_share_a_port() {
    let first = bind(config(&nobody())).await.expect("bind");
    let mut second = config(&nobody());
    second.https = vec![first.https_addr()];
    assert!(matches!(bind(second).await, Err(BindError::Listen { .. })));
    let address = first.https_addr();
    drop(first);
    let mut third = config(&nobody());
    third.https = vec![address];
    assert_eq!(bind(third).await.expect("free again").https_addr(), address);
}

#[tokio::test(flavor = "multi_thread")]
async fn both_families_can_be_listened_on() {
    let mut both = config(&nobody());
    both.https = vec!["127.0.0.1:0".parse().expect("v4")];
    let bound = bind(both).await.expect("bind");
    let port = bound.https_addr().port();
    drop(bound);
    let mut both = config(&nobody());
    both.https = vec![([127, 0, 0, 1], port).into(), (std::net::Ipv6Addr::LOCALHOST, port).into()];
    match bind(both).await {
        Ok(bound) => assert_eq!(bound.https_addr().port(), port),
        // A machine without IPv6.
        Err(error) => assert!(error.to_string().contains("[::1]"), "{error}"),
    }
}
