//! Which /30 of the pool an instance gets. Pure: what is taken is an argument.

use std::{collections::BTreeSet, fmt, net::Ipv4Addr, str::FromStr};

/// An IPv4 network, e.g. `10.231.0.0/16`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4Network {
    base: u32,
    prefix: u8,
}

/// Text that is not an IPv4 network.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected an IPv4 network such as 10.231.0.0/16 without host bits, got {0:?}")]
pub struct InvalidNetwork(String);

impl Ipv4Network {
    pub(crate) fn new(base: Ipv4Addr, prefix: u8) -> Option<Self> {
        let base = u32::from(base);
        (prefix <= 32 && base & !mask(prefix) == 0).then_some(Self { base, prefix })
    }

    pub(crate) fn overlaps(self, other: Self) -> bool {
        let shorter = mask(self.prefix.min(other.prefix));
        self.base & shorter == other.base & shorter
    }

    pub(crate) fn contains(self, address: Ipv4Addr) -> bool {
        u32::from(address) & mask(self.prefix) == self.base
    }

    /// How many /30 networks it holds; at most 16384, since a link's name must hold the number.
    pub(crate) fn slots(self) -> u32 {
        match self.prefix {
            0..=16 => MAX_SLOTS,
            prefix @ 17..=30 => 1 << (30 - prefix),
            _ => 0,
        }
    }

    /// The /30 of a slot.
    pub(crate) fn slot(self, slot: u32) -> Link {
        Link { base: self.base + slot * 4 }
    }

    /// The number of a free slot: `preferred` if that is free, else the first from `next` on, round and round.
    pub(crate) fn free_slot(self, preferred: Option<u32>, next: u32, taken: &[Self]) -> Option<u32> {
        let free = |slot: &u32| {
            *slot < self.slots()
                && !taken.iter().any(|taken| taken.prefix > 0 && taken.overlaps(self.slot(*slot).network()))
        };
        preferred.filter(free).or_else(|| (next..self.slots()).chain(0..next).find(free))
    }
}

const MAX_SLOTS: u32 = 1 << 14;

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Ipv4Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.prefix)
    }
}

impl FromStr for Ipv4Network {
    type Err = InvalidNetwork;
    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        let parse = || {
            let (base, prefix) = text.split_once('/')?;
            Self::new(base.parse().ok()?, prefix.parse().ok()?)
        };
        parse().ok_or_else(|| InvalidNetwork(text.chars().take(60).collect()))
    }
}

/// The two ends of one instance's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    base: u32,
}

impl Link {
    pub(crate) fn network(self) -> Ipv4Network {
        Ipv4Network { base: self.base, prefix: 30 }
    }
    /// What names the network.
    pub(crate) fn base(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base)
    }
    /// The host's end: the instance's gateway.
    pub(crate) fn host(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 1)
    }
    /// The instance's end.
    pub(crate) fn instance(self) -> Ipv4Addr {
        Ipv4Addr::from(self.base + 2)
    }
}

/// Routes of the host, from `/proc/net/route`, without those that only refuse: our own covers the whole pool.
pub(crate) fn parse_routes(text: &str) -> Vec<Ipv4Network> {
    let parse = |fields: Vec<&str>| {
        let base = u32::from_str_radix(fields.get(1)?, 16).ok()?.swap_bytes();
        let mask = u32::from_str_radix(fields.get(7)?, 16).ok()?.swap_bytes();
        Some(Ipv4Network { base, prefix: u8::try_from(mask.leading_ones()).ok()? })
    };
    routes(text).filter_map(parse).collect()
}

/// The device of the default route, from the same file.
pub(crate) fn default_device(text: &str) -> Option<String> {
    let default =
        routes(text).find(|fields| fields.get(1) == Some(&"00000000") && fields.get(7) == Some(&"00000000"))?;
    Some(default[0].to_owned())
}

