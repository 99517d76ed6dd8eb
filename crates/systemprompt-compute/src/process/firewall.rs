//! What instances may reach, as iptables rules in two lines, each of which is enough.
//!
//! The first is inside each instance's network namespace, in force before the namespace has a link: the host's own
//! tools neither see nor flush it, and the instance has no privilege over its namespace to change it.
//!
//! The second is on the host, in chains of this installation's own. It matches the installation's links by name
//! (`sp{id}-*`), so it does not change when instances come and go; it is set again before every launch and every
//! minute, since somebody may have flushed it or put a rule before it.
//!
//! | from | to | verdict |
//! |---|---|---|
//! | instance | the host itself, any address | answers to the host's own connections only |
//! | anything | instance | answers only; the host (the edge) does not pass FORWARD and is free |
//! | instance | configured resolvers, port 53 | allowed |
//! | instance | private, link-local, metadata, shared, special ranges | dropped |
//! | instance | the rest | allowed, by NAT, up to a number of connections (first line) |
//! | outside, by a device that forwards only because of us | anything but instances | answers only |

use super::{
    address::{Ipv4Network, Link},
    command::Tool,
};
use std::{collections::BTreeSet, fmt::Write as _, io, net::Ipv4Addr};

/// Ranges that are not the public internet (IANA special-purpose registry, RFC 6890), plus multicast and beyond.
const DENIED: [&str; 18] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    // Azure's WireServer: metadata at a public address.
    "168.63.129.16/32",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.31.196.0/24",
    "192.52.193.0/24",
    "192.88.99.0/24",
    "192.168.0.0/16",
    "192.175.48.0/24",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
];

/// Connections an instance may have open to the outside, and new ones a second: the host's table of connections,
/// which all of its traffic needs, holds some 65,000 on a small machine.
const MAX_CONNECTIONS: u32 = 4096;
const NEW_CONNECTIONS_PER_SECOND: u32 = 1000;

/// What happens to a packet that somebody else began.
const ANSWERS: &str = "-m conntrack --ctstate ESTABLISHED,RELATED";

/// The rules of one installation.
#[derive(Debug, Clone)]
pub(crate) struct Firewall {
    /// Six hex digits.
    pub(crate) id: String,
    pub(crate) pool: Ipv4Network,
    pub(crate) resolvers: Vec<Ipv4Addr>,
}

/// Whether instances get out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Egress {
    Nat,
    /// This kernel has no NAT; everything else is in force.
    Unavailable,
}

/// One table of the host: our jumps from its chains, in the form in which `iptables-save` prints them, and ours.
#[derive(Debug)]
struct Table {
    name: &'static str,
    jumps: Vec<String>,
    chains: Vec<String>,
    rules: Vec<String>,
}

impl Firewall {
    /// Puts the host's rules in force, ours before all others. `guarded` are devices that forward only because of
    /// us. Call under the machine's network lock.
    ///
    /// # Errors
    /// When the filter cannot be set: then no instance may start. Missing NAT is no error.
    pub(crate) fn ensure(&self, tools: &Tools, guarded: &BTreeSet<String>) -> io::Result<Egress> {
        let saved = tools.save.run(&[], "")?;
        let put = |table: &Table| tools.restore.run(&["-w", "10", "--noflush"], &self.text(table, &saved));
        put(&self.filter(guarded))?;
        put(&self.mangle())?;
        Ok(if put(&self.nat()).is_ok() { Egress::Nat } else { Egress::Unavailable })
    }

    /// Takes the rules out again; what is gone already is no error. Call under the machine's network lock.
    pub(crate) fn remove(&self, tools: &Tools) -> io::Result<()> {
        let text = self.removal(&tools.save.run(&[], "")?);
        if text.is_empty() {
            return Ok(());
        }
        tools.restore.run(&["-w", "10", "--noflush"], &text).map(drop)
    }

