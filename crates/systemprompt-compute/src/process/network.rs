//! A network namespace per instance: a link to the host, a default route through it, and nothing else.
//!
//! The namespace is a named one (`ip netns`), made before the instance and entered by the launcher, so that there
//! is no instant at which an instance runs in another. It has no IPv6: the launcher switches it off inside.
//!
//! A route of the whole pool that refuses stays while the installation has apps: what is meant for an instance that
//! is gone must not leave the machine by the default route.

use super::{
    address::{Ipv4Network, Link, default_device, parse_own_addresses, parse_routes},
    command::Tool,
    firewall::{Egress, Firewall, Tools},
    machine::{Machine, forwarding_of},
    state::Reach,
};
use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// The port every instance is told to listen on in its own namespace.
pub(crate) const PORT: u16 = 8080;

/// Behind every route that leads somewhere.
const REFUSING_METRIC: u32 = 0x1000_0000;

/// Makes and removes instances' networks on this host.
#[derive(Debug)]
pub(crate) struct Networks {
    pub(crate) firewall: Firewall,
    pub(crate) ip: Tool,
    pub(crate) tools: Tools,
    /// Whether it was said once that instances do not get out.
    pub(crate) warned: AtomicBool,
}

impl Networks {
    /// Removes the network the instance had before, reserves a free one (the same, if nobody took it) for the
    /// instance in the directory `owner`, lets the caller record it, then makes it. All under a lock of the whole
    /// machine: other installations pick from the same ranges.
    ///
    /// # Errors
    /// When the pool is used up or a tool fails; half of a network may then be left, under the recorded number.
    pub(crate) fn create(
        &self,
        before: Option<u32>,
        owner: &Path,
        record: impl FnOnce(Reach) -> io::Result<()>,
    ) -> io::Result<(Reach, PathBuf)> {
        let mut machine = Machine::lock()?;
        if let Some(slot) = before {
            self.remove_network(slot)?;
        }
        let routes = fs::read_to_string("/proc/net/route")?;
        let slot = machine.reserve(self.firewall.pool, owner, before, &parse_routes(&routes))?;
        let link = self.firewall.pool.slot(slot);
        let reach = Reach::Namespace { slot, address: SocketAddr::from((link.instance(), PORT)) };
        record(reach)?;
        super::crash::point("compute.launch.recorded");
        let device = default_device(&routes);
        self.put_rules(&mut machine, device.as_deref())?;
        super::crash::point("compute.launch.firewall");
        self.remove_network(slot)?;
        self.make_network(slot, link, mtu(device.as_deref()))?;
        Ok((reach, namespace_path(&self.namespace(slot))))
    }

    /// Removes an instance's network; what is gone already is no error. The address stays reserved.
    pub(crate) fn remove(&self, slot: u32) -> io::Result<()> {
        let _machine = Machine::lock()?;
        self.remove_network(slot)
    }

    /// Enters in the machine's record what the installation's own say, and refuses what is meant for its instances
    /// until they run.
    pub(crate) fn claim(&self, slots: Vec<(u32, PathBuf)>, next_uid: Option<u32>) -> io::Result<()> {
        let links = slots.into_iter().map(|(slot, owner)| (self.firewall.pool.slot(slot), owner));
        Machine::lock()?.claim(links, next_uid)?;
        self.refusal().put(&self.ip)
    }

    /// Puts the rules in force again.
    pub(crate) fn repair_rules(&self) -> io::Result<()> {
        let mut machine = Machine::lock()?;
        self.put_rules(&mut machine, default_device(&fs::read_to_string("/proc/net/route")?).as_deref())
    }

    /// Removes the rules, for when the last app has gone.
    pub(crate) fn remove_rules(&self) -> io::Result<()> {
        let mut machine = Machine::lock()?;
        if !any_links()? {
            machine.restore_forwarding()?;
        }
        self.firewall.remove(&self.tools)?;
        let Refusal { pool, metric } = self.refusal();
        if self.ip.run(&["route", "show", "type", "unreachable"], "")?.contains(&format!("metric {metric}")) {
            self.ip.run(&["route", "del", "unreachable", &pool, "metric", &metric], "")?;
        }
        Ok(())
    }