fn routes(text: &str) -> impl Iterator<Item = Vec<&str>> {
    let leads_somewhere = |fields: &Vec<&str>| {
        let flags = fields.get(3).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        flags.is_some_and(|flags| flags & ROUTE_REFUSES == 0)
    };
    text.lines().skip(1).map(|line| line.split_ascii_whitespace().collect()).filter(leads_somewhere)
}

/// `RTF_REJECT`.
const ROUTE_REFUSES: u32 = 0x0200;

/// Addresses of the host itself, from `/proc/net/fib_trie`, without loopback's.
pub(crate) fn parse_own_addresses(text: &str) -> BTreeSet<Ipv4Addr> {
    let lines: Vec<_> = text.lines().map(str::trim).collect();
    let own = lines.windows(2).filter(|pair| pair[1] == "/32 host LOCAL");
    let address = |pair: &[&str]| pair[0].strip_prefix("|-- ")?.parse().ok();
    own.filter_map(address).filter(|address: &Ipv4Addr| !address.is_loopback()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTES: &str = "\
Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
eth0	00000000	010200C0	0003	0	0	0	00000000	0	0	0
eth0	000200C0	00000000	0001	0	0	0	00FFFFFF	0	0	0
sp1	0000E70A	00000000	0001	0	0	0	FCFFFFFF	0	0	0
*	0000E70A	00000000	0201	0	0	268435457	0000FFFF	0	0	0
*	00000000	00000000	0201	0	0	268435457	00000000	0	0	0
";

    fn network(text: &str) -> Ipv4Network {
        text.parse().expect("network")
    }

    #[test]
    fn networks_without_host_bits_only() {
        assert_eq!(network("10.231.0.0/16").to_string(), "10.231.0.0/16");
        assert_eq!(network("10.231.0.0/16").slots(), 16384);
        assert_eq!(network("10.231.0.0/24").slots(), 64);
        for bad in ["10.231.0.1/16", "10.231.0.0", "10.231.0.0/33", "x/8", ""] {
            assert!(bad.parse::<Ipv4Network>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_slot_in_use_by_anybody_is_not_given() {
        let routes = parse_routes(ROUTES);
        assert_eq!(
            routes.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["0.0.0.0/0", "192.0.2.0/24", "10.231.0.0/30"]
        );
        assert_eq!(default_device(ROUTES).as_deref(), Some("eth0"));
        let pool = network("10.231.0.0/28");
        assert_eq!(pool.free_slot(None, 0, &routes), Some(1), "slot 0 is routed, the default route is no obstacle");
        let taken = [routes, vec![network("10.231.0.4/30")]].concat();
        assert_eq!(pool.free_slot(Some(3), 0, &taken), Some(3));
        assert_eq!(pool.free_slot(Some(0), 0, &taken), Some(2));
        assert_eq!(pool.free_slot(None, 3, &taken), Some(3));
        assert_eq!(pool.free_slot(None, 9, &taken), Some(2), "round and round");
        assert_eq!(pool.free_slot(None, 0, &[taken, vec![network("10.231.0.8/29")]].concat()), None);
        assert_eq!(pool.free_slot(None, 0, &[network("10.0.0.0/8")]), None, "the host's own network is respected");
    }

    #[test]
    fn the_host_s_own_addresses_are_found_in_the_table() {
        let table = "\
Main:
     |-- 10.231.0.0
        /16 universe UNREACHABLE
Local:
           |-- 127.0.0.0
              /8 host LOCAL
           |-- 127.0.0.1
              /32 host LOCAL
           |-- 203.0.113.9
              /32 host LOCAL
        |-- 203.0.113.255
           /32 link BROADCAST
";
        assert_eq!(parse_own_addresses(table), BTreeSet::from([Ipv4Addr::new(203, 0, 113, 9)]));
    }

    #[test]
    fn the_two_ends_are_the_usable_addresses() {
        let link = network("10.231.0.0/16").slot(16383);
        assert_eq!(
            (link.host().to_string(), link.instance().to_string()),
            ("10.231.255.253".into(), "10.231.255.254".into())
        );
        assert_eq!(link.network().to_string(), "10.231.255.252/30");
    }
}
