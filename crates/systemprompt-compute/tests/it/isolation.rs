//! What a tenant can reach: its own, the internet, and nothing else.

use crate::host::{APP, Host, Running};
use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::{
        linux::net::SocketAddrExt,
        unix::{
            fs::MetadataExt,
            net::{SocketAddr as UnixAddress, UnixListener},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};
use systemprompt_compute::{
    ComputeDriver,
    process::{Bind, NetworkConfig, ProcessConfig, ProcessDriver, refuse_absent_instances},
    testing::{get, poll, running},
};

#[tokio::test(flavor = "multi_thread")]
async fn each_app_has_a_uid_of_its_own_and_no_privilege() {
    let host = Host::new();
    let driver = host.driver();
    let (a, b) = (host.run(&driver).await, host.run(&driver).await);
    let mut uids = BTreeSet::new();
    for app in [&a, &b] {
        let status = app.ask("/read?/proc/self/status").await;
        assert!(status.contains("Uid:\t10001\t10001\t10001\t10001"), "{status}");
        for none in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            assert!(status.contains(&format!("{none}:\t0000000000000000")), "{none} in {status}");
        }
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
        let outside = uid_on_host(app).await;
        assert!(outside >= 2_001_000_000, "{outside}");
        uids.insert(outside);
        let storage = fs::metadata(host.data().join("apps").join(app.app.as_str()).join("storage")).expect("storage");
        assert_eq!((storage.uid(), storage.mode() & 0o777), (outside, 0o700));
        assert!(status.contains("Seccomp:\t2"), "{status}");
        assert_eq!(app.ask("/socket?2").await, "made");
        // VSOCK leads out of the machine and knows no network namespaces; ALG and PACKET are kernel surface.
        for family in [40, 38, 17] {
            assert!(app.ask(&format!("/socket?{family}")).await.contains("os error 97"), "{family}");
        }
        assert_eq!(app.ask("/namespaces").await, "28", "no user namespaces: ENOSPC");
    }
    assert_eq!(uids.len(), 2, "never shared");
    // Given back by nobody: a later app gets another.
    driver.destroy_app(&b.app).await.expect("the app's end");
    let c = host.run(&driver).await;
    let outside = uid_on_host(&c).await;
    assert!(uids.insert(outside), "{outside} was used before");
    for app in [&a, &c] {
        driver.destroy_app(&app.app).await.expect("the app's end");
    }
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn files_and_processes_of_others_are_not_there() {
    let host = Host::new();
    let shown = host.directory.path().join("shown");
    fs::create_dir(&shown).expect("directory");
    fs::write(shown.join("file"), "shown").expect("file");
    let binds = vec![Bind { host: shown.clone(), sandbox: "/run/shown".into() }];
    let driver = ProcessDriver::open(ProcessConfig { binds, ..host.config() }).expect("a driver");
    let (a, b) = (host.run(&driver).await, host.run(&driver).await);
    assert_eq!(b.ask("/write?/app/storage/secret").await, "written");
    assert_eq!(b.ask("/write?/tmp/secret").await, "written");
    assert_eq!(b.ask("/write?/dev/shm/secret").await, "written");

    let data = host.data().display().to_string();
    let theirs = format!("{data}/apps/{}/storage/secret", b.app);
    assert!(fs::read(&theirs).is_ok(), "the file is there");
    for target in [
        format!("/read?{theirs}"),
        format!("/list?{data}"),
        "/read?/app/storage/secret".to_owned(),
        "/read?/tmp/secret".to_owned(),
        "/read?/dev/shm/secret".to_owned(),
        "/read?/etc/shadow".to_owned(),
        "/list?/root".to_owned(),
        "/list?/sys".to_owned(),
        "/list?/mnt".to_owned(),
        "/write?/app/bin/app".to_owned(),
        "/write?/evil".to_owned(),
        "/write?/dev/evil".to_owned(),
        "/write?/run/evil".to_owned(),
        "/write?/run/shown/evil".to_owned(),
        "/write?/etc/resolv.conf".to_owned(),
        "/write?/proc/sys/kernel/core_pattern".to_owned(),
        "/write?/proc/sys/net/ipv6/conf/all/disable_ipv6".to_owned(),
    ] {
        let (status, body) = get(a.address, &target).await.expect("an answer");
        assert_eq!(status, 500, "{target}: {body}");
    }
    assert_eq!(a.ask("/read?/run/shown/file").await, "shown");
    let processes = a.ask("/list?/proc").await;
    let pids: Vec<_> = processes.lines().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect();
    assert_eq!(pids.len(), 2, "init and itself: {pids:?}");
    let arguments = a.ask("/read?/proc/1/cmdline").await;
    assert!(arguments.starts_with("bwrap\0") || arguments.contains("/bwrap\0"), "{arguments:?}");
    assert!(!arguments.contains(&data) && !arguments.contains("TEST_APP"), "{arguments:?}");
    let devices = a.ask("/list?/dev").await;
    assert!(!devices.lines().any(|device| device.starts_with("vd") || device == "kmsg"), "{devices}");

    // stdin, stdout, stderr, the listener, the connection, what reads it, the directory, and the runtime's few.
    let mut allowed = 0;
    for descriptor in a.ask("/list?/proc/self/fd").await.lines() {
        let target = a.ask(&format!("/link?/proc/self/fd/{descriptor}")).await;
        let harmless = ["socket:", "anon_inode:", "/proc/", "/dev/null", "No such file"];
        let output = matches!(descriptor, "1" | "2") && target.starts_with("pipe:");
        assert!(output || harmless.iter().any(|prefix| target.starts_with(prefix)), "{descriptor} -> {target}");
        allowed += 1;
    }
    assert!(allowed > 3);
    for app in [&a, &b] {
        driver.destroy_app(&app.app).await.expect("the app's end");
    }
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_listener_of_the_host_can_be_dialled() {
    let host = Host::new();
    let driver = host.driver();
    let (a, b) = (host.run_with(&driver, 600).await, host.run(&driver).await);
    // Whatever the machine has, and some more of each kind.
    let everywhere = TcpListener::bind("0.0.0.0:0").expect("listener");
    let loopback = TcpListener::bind("127.0.0.1:0").expect("listener");
    let six = TcpListener::bind("[::]:0").expect("listener");
    let name = format!("systemprompt-test-{}", std::process::id());
    let local = UnixListener::bind_addr(&UnixAddress::from_abstract_name(&name).expect("name")).expect("listener");
    let datagrams = UdpSocket::bind("0.0.0.0:0").expect("socket");
    datagrams.set_read_timeout(Some(Duration::from_millis(200))).expect("timeout");

    let ports = listening_ports();
    for listener in [&everywhere, &loopback, &six] {
        assert!(ports.contains(&listener.local_addr().expect("address").port()), "the list is whole");
    }
    let gateway = gateway(a.address);
    let mut addresses = host_addresses();
    assert!(addresses.contains(&gateway.to_string()), "the host's end of the link");
    addresses.extend(["127.0.0.1".to_owned(), "[::1]".to_owned(), "0.0.0.0".to_owned()]);
    let mut targets = Vec::new();
    for address in &addresses {
        // Its own listener is on 8080 of every address of its own.
        let own = |port: u16| port == 8080 && ["127.0.0.1", "0.0.0.0", "[::1]"].contains(&address.as_str());
        targets.extend(ports.iter().filter(|port| !own(**port)).map(|port| format!("{address}:{port}")));
    }
    for some in targets.chunks(400) {
        let answer = a.ask(&format!("/dial?{}", some.join(","))).await;
        assert_eq!(answer.lines().count(), some.len());
        assert!(!answer.contains(" open"), "{answer}");
    }

    let names = abstract_names();
    assert!(names.contains(&name), "{names:?}");
    for name in names {
        let answer = a.ask(&format!("/dial?@{name}")).await;
        assert!(!answer.contains(" open"), "{answer}");
    }
    for address in [gateway, Ipv4Addr::LOCALHOST] {
        let port = datagrams.local_addr().expect("address").port();
        let answer = get(a.address, &format!("/resolve?{address}:{port}")).await.expect("an answer");
        assert_eq!(answer.0, 500, "{answer:?}");
    }
    assert!(datagrams.recv(&mut [0; 64]).is_err(), "no datagram arrived");

    // Nor another tenant, at its address or at its end of the link.
    let answer = a.ask(&format!("/dial?{},{}:8080", b.address, self::gateway(b.address))).await;
    assert!(!answer.contains(" open"), "{answer}");
    // The same means do reach what is its own, and the host reaches everything that the test dialled.
    assert!(a.ask("/dial?127.0.0.1:8080").await.contains(" open"));
    assert!(std::net::TcpStream::connect((gateway, everywhere.local_addr().expect("address").port())).is_ok());
    drop(local);
    for app in [&a, &b] {
        driver.destroy_app(&app.app).await.expect("the app's end");
    }
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_internet_can_be_reached_and_private_networks_cannot() {
    let host = Host::new();
    // Stand-ins in namespaces of their own: somewhere on the internet, and two machines of the operator's network.
    let internet = Elsewhere::new([11, 211], &[9000], &[]);
    let private = Elsewhere::new([10, 97], &[9000], &[]);
    let resolver = Elsewhere::new([10, 98], &[53, 9000], &[]);
    // What clouds tell about their machines, keys of the machine's role included.
    let metadata = [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(168, 63, 129, 16)];
    let cloud = Elsewhere::new([11, 212], &[80], &metadata);
    let network = NetworkConfig { resolvers: vec![resolver.address()], ..NetworkConfig::default() };
    let driver = ProcessDriver::open(ProcessConfig { network, ..host.config() }).expect("a driver");
    let app = host.run(&driver).await;
    let at = |there: &Elsewhere, port: u16| SocketAddr::from((there.address(), port));
    let (open, mut closed) =
        ([at(&internet, 9000), at(&resolver, 53), at(&cloud, 80)], vec![at(&private, 9000), at(&resolver, 9000)]);
    closed.extend(metadata.map(|address| SocketAddr::from((address, 80))));
    // The host reaches all of them: what the app does not reach is closed to it, and not just absent.
    for there in open.iter().chain(&closed) {
        poll("a stand-in", || async { get(*there, "/api/v1/health").await.is_ok() }).await;
    }
    assert_eq!(app.ask("/read?/etc/resolv.conf").await, format!("nameserver {}\n", resolver.address()));
    for there in open {
        assert!(app.ask(&format!("/dial?{there}")).await.contains(" open"), "{there}");
    }
    for there in closed {
        assert!(!app.ask(&format!("/dial?{there}")).await.contains(" open"), "{there}");
    }

    // More connections than it may have do not fill the host's table of them.
    let sent = app.ask(&format!("/spray?{}", internet.address())).await.parse::<u32>().expect("a number");
    assert!((1000..=4200).contains(&sent), "{sent}");

    // Nobody comes in the other way, though the host forwards now.
    let inwards = get(at(&internet, 9000), &format!("/dial?{}", app.address)).await.expect("an answer").1;
    assert!(!inwards.contains(" open"), "{inwards}");
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn each_line_of_the_firewall_holds_without_the_other() {
    let host = Host::new();
    let private = Elsewhere::new([10, 99], &[9000], &[]);
    let driver = host.driver();
    let a = host.run(&driver).await;
    let listener = TcpListener::bind("0.0.0.0:0").expect("listener");
    let on_host = SocketAddr::from((gateway(a.address), listener.local_addr().expect("address").port()));
    let elsewhere = SocketAddr::from((private.address(), 9000));
    poll("a stand-in", || async { get(elsewhere, "/api/v1/health").await.is_ok() }).await;
    let reached = || async {
        let answer = a.ask(&format!("/dial?{on_host},{elsewhere}")).await;
        answer.lines().filter(|line| line.ends_with(" open")).count()
    };
    assert_eq!(reached().await, 0);

    // Somebody flushes the host's rules and accepts everything before what comes next.
    let id = host.id();
    let accepting = ["INPUT", "FORWARD"].map(|chain| Accepting::new(chain, &id));
    for (table, part) in [("filter", "IN"), ("filter", "FWD"), ("mangle", "HOST")] {
        iptables(&["-t", table, "-F", &format!("SP-{id}-{part}")]);
    }
    assert_eq!(reached().await, 0, "the namespace's own rules");

    let namespaces = Command::new("ip").arg("netns").output().expect("ip");
    let namespaces = String::from_utf8_lossy(&namespaces.stdout).into_owned();
    let inside = namespaces.split_whitespace().find(|name| name.starts_with(&format!("sp-{id}-"))).expect("namespace");
    for change in [["-P", "OUTPUT", "ACCEPT"].as_slice(), &["-F", "OUTPUT"]] {
        ip(&[&["netns", "exec", inside, "iptables"], change].concat());
    }
    assert_eq!(reached().await, 2, "without both there is nothing");

    let b = host.run(&driver).await;
    assert_eq!(reached().await, 0, "the host's rules come first again");
    for app in [&a, &b] {
        driver.destroy_app(&app.app).await.expect("the app's end");
    }
    drop(accepting);
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_installations_leave_each_other_alone() {
    let (one, two) = (Host::new(), Host::new());
    let (first, second) = (one.driver(), two.driver());
    let (a, b) = (one.run(&first).await, two.run(&second).await);
    assert_ne!(a.address, b.address);
    assert!(!a.ask(&format!("/dial?{}", b.address)).await.contains(" open"));
    first.destroy_app(&a.app).await.expect("the app's end");
    one.check_nothing_left();
    // An instance that does not run keeps its address, and what is meant for it goes nowhere.
    second.stop(&b.instance, Duration::from_secs(5)).await.expect("a stop");
    let error = std::net::TcpStream::connect(b.address).expect_err("nobody is there");
    assert_eq!(error.kind(), std::io::ErrorKind::HostUnreachable, "{error}");
    let c = one.run(&first).await;
    assert_ne!(c.address, b.address, "reserved by another installation");
    second.launch(&b.app, &b.spec).await.expect("a launch");
    assert_eq!(running(&second, &b.instance).await, b.address, "the same address");
    first.destroy_app(&c.app).await.expect("the app's end");
    // Its rules are still in force without the other's.
    b.healthy().await;
    let listener = TcpListener::bind("0.0.0.0:0").expect("listener");
    let port = listener.local_addr().expect("address").port();
    assert!(!b.ask(&format!("/dial?{}:{port}", gateway(b.address))).await.contains(" open"));

    // A shutdown leaves files and takes the rest; a launch brings everything back.
    second.shutdown(Duration::from_secs(5)).await.expect("a shutdown");
    two.check_nothing_outside();
    // An edge may be up before the driver; as often as it likes.
    for _ in 0..2 {
        refuse_absent_instances(&two.data(), &NetworkConfig::default()).expect("the refusing route");
    }
    let error = std::net::TcpStream::connect(b.address).expect_err("nobody is there");
    assert_eq!(error.kind(), std::io::ErrorKind::HostUnreachable, "{error}");
    second.launch(&b.app, &b.spec).await.expect("a launch");
    assert_eq!(running(&second, &b.instance).await, b.address, "the same address");
    b.healthy().await;
    assert!(!b.ask(&format!("/dial?{}:{port}", gateway(b.address))).await.contains(" open"));
    second.destroy_app(&b.app).await.expect("the app's end");
    two.check_nothing_left();
}

/// As the kernel sees the application from outside its namespaces.
async fn uid_on_host(app: &Running) -> u32 {
    let namespace = app.ask("/link?/proc/self/ns/pid").await;
    let inside =
        |process: &PathBuf| fs::read_link(process.join("ns/pid")).is_ok_and(|link| link == Path::new(&namespace));
    let processes: Vec<_> =
        fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path()).filter(inside).collect();
    assert_eq!(processes.len(), 2, "init and the application");
    let uid = |process: &PathBuf| {
        let status = fs::read_to_string(process.join("status")).expect("status");
        let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).expect("uid").to_owned();
        let uids: BTreeSet<u32> = line.split_ascii_whitespace().map(|uid| uid.parse().expect("uid")).collect();
        assert_eq!(uids.len(), 1, "real, effective, saved and file system uid: {line}");
        uids.into_iter().next().expect("one")
    };
    let uids: BTreeSet<u32> = processes.iter().map(uid).collect();
    assert_eq!(uids.len(), 1, "{uids:?}");
    uids.into_iter().next().expect("one")
}

fn gateway(instance: SocketAddr) -> Ipv4Addr {
    match instance.ip() {
        std::net::IpAddr::V4(address) => Ipv4Addr::from(u32::from(address) - 1),
        std::net::IpAddr::V6(_) => panic!("expected IPv4"),
    }
}

/// Every TCP port that somebody on the host listens on.
fn listening_ports() -> BTreeSet<u16> {
    let mut ports = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).expect(table).lines().skip(1) {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            if fields[3] == "0A" {
                let port = fields[1].rsplit_once(':').expect("address").1;
                ports.insert(u16::from_str_radix(port, 16).expect("port"));
            }
        }
    }
    ports
}

fn abstract_names() -> BTreeSet<String> {
    let table = fs::read_to_string("/proc/net/unix").expect("table");
    let name = |line: &str| line.split_ascii_whitespace().nth(7)?.strip_prefix('@').map(str::to_owned);
    // A comma or space would be taken apart on the way.
    table
        .lines()
        .filter_map(name)
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'))
        .collect()
}

/// Every address of the host, both families.
fn host_addresses() -> BTreeSet<String> {
    let output = Command::new("ip").args(["-o", "addr"]).output().expect("ip");
    let text = String::from_utf8_lossy(&output.stdout);
    let address = |line: &str| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let address = fields[3].split('/').next()?;
        Some(if fields[2] == "inet6" { format!("[{address}]") } else { address.to_owned() })
    };
    text.lines().filter_map(address).collect()
}