    fn make_network(&self, slot: u32, link: Link, mtu: u32) -> io::Result<()> {
        let (namespace, device) = (self.namespace(slot), self.device(slot));
        let (host, instance) = (link.host(), link.instance());
        self.ip.run(
            &["-batch", "-"],
            &format!("netns add {namespace}\nlink add {device} type veth peer name eth0 netns {namespace}\n"),
        )?;
        super::crash::point("compute.launch.namespace");
        // Before the link is up: it must never have an IPv6 address, which no rule of ours filters.
        set_sysctl(&format!("ipv6/conf/{device}/disable_ipv6"), "1")?;
        set_sysctl(&forwarding_of(&device), "1")?;
        let own = parse_own_addresses(&fs::read_to_string("/proc/net/fib_trie")?);
        let own = own.into_iter().filter(|address| !self.firewall.pool.contains(*address)).collect();
        let restore = self.tools.restore.path.to_string_lossy();
        self.ip.run(&["netns", "exec", &namespace, &restore, "-w", "10"], &self.firewall.inside(link, &own))?;
        self.ip.run(&["-batch", "-"], &format!("addr add {host}/30 dev {device}\nlink set {device} mtu {mtu} up\n"))?;
        self.ip.run(
            &["-n", &namespace, "-batch", "-"],
            &format!(
                "link set lo up\naddr add {instance}/30 dev eth0\nlink set eth0 mtu {mtu} up\nroute add default via {host}\n"
            ),
        )?;
        wait_for_carrier(&device);
        Ok(())
    }

    fn remove_network(&self, slot: u32) -> io::Result<()> {
        let (namespace, device) = (self.namespace(slot), self.device(slot));
        let mut batch = Vec::new();
        // The link first: with the namespace it would go too, but only some time later.
        if Path::new("/sys/class/net").join(&device).exists() {
            batch.push(format!("link del {device}\n"));
        }
        if namespace_path(&namespace).exists() {
            batch.push(format!("netns del {namespace}\n"));
        }
        if !batch.is_empty() {
            self.ip.run(&["-batch", "-"], &batch.concat())?;
        }
        Ok(())
    }

    /// Rules always; NAT and forwarding where the kernel has them.
    fn put_rules(&self, machine: &mut Machine, device: Option<&str>) -> io::Result<()> {
        let egress = self.firewall.ensure(&self.tools, &machine.forwarding_for_us(device)?)?;
        self.refusal().put(&self.ip)?;
        // Answers come in by this device; the switch for the whole machine is not needed and not touched.
        let forwarding = device.map_or(Ok(()), |device| set_sysctl(&forwarding_of(device), "1"));
        let reason = match (egress, device, forwarding) {
            (Egress::Nat, Some(_), Ok(())) => return Ok(()),
            (Egress::Unavailable, ..) => "the kernel has no NAT (iptables -t nat)".to_owned(),
            (_, None, _) => "the host has no default route".to_owned(),
            (_, Some(_), Err(error)) => error.to_string(),
        };
        if !self.warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(reason, "instances run without access to the internet");
        }
        Ok(())
    }

    fn refusal(&self) -> Refusal {
        Refusal::new(self.firewall.pool, &self.firewall.id)
    }

    fn namespace(&self, slot: u32) -> String {
        format!("sp-{}-{slot}", self.firewall.id)
    }

    /// At most 14 characters: the kernel allows 15.
    fn device(&self, slot: u32) -> String {
        format!("sp{}-{slot}", self.firewall.id)
    }
}

/// The route that refuses what is meant for an instance that does not run. Each installation has one of its own, told
/// apart by the metric.
pub(crate) struct Refusal {
    pool: String,
    metric: String,
}

