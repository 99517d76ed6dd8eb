//! What instances may reach, as iptables rules in chains of this installation's own.
//!
//! The rules match the installation's links by name (`sp{id}-*`), so they do not change when instances come and
//! go; they are set again before every launch, in one atomic `iptables-restore`, since somebody may have flushed
//! them meanwhile.
//!
//! | from | to | verdict |
//! |---|---|---|
//! | instance | the host itself, any address | answers to the host's own connections only |
//! | anything | instance | answers only; the host (the edge) does not pass FORWARD and is free |
//! | instance | configured resolvers, port 53 | allowed |
//! | instance | private, link-local, metadata, shared, special ranges | dropped |
//! | instance | the rest | allowed, by NAT |

use super::{address::Ipv4Network, command::Tool};
use std::{fmt::Write as _, io, net::Ipv4Addr};

/// Ranges that are not the public internet (IANA special-purpose registry, RFC 6890), plus multicast and beyond.
const DENIED: [&str; 17] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
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

impl Firewall {
    /// Puts the rules in force. Call under the machine's network lock.
    ///
    /// # Errors
    /// When the filter cannot be set: then no instance may start. Missing NAT is no error.
    pub(crate) fn ensure(&self, tools: &Tools) -> io::Result<Egress> {
        let saved = tools.save.run(&["-t", "filter"], "")?;
        tools.restore.run(&["-w", "10", "--noflush"], &self.filter(&saved))?;
        let nat = tools
            .save
            .run(&["-t", "nat"], "")
            .and_then(|saved| tools.restore.run(&["-w", "10", "--noflush"], &self.nat(&saved)));
        Ok(if nat.is_ok() { Egress::Nat } else { Egress::Unavailable })
    }

    /// Takes the rules out again; what is gone already is no error. Call under the machine's network lock.
    pub(crate) fn remove(&self, tools: &Tools) -> io::Result<()> {
        for table in ["filter", "nat"] {
            let Ok(saved) = tools.save.run(&["-t", table], "") else { continue };
            let text = self.removal(table, &saved);
            if !text.is_empty() {
                tools.restore.run(&["-w", "10", "--noflush"], &text)?;
            }
        }
        Ok(())
    }

    fn filter(&self, saved: &str) -> String {
        let (links, input, forward) = (self.links(), self.chain("IN"), self.chain("FWD"));
        let mut text = format!("*filter\n:{input} - [0:0]\n:{forward} - [0:0]\n");
        for jump in missing(&self.filter_jumps(), saved) {
            line(&mut text, &insertion(&jump));
        }
        line(&mut text, &format!("-A {input} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"));
        line(&mut text, &format!("-A {input} -j DROP"));
        line(&mut text, &format!("-A {forward} -o {links} -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT"));
        line(&mut text, &format!("-A {forward} -o {links} -j DROP"));
        for resolver in &self.resolvers {
            for protocol in ["udp", "tcp"] {
                line(&mut text, &format!("-A {forward} -d {resolver}/32 -p {protocol} --dport 53 -j ACCEPT"));
            }
        }
        for range in DENIED {
            line(&mut text, &format!("-A {forward} -d {range} -j DROP"));
        }
        line(&mut text, &format!("-A {forward} -j ACCEPT"));
        text.push_str("COMMIT\n");
        text
    }

    fn nat(&self, saved: &str) -> String {
        let chain = self.chain("NAT");
        let mut text = format!("*nat\n:{chain} - [0:0]\n");
        for jump in missing(&self.nat_jumps(), saved) {
            line(&mut text, &insertion(&jump));
        }
        line(&mut text, &format!("-A {chain} ! -o {} -j MASQUERADE", self.links()));
        text.push_str("COMMIT\n");
        text
    }