    /// The rules inside an instance's namespace. `own` are the host's addresses.
    pub(crate) fn inside(&self, link: Link, own: &BTreeSet<Ipv4Addr>) -> String {
        let mut text =
            String::from("*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT DROP [0:0]\n:OUT - [0:0]\n");
        let host = link.host();
        for rule in [
            "-A INPUT -i lo -j ACCEPT".to_owned(),
            format!("-A INPUT {ANSWERS} -j ACCEPT"),
            format!("-A INPUT -s {host}/32 -j ACCEPT"),
            "-A OUTPUT -o lo -j ACCEPT".to_owned(),
            format!("-A OUTPUT {ANSWERS} -j ACCEPT"),
            format!("-A OUTPUT -d {} -j DROP", self.pool),
        ] {
            line(&mut text, &rule);
        }
        for address in own {
            line(&mut text, &format!("-A OUTPUT -d {address}/32 -j DROP"));
        }
        for rule in self.egress("OUTPUT", "OUT") {
            line(&mut text, &rule);
        }
        let rate = format!("--limit {NEW_CONNECTIONS_PER_SECOND}/sec --limit-burst {NEW_CONNECTIONS_PER_SECOND}");
        line(&mut text, &format!("-A OUT -m connlimit --connlimit-above {MAX_CONNECTIONS} --connlimit-mask 0 -j DROP"));
        line(&mut text, &format!("-A OUT -m limit {rate} -j ACCEPT"));
        line(&mut text, "-A OUT -j DROP");
        text.push_str("COMMIT\n");
        text
    }

    fn filter(&self, guarded: &BTreeSet<String>) -> Table {
        let (links, input, forward) = (self.links(), self.chain("IN"), self.chain("FWD"));
        let mut jumps = vec![
            format!("-A INPUT -i {links} -j {input}"),
            format!("-A FORWARD -i {links} -j {forward}"),
            format!("-A FORWARD -o {links} -j {forward}"),
        ];
        let mut rules = vec![
            format!("-A {input} {ANSWERS} -j ACCEPT"),
            format!("-A {input} -j DROP"),
            format!("-A {forward} -o {links} {ANSWERS} -j ACCEPT"),
            format!("-A {forward} -o {links} -j DROP"),
        ];
        for device in guarded {
            jumps.push(format!("-A FORWARD -i {device} ! -o {ANY_LINKS} -j {forward}"));
            // Answers, and ports that somebody forwards on purpose, are none of our business.
            rules.push(format!("-A {forward} -i {device} -m conntrack --ctstate ESTABLISHED,RELATED,DNAT -j RETURN"));
            rules.push(format!("-A {forward} -i {device} -j DROP"));
        }
        rules.extend(self.egress(&forward, "ACCEPT"));
        Table { name: "filter", jumps, chains: vec![input, forward], rules }
    }

    /// Before the host's rules for its own ports, whatever their order: they may begin with one that accepts.
    fn mangle(&self) -> Table {
        let (links, chain) = (self.links(), self.chain("HOST"));
        let jumps = vec![format!("-A PREROUTING -i {links} -m addrtype --dst-type LOCAL -j {chain}")];
        let rules = vec![format!("-A {chain} {ANSWERS} -j RETURN"), format!("-A {chain} -j DROP")];
        Table { name: "mangle", jumps, chains: vec![chain], rules }
    }

    fn nat(&self) -> Table {
        let chain = self.chain("NAT");
        let jumps = vec![format!("-A POSTROUTING -s {} -j {chain}", self.pool)];
        let rules = vec![format!("-A {chain} ! -o {} -j MASQUERADE", self.links())];
        Table { name: "nat", jumps, chains: vec![chain], rules }
    }

    /// Resolvers, then what is denied, then the rest.
    fn egress(&self, chain: &str, allowed: &str) -> Vec<String> {
        let mut rules = Vec::new();
        for resolver in &self.resolvers {
            for protocol in ["udp", "tcp"] {
                rules.push(format!("-A {chain} -d {resolver}/32 -p {protocol} --dport 53 -j {allowed}"));
            }
        }
        rules.extend(DENIED.iter().map(|range| format!("-A {chain} -d {range} -j DROP")));
        rules.push(format!("-A {chain} -j {allowed}"));
        rules
    }