impl Refusal {
    pub(crate) fn new(pool: Ipv4Network, id: &str) -> Self {
        let id = u32::from_str_radix(id, 16).unwrap_or(0);
        Self { pool: pool.to_string(), metric: (REFUSING_METRIC + id).to_string() }
    }

    pub(crate) fn put(&self, ip: &Tool) -> io::Result<()> {
        ip.run(&["route", "replace", "unreachable", &self.pool, "metric", &self.metric], "").map(drop)
    }
}

/// A link drops packets until the kernel has handled its carrier, some time after the command has returned; the first
/// connection would then wait a second for its repetition. Waiting longer than that would gain nothing.
fn wait_for_carrier(device: &str) {
    let state = Path::new("/sys/class/net").join(device).join("operstate");
    let deadline = Instant::now() + Duration::from_secs(1);
    while Instant::now() < deadline && fs::read_to_string(&state).is_ok_and(|state| state.trim() != "up") {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Addresses of the host's DNS servers that an instance can reach: none on the host itself.
pub(crate) fn host_resolvers() -> Vec<Ipv4Addr> {
    // systemd-resolved keeps the real servers in the first file; the second then names itself, on loopback.
    let files = ["/run/systemd/resolve/resolv.conf", "/etc/resolv.conf"];
    let found = files.iter().filter_map(|file| fs::read_to_string(file).ok()).map(|text| parse_resolvers(&text));
    found.into_iter().find(|resolvers| !resolvers.is_empty()).unwrap_or_default()
}

fn parse_resolvers(text: &str) -> Vec<Ipv4Addr> {
    let servers = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    servers.filter_map(|server| server.trim().parse().ok()).filter(|server: &Ipv4Addr| !server.is_loopback()).collect()
}

fn namespace_path(namespace: &str) -> PathBuf {
    Path::new("/run/netns").join(namespace)
}

fn mtu(device: Option<&str>) -> u32 {
    let read = |device| fs::read_to_string(format!("/sys/class/net/{device}/mtu")).ok()?.trim().parse().ok();
    device.and_then(read).unwrap_or(1500)
}

/// A kernel without the feature has no such file; that is fine for what is switched here.
pub(crate) fn set_sysctl(name: &str, value: &str) -> io::Result<()> {
    let path = Path::new("/proc/sys/net").join(name);
    match fs::read_to_string(&path) {
        Ok(now) if now.trim() == value => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => fs::write(&path, value)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))),
    }
}

/// What a switch of the kernel says; nothing where it has none.
pub(crate) fn sysctl(name: &str) -> String {
    fs::read_to_string(Path::new("/proc/sys/net").join(name)).unwrap_or_default().trim().to_owned()
}

/// Whether any installation of this machine has a link: `sp`, six hex digits, a number.
fn any_links() -> io::Result<bool> {
    for entry in fs::read_dir("/sys/class/net")? {
        if entry?.file_name().to_str().is_some_and(is_link) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn is_link(device: &str) -> bool {
    let parts = device.strip_prefix("sp").and_then(|rest| rest.split_once('-'));
    parts.is_some_and(|(id, slot)| id.len() == 6 && u32::from_str_radix(id, 16).is_ok() && slot.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_links_are_taken_for_links() {
        assert!(is_link("sp0a1b2c-16383"));
        for other in ["eth0", "sp0a1b2c", "sp0a1b2c-", "spx-1", "span0", "sp0a1b2-1"] {
            assert!(!is_link(other), "{other}");
        }
    }

    #[test]
    fn a_resolver_on_loopback_is_none_for_an_instance() {
        let text = "# nameserver 9.9.9.9\nnameserver 127.0.0.53\nnameserver ::1\n nameserver 10.1.2.3\nsearch x\n";
        assert_eq!(parse_resolvers(text), [Ipv4Addr::new(10, 1, 2, 3)]);
    }
}