    fn removal(&self, table: &str, saved: &str) -> String {
        let (jumps, chains) = match table {
            "nat" => (self.nat_jumps(), vec![self.chain("NAT")]),
            _ => (self.filter_jumps(), vec![self.chain("IN"), self.chain("FWD")]),
        };
        let mut text = String::new();
        for jump in &jumps {
            // Each occurrence: an earlier crash may have left more than one.
            for _ in saved.lines().filter(|saved| *saved == jump) {
                line(&mut text, &jump.replacen("-A", "-D", 1));
            }
        }
        let chains: Vec<_> = chains.into_iter().filter(|chain| saved.contains(&format!("\n:{chain} "))).collect();
        for action in ["-F", "-X"] {
            for chain in &chains {
                line(&mut text, &format!("{action} {chain}"));
            }
        }
        if text.is_empty() { text } else { format!("*{table}\n{text}COMMIT\n") }
    }

    /// In the form in which `iptables-save` prints them.
    fn filter_jumps(&self) -> Vec<String> {
        let (links, input, forward) = (self.links(), self.chain("IN"), self.chain("FWD"));
        vec![
            format!("-A INPUT -i {links} -j {input}"),
            format!("-A FORWARD -i {links} -j {forward}"),
            format!("-A FORWARD -o {links} -j {forward}"),
        ]
    }

    fn nat_jumps(&self) -> Vec<String> {
        vec![format!("-A POSTROUTING -s {} -j {}", self.pool, self.chain("NAT"))]
    }

    fn links(&self) -> String {
        format!("sp{}-+", self.id)
    }

    fn chain(&self, part: &str) -> String {
        format!("SP-{}-{part}", self.id)
    }
}

/// The two programs the rules go through.
#[derive(Debug, Clone)]
pub(crate) struct Tools {
    pub(crate) save: Tool,
    pub(crate) restore: Tool,
}

fn missing(jumps: &[String], saved: &str) -> Vec<String> {
    jumps.iter().filter(|jump| !saved.lines().any(|line| line == jump.as_str())).cloned().collect()
}

/// At the head of the chain: a rule of the host that accepts everything must not come first.
fn insertion(jump: &str) -> String {
    let mut words = jump.splitn(3, ' ');
    let (_, chain, rest) = (words.next(), words.next().unwrap_or_default(), words.next().unwrap_or_default());
    format!("-I {chain} 1 {rest}")
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

    #[test]
    fn the_resolver_comes_before_the_ranges_and_the_ranges_before_the_rest() {
        let text = firewall().filter("");
        let place = |rule: &str| text.find(rule).unwrap_or_else(|| panic!("{rule} in {text}"));
        assert!(place("-d 10.0.0.53/32 -p udp --dport 53 -j ACCEPT") < place("-d 10.0.0.0/8 -j DROP"));
        assert!(place("-d 169.254.0.0/16 -j DROP") < place("-A SP-0a1b2c-FWD -j ACCEPT"));
        assert!(place("-o sp0a1b2c-+ -j DROP") < place("-d 10.0.0.53/32"), "another tenant is no resolver");
        assert!(text.contains("-I INPUT 1 -i sp0a1b2c-+ -j SP-0a1b2c-IN"));
    }

    #[test]
    fn what_is_in_force_is_not_inserted_twice_and_is_removed_as_often_as_it_is_there() {
        let jump = "-A INPUT -i sp0a1b2c-+ -j SP-0a1b2c-IN\n";
        let saved = format!("*filter\n:INPUT ACCEPT [0:0]\n:SP-0a1b2c-IN - [0:0]\n{jump}{jump}COMMIT\n");
        assert!(!firewall().filter(&saved).contains("-I INPUT"));
        let removal = firewall().removal("filter", &saved);
        assert_eq!(removal.matches("-D INPUT").count(), 2);
        assert!(removal.contains("-X SP-0a1b2c-IN") && !removal.contains("FWD"));
        assert_eq!(firewall().removal("nat", "*nat\nCOMMIT\n"), "");
    }
}
