//! What a tenant can reach: no listener of this machine, and no database but its own.

use anyhow::{Context as _, ensure};
use e2e::{Stack, TestApp, World};
use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::{
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener, UnixStream},
    },
    process::Command,
    time::Duration,
};
use systemprompt_contract::TenantId;
use tokio::net::UdpSocket;

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_reaches_no_other_listener_of_the_machine() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let victim = stack.provision("victim").await?;
    TestApp { behaviour: "healthy", text: "victim" }.release(&stack, &victim).await?;
    let attacker = stack.provision("attacker").await?;
    TestApp { behaviour: "dial", text: "attacker" }.release(&stack, &attacker).await?;
    World::look(&stack).await?.check(&[victim.id, attacker.id], &[victim.id, attacker.id])?;

    let own = "127.0.0.1:8080";
    let some = SomeOfEach::listen().await?;
    let mut targets = targets(&stack)?;
    for one in some.check_from_host().await? {
        ensure!(targets.contains(&one), "{one} is tried: {targets:?}");
    }
    ensure!(targets.contains(&address_of(&stack, victim.id).await?), "the victim's app is tried: {targets:?}");
    targets.remove(&address_of(&stack, attacker.id).await?);
    let mut reached = BTreeSet::new();
    for chunk in targets.into_iter().collect::<Vec<_>>().chunks(20) {
        let (status, answer) = stack.get(&attacker, &format!("/dial?{}", chunk.join(","))).await?;
        ensure!(status == 200, "{status} {answer}");
        reached.extend(answer.split(',').filter(|target| !target.is_empty()).map(str::to_owned));
    }
    ensure!(reached.is_empty(), "reached from inside a tenant: {reached:?}");
    some.check_silence()?;
    // The probe itself works: it finds its own listener.
    let (_, answer) = stack.get(&attacker, &format!("/dial?{own}")).await?;
    ensure!(answer == own, "{answer:?}");
    Ok(())
}

/// As the tenants' cluster itself sees it, beside the `pg_hba.conf` that refuses already.
#[tokio::test(flavor = "multi_thread")]
async fn a_tenants_role_may_nothing_but_use_its_own_database() -> anyhow::Result<()> {
    let stack = Stack::start().await?;
    let tenants = [stack.provision("one").await?, stack.provision("two").await?];
    let mut cluster = e2e::connect(&stack, "tenants", "postgres").await?;
    let roles: Vec<(String, i32, bool, bool)> = sqlx::query_as(
        "SELECT rolname::text, rolconnlimit, rolpassword LIKE 'SCRAM-SHA-256$%', rolcanlogin AND NOT
                (rolsuper OR rolcreatedb OR rolcreaterole OR rolreplication OR rolbypassrls OR rolinherit)
         FROM pg_authid WHERE rolname LIKE 'sp\\_%' ORDER BY rolname",
    )
    .fetch_all(&mut cluster)
    .await?;
    let mut names = tenants.each_ref().map(|tenant| tenant.id.slug().database().to_string());
    names.sort();
    ensure!(roles == names.each_ref().map(|name| (name.clone(), 20, true, true)), "{roles:?}");
    let members: i64 = sqlx::query_scalar(
        "SELECT count(*) FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member WHERE rolname LIKE 'sp\\_%'",
    )
    .fetch_one(&mut cluster)
    .await?;
    ensure!(members == 0, "a tenant's role is a member of others");
    let open: Vec<String> = sqlx::query_scalar(
        "SELECT datname::text FROM pg_database WHERE has_database_privilege('public', oid, 'CONNECT, CREATE, TEMPORARY')",
    )
    .fetch_all(&mut cluster)
    .await?;
    ensure!(open.is_empty(), "open to everybody: {open:?}");
    for name in &names {
        let owner: String =
            sqlx::query_scalar("SELECT pg_get_userbyid(datdba)::text FROM pg_database WHERE datname = $1")
                .bind(name)
                .fetch_one(&mut cluster)
                .await?;
        let mut inside = e2e::connect(&stack, "tenants", name).await?;
        let schema: (String, bool) = sqlx::query_as(
            "SELECT pg_get_userbyid(nspowner)::text, has_schema_privilege('public', oid, 'USAGE, CREATE')
             FROM pg_namespace WHERE nspname = 'public'",
        )
        .fetch_one(&mut inside)
        .await?;
        ensure!((&owner, &schema) == (name, &(name.clone(), false)), "{name}: {owner} {schema:?}");
    }
    Ok(())
}

/// Where the edge reaches a tenant's app.
async fn address_of(stack: &Stack, tenant: TenantId) -> anyhow::Result<String> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    let query = "SELECT jsonb_path_query_first(target, '$.**.tcp') #>> '{}' FROM routes WHERE tenant_id = $1";
    let address: Option<String> = sqlx::query_scalar(query).bind(tenant.uuid()).fetch_one(&mut control).await?;
    address.context("the route names an address")
}

/// Listeners of each kind, so that there is one whatever else the machine has; all of them answer.
struct SomeOfEach {
    four: TcpListener,
    six: TcpListener,
    datagrams: [UdpSocket; 2],
    name: String,
    local: SocketAddr,
    _local: UnixListener,
}