    /// Input of `iptables-restore --noflush`: chains are filled anew, jumps are touched only when they are not right.
    fn text(&self, table: &Table, saved: &str) -> String {
        let mut text = format!("*{}\n", table.name);
        for chain in &table.chains {
            line(&mut text, &format!(":{chain} - [0:0]"));
        }
        let saved: Vec<_> = section(saved, table.name).collect();
        let chains: BTreeSet<_> = table.jumps.iter().map(|jump| chain_of(jump)).collect();
        for chain in chains {
            let wanted: Vec<_> = table.jumps.iter().filter(|jump| chain_of(jump) == chain).collect();
            let there: Vec<_> = saved.iter().filter(|line| chain_of(line) == chain).collect();
            let own: Vec<_> = there.iter().filter(|line| self.is_own_jump(line)).collect();
            // Other installations' jumps match other links: they may stand before ours.
            let head: Vec<_> = there.iter().take_while(|line| target_of(line).starts_with("SP-")).collect();
            let first = wanted.iter().all(|jump| head.iter().any(|line| **line == jump));
            if first && own.len() == wanted.len() {
                continue;
            }
            for edit in own.iter().map(|jump| deletion(jump)).chain(wanted.iter().rev().map(|jump| insertion(jump))) {
                line(&mut text, &edit);
            }
        }
        for rule in &table.rules {
            line(&mut text, rule);
        }
        text.push_str("COMMIT\n");
        text
    }

    fn removal(&self, saved: &str) -> String {
        let mut text = String::new();
        for table in ["filter", "mangle", "nat"] {
            let mut actions = String::new();
            // Each occurrence: an earlier crash may have left more than one.
            for jump in section(saved, table).filter(|line| self.is_own_jump(line)) {
                line(&mut actions, &deletion(jump));
            }
            let name = |line: &'_ str| line.strip_prefix(':')?.split(' ').next().map(str::to_owned);
            let chains: Vec<_> =
                section(saved, table).filter_map(name).filter(|chain| chain.starts_with(&self.chain(""))).collect();
            for action in ["-F", "-X"] {
                for chain in &chains {
                    line(&mut actions, &format!("{action} {chain}"));
                }
            }
            if !actions.is_empty() {
                write!(text, "*{table}\n{actions}COMMIT\n").expect("writing to a string cannot fail");
            }
        }
        text
    }

    fn is_own_jump(&self, line: &str) -> bool {
        line.starts_with("-A ") && target_of(line).starts_with(&self.chain(""))
    }

    fn links(&self) -> String {
        format!("sp{}-+", self.id)
    }

    fn chain(&self, part: &str) -> String {
        format!("SP-{}-{part}", self.id)
    }
}

/// Links of all installations.
const ANY_LINKS: &str = "sp+";

/// The two programs the rules go through.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    pub(crate) save: Tool,
    pub(crate) restore: Tool,
}

/// The lines of one table in what `iptables-save` printed.
fn section<'a>(saved: &'a str, table: &str) -> impl Iterator<Item = &'a str> {
    let head = format!("*{table}");
    saved.lines().skip_while(move |line| *line != head).skip(1).take_while(|line| *line != "COMMIT")
}

/// The chain that a rule is appended to; nothing for another line.
fn chain_of(rule: &str) -> &str {
    rule.strip_prefix("-A ").and_then(|rest| rest.split(' ').next()).unwrap_or_default()
}

fn target_of(rule: &str) -> &str {
    rule.rsplit_once("-j ").map_or("", |(_, target)| target)
}

