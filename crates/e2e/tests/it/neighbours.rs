//! What a tenant can reach from inside: its own database and the outside, and no listener of this machine.

use anyhow::{Context as _, ensure};
use e2e::{Stack, TestApp, World};
use std::{collections::BTreeSet, fs, net::Ipv4Addr, process::Command};
use systemprompt_contract::TenantId;

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_reaches_no_other_listener_of_the_machine() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let victim = stack.provision("victim").await?;
    TestApp { behaviour: "healthy", text: "victim" }.release(&stack, &victim).await?;
    let attacker = stack.provision("attacker").await?;
    TestApp { behaviour: "dial", text: "attacker" }.release(&stack, &attacker).await?;
    World::look(&stack).await?.check(&[victim.id, attacker.id], &[victim.id, attacker.id])?;

    let own = "127.0.0.1:8080";
    let mut targets = targets(&stack)?;
    ensure!(targets.contains(&address_of(&stack, victim.id).await?), "the victim's app is tried: {targets:?}");
    targets.remove(&address_of(&stack, attacker.id).await?);
    let mut reached = BTreeSet::new();
    for chunk in targets.into_iter().collect::<Vec<_>>().chunks(20) {
        let (status, answer) = stack.get(&attacker, &format!("/dial?{}", chunk.join(","))).await?;
        ensure!(status == 200, "{status} {answer}");
        reached.extend(answer.split(',').filter(|target| !target.is_empty()).map(str::to_owned));
    }
    ensure!(reached.is_empty(), "reached from inside a tenant: {reached:?}");
    // The probe itself works: it finds its own listener.
    let (_, answer) = stack.get(&attacker, &format!("/dial?{own}")).await?;
    ensure!(answer == own, "{answer:?}");
    Ok(())
}

/// Where the edge reaches a tenant's app.
async fn address_of(stack: &Stack, tenant: TenantId) -> anyhow::Result<String> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    let query = "SELECT jsonb_path_query_first(target, '$.**.tcp') #>> '{}' FROM routes WHERE tenant_id = $1";
    let address: Option<String> = sqlx::query_scalar(query).bind(tenant.uuid()).fetch_one(&mut control).await?;
    address.context("the route names an address")
}

/// Every listening TCP port of the machine on every address of it and on every tenant's, and the unix sockets.
fn targets(stack: &Stack) -> anyhow::Result<BTreeSet<String>> {
    let addresses = Command::new("ip").args(["-4", "-o", "addr"]).output()?;
    let addresses: BTreeSet<String> = String::from_utf8(addresses.stdout)?
        .lines()
        .filter_map(|line| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned()))
        .filter(|address| address != "127.0.0.1")
        .flat_map(|address| [neighbour(&address), Some(address)].into_iter().flatten().collect::<Vec<_>>())
        .collect();
    let mut ports = BTreeSet::from([stack.https_port(), 8080]);
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let listening = fs::read_to_string(table)?;
        let port = |line: &str| {
            let mut fields = line.split_whitespace();
            let local = fields.nth(1)?;
            (fields.nth(1)? == "0A").then(|| u16::from_str_radix(local.rsplit(':').next()?, 16).ok()).flatten()
        };
        ports.extend(listening.lines().filter_map(port));
    }
    let mut targets: BTreeSet<String> =
        addresses.iter().flat_map(|address| ports.iter().map(move |port| format!("{address}:{port}"))).collect();
    // Loopback inside the tenant is its own: everything but its own port.
    targets.extend(ports.iter().filter(|port| **port != 8080).map(|port| format!("127.0.0.1:{port}")));
    let sockets = fs::read_to_string("/proc/net/unix")?;
    targets.extend(
        sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(7))
            .filter(|path| path.starts_with('/'))
            .map(|path| format!("unix:{path}")),
    );
    Ok(targets)
}

/// The other end of a point-to-point link: a neighbour's own address. The attacker's own is filtered by being itself.
fn neighbour(address: &str) -> Option<String> {
    let address: Ipv4Addr = address.parse().ok()?;
    (address.octets()[0] == 10).then(|| Ipv4Addr::from(u32::from(address) ^ 3).to_string())
}