impl SomeOfEach {
    async fn listen() -> anyhow::Result<Self> {
        let name = format!("systemprompt-e2e-{}", std::process::id());
        let local = SocketAddr::from_abstract_name(&name)?;
        Ok(Self {
            four: TcpListener::bind("0.0.0.0:0")?,
            six: TcpListener::bind("[::1]:0")?,
            datagrams: [UdpSocket::bind("0.0.0.0:0").await?, UdpSocket::bind("[::1]:0").await?],
            name,
            _local: UnixListener::bind_addr(&local)?,
            local,
        })
    }

    /// Dials each from outside of any tenant, and says what a tenant would call it.
    async fn check_from_host(&self) -> anyhow::Result<Vec<String>> {
        let mut targets = vec![format!("unix:@{}", self.name)];
        UnixStream::connect_addr(&self.local)?;
        for (listener, host) in [(&self.four, "127.0.0.1"), (&self.six, "[::1]")] {
            let target = format!("{host}:{}", listener.local_addr()?.port());
            TcpStream::connect(&target)?;
            targets.push(target);
        }
        for (socket, host) in self.datagrams.iter().zip(["127.0.0.1", "[::1]"]) {
            let target = format!("{host}:{}", socket.local_addr()?.port());
            let client = UdpSocket::bind(format!("{host}:0")).await?;
            client.send_to(b"host", &target).await?;
            self.received(b"host").await.with_context(|| format!("a datagram to {target}"))?;
            targets.push(format!("udp:{target}"));
        }
        Ok(targets)
    }

    async fn received(&self, expected: &[u8]) -> anyhow::Result<()> {
        let (mut one, mut two) = ([0; 64], [0; 64]);
        let [first, second] = &self.datagrams;
        let received = tokio::time::timeout(Duration::from_secs(5), async {
            tokio::select! {
                count = first.recv(&mut one) => count.map(|count| one[..count].to_vec()),
                count = second.recv(&mut two) => count.map(|count| two[..count].to_vec()),
            }
        });
        let received = received.await.context("nothing came")??;
        ensure!(received == expected, "expected {expected:?}, got {received:?}");
        Ok(())
    }

    /// Nothing but what the host sent has ever arrived.
    fn check_silence(&self) -> anyhow::Result<()> {
        for socket in &self.datagrams {
            let mut text = [0; 64];
            let arrived = socket.try_recv(&mut text);
            ensure!(arrived.is_err(), "a datagram from inside a tenant: {text:?}");
        }
        Ok(())
    }
}

/// Every listening port of the machine, TCP and UDP, on every address of it and on every tenant's, and unix sockets.
fn targets(stack: &Stack) -> anyhow::Result<BTreeSet<String>> {
    let addresses = Command::new("ip").args(["-o", "addr"]).output()?;
    let addresses = String::from_utf8(addresses.stdout)?;
    let addresses: BTreeSet<&str> =
        addresses.lines().filter_map(|line| line.split_whitespace().nth(3)?.split('/').next()).collect();
    let (six, four): (BTreeSet<_>, BTreeSet<_>) = addresses.into_iter().partition(|address| address.contains(':'));
    let neighbours: Vec<_> = four.iter().filter_map(|address| neighbour(address)).collect();
    // Link-local addresses mean nothing without a link; every listener there listens elsewhere too.
    let six = six.into_iter().filter(|address| !address.starts_with("fe80")).map(|address| format!("[{address}]"));
    let four = four.into_iter().map(str::to_owned).chain(neighbours);
    let addresses: BTreeSet<String> = four.chain(six).collect();
    let mut ports = listening("tcp")?;
    ports.extend([stack.https_port(), 8080]);
    let datagrams = listening("udp")?;
    let mut targets = BTreeSet::new();
    for address in &addresses {
        // Loopback inside the tenant is its own: everything but its own port.
        let own = |port: u16| port == 8080 && address == "127.0.0.1";
        targets.extend(ports.iter().filter(|port| !own(**port)).map(|port| format!("{address}:{port}")));
        targets.extend(datagrams.iter().map(|port| format!("udp:{address}:{port}")));
    }
    let sockets = fs::read_to_string("/proc/net/unix")?;
    targets.extend(
        sockets
            .lines()
            .filter_map(|line| line.split_whitespace().nth(7))
            // A comma or a sign of URLs would be taken apart on the way.
            .filter(|path| path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/@.-_".contains(&byte)))
            .map(|path| format!("unix:{path}")),
    );
    Ok(targets)
}

/// Ports that are listened on, both families: in the state `LISTEN`, or open for datagrams of anybody.
fn listening(protocol: &str) -> anyhow::Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for table in [format!("/proc/net/{protocol}"), format!("/proc/net/{protocol}6")] {
        let port = |line: &str| {
            let fields: Vec<_> = line.split_whitespace().collect();
            let open = *fields.get(3)? == if protocol == "tcp" { "0A" } else { "07" };
            open.then(|| u16::from_str_radix(fields[1].rsplit(':').next()?, 16).ok()).flatten()
        };
        ports.extend(fs::read_to_string(table)?.lines().filter_map(port));
    }
    Ok(ports)
}

/// The other end of a point-to-point link: a neighbour's own address. The attacker's own is filtered by being itself.
fn neighbour(address: &str) -> Option<String> {
    let address: Ipv4Addr = address.parse().ok()?;
    (address.octets()[0] == 10).then(|| Ipv4Addr::from(u32::from(address) ^ 3).to_string())
}