/// At the head of the chain: a rule of the host that accepts everything must not come first.
fn insertion(jump: &str) -> String {
    let mut words = jump.splitn(3, ' ');
    let (_, chain, rest) = (words.next(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
    format!("-I {chain} 1 {rest}")
}

fn deletion(jump: &str) -> String {
    jump.replacen("-A", "-D", 1)
}

fn line(text: &mut String, rule: &str) {
    writeln!(text, "{rule}").expect("writing to a string cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn firewall() -> Firewall {
        let pool = "10.231.0.0/16".parse().expect("pool");
        Firewall { id: "0a1b2c".to_owned(), pool, resolvers: vec![Ipv4Addr::new(10, 0, 0, 53)] }
    }

    fn filter(guarded: &[&str], saved: &str) -> String {
        let guarded = guarded.iter().map(|device| (*device).to_owned()).collect();
        firewall().text(&firewall().filter(&guarded), saved)
    }

    fn place(text: &str, rule: &str) -> usize {
        text.find(rule).unwrap_or_else(|| panic!("{rule} in {text}"))
    }

    #[test]
    fn the_resolver_comes_before_the_ranges_and_the_ranges_before_the_rest() {
        let text = filter(&["eth0"], "");
        let place = |rule| place(&text, rule);
        assert!(place("-d 10.0.0.53/32 -p udp --dport 53 -j ACCEPT") < place("-d 10.0.0.0/8 -j DROP"));
        assert!(place("-d 169.254.0.0/16 -j DROP") < place("-A SP-0a1b2c-FWD -j ACCEPT"));
        assert!(place("-d 168.63.129.16/32 -j DROP") < place("-A SP-0a1b2c-FWD -j ACCEPT"));
        assert!(place("-o sp0a1b2c-+ -j DROP") < place("-d 10.0.0.53/32"), "another tenant is no resolver");
        assert!(place("-i eth0 -j DROP") < place("-d 10.0.0.53/32"), "nor is it anybody else's");
        assert!(text.contains("-I INPUT 1 -i sp0a1b2c-+ -j SP-0a1b2c-IN"));
    }

    #[test]
    fn inside_the_host_comes_before_the_resolver_and_nothing_is_allowed_without_a_limit() {
        let link = firewall().pool.slot(1);
        let text = firewall().inside(link, &BTreeSet::from([Ipv4Addr::new(10, 0, 0, 53)]));
        assert!(
            place(&text, "-A OUTPUT -d 10.0.0.53/32 -j DROP")
                < place(&text, "-d 10.0.0.53/32 -p udp --dport 53 -j OUT"),
            "a resolver on the host is no way to the host"
        );
        assert!(place(&text, "-d 10.231.0.0/16 -j DROP") < place(&text, "-A OUTPUT -j OUT"));
        assert!(text.contains("-A INPUT -s 10.231.0.5/32 -j ACCEPT") && text.contains(":OUTPUT DROP"));
        let accepting: Vec<_> = text.lines().filter(|line| line.ends_with("-j ACCEPT")).collect();
        assert_eq!(accepting.iter().filter(|line| line.starts_with("-A OUTPUT")).count(), 2, "lo and answers");
    }

    #[test]
    fn jumps_are_touched_only_when_they_are_missing_too_many_or_behind_a_rule_of_the_host() {
        let input = "-A INPUT -i sp0a1b2c-+ -j SP-0a1b2c-IN\n";
        let other = "-A INPUT -i spffffff-+ -j SP-ffffff-IN\n";
        let accept = "-A INPUT -j ACCEPT\n";
        let edits = |rules: &[&str]| {
            let text = filter(&[], &format!("*filter\n:INPUT ACCEPT [0:0]\n{}COMMIT\n", rules.concat()));
            (text.matches("-D INPUT").count(), text.matches("-I INPUT").count())
        };
        assert_eq!(edits(&[]), (0, 1));
        assert_eq!(edits(&[input, accept]), (0, 0));
        assert_eq!(edits(&[other, input, accept]), (0, 0), "installations do not push each other away for ever");
        assert_eq!(edits(&[accept, input]), (1, 1));
        assert_eq!(edits(&[input, accept, input]), (2, 1));
        let guard = "*filter\n-A FORWARD -i eth0 ! -o sp+ -j SP-0a1b2c-FWD\nCOMMIT\n";
        assert!(filter(&[], guard).contains("-D FORWARD -i eth0 ! -o sp+ -j SP-0a1b2c-FWD"), "no longer guarded");
    }

    #[test]
    fn everything_of_ours_is_removed_as_often_as_it_is_there_and_nothing_else() {
        let jump = "-A INPUT -i sp0a1b2c-+ -j SP-0a1b2c-IN\n";
        let saved = format!(
            "*mangle\n:SP-0a1b2c-HOST - [0:0]\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n:SP-0a1b2c-IN - [0:0]\n\
             :SP-ffffff-IN - [0:0]\n{jump}{jump}-A INPUT -i spffffff-+ -j SP-ffffff-IN\nCOMMIT\n"
        );
        let removal = firewall().removal(&saved);
        assert_eq!(removal.matches("-D INPUT").count(), 2);
        assert!(removal.contains("-X SP-0a1b2c-IN") && removal.contains("*mangle\n-F SP-0a1b2c-HOST\n"));
        assert!(!removal.contains("ffffff") && !removal.contains("nat"), "{removal}");
        assert_eq!(firewall().removal("*nat\nCOMMIT\n"), "");
    }
}