/// A rule of the host's administrator before all others.
struct Accepting {
    chain: &'static str,
    links: String,
}

impl Accepting {
    fn new(chain: &'static str, id: &str) -> Self {
        let links = format!("sp{id}-+");
        iptables(&["-I", chain, "1", "-i", &links, "-j", "ACCEPT"]);
        Self { chain, links }
    }
}

impl Drop for Accepting {
    fn drop(&mut self) {
        let rule = ["-w", "-D", self.chain, "-i", &self.links, "-j", "ACCEPT"];
        let _ = Command::new("iptables").args(rule).status();
    }
}

/// A machine somewhere else, with the test application listening.
struct Elsewhere {
    name: String,
    third: u8,
    prefix: [u8; 2],
    servers: Vec<Child>,
}

impl Elsewhere {
    /// In a network of the prefix, and under the addresses `also`, as the host routes them.
    fn new(prefix: [u8; 2], ports: &[u16], also: &[Ipv4Addr]) -> Self {
        let id = std::process::id();
        let name = format!("t{id}-{}", prefix[1]);
        let mut elsewhere =
            Self { name, third: u8::try_from(id % 250).expect("below 250"), prefix, servers: Vec::new() };
        let (name, address) = (elsewhere.name.clone(), elsewhere.address());
        let name = name.as_str();
        let gateway = Ipv4Addr::from(u32::from(address) - 1);
        ip(&["netns", "add", name]);
        ip(&["link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name]);
        ip(&["addr", "add", &format!("{gateway}/24"), "dev", name]);
        ip(&["link", "set", name, "up"]);
        ip(&["-n", name, "addr", "add", &format!("{address}/24"), "dev", "eth0"]);
        ip(&["-n", name, "link", "set", "eth0", "up"]);
        ip(&["-n", name, "link", "set", "lo", "up"]);
        ip(&["-n", name, "route", "add", "default", "via", &gateway.to_string()]);
        for also in also.iter().map(ToString::to_string) {
            ip(&["-n", name, "addr", "add", &format!("{also}/32"), "dev", "lo"]);
            // The route goes with the link; another test's may be there under another metric.
            ip(&["route", "add", &also, "via", &address.to_string(), "dev", name, "metric", &id.to_string()]);
        }
        fs::write(format!("/proc/sys/net/ipv4/conf/{name}/forwarding"), "1").expect("forwarding");
        for port in ports {
            let server = Command::new("ip")
                .args(["netns", "exec", name, APP, "app"])
                .envs([("HOST", "0.0.0.0"), ("PORT", &port.to_string())])
                .stdout(Stdio::null())
                .spawn();
            elsewhere.servers.push(server.expect("a server"));
        }
        elsewhere
    }

    fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.prefix[0], self.prefix[1], self.third, 2)
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = Command::new("ip").args(["link", "del", &self.name]).status();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

fn iptables(arguments: &[&str]) {
    let output = Command::new("iptables").arg("-w").args(arguments).output().expect("iptables");
    assert!(output.status.success(), "iptables {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn ip(arguments: &[&str]) {
    let output = Command::new("ip").args(arguments).output().expect("ip");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}
