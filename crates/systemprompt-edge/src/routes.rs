//! The route table: which host is served by whom.
//!
//! A table is immutable. A change makes a new one that shares all but the touched shards with the old,
//! so that publishing one route among 100,000 costs microseconds and readers never wait.

use crate::config::Upstream;
use foldhash::fast::RandomState;
use serde::{Deserialize, Serialize};
use std::{collections::HashMap, fmt, hash::BuildHasher, hash::Hash, sync::Arc};
use systemprompt_contract::{Hostname, TenantSlug};

const SHARDS: usize = 256;

/// What happens to a request for a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "to")]
pub enum Route {
    /// API, registry and pages.
    Platform,
    /// A tenant with a live release.
    Tenant {
        /// Whose it is.
        slug: TenantSlug,
        /// The instance of the live release.
        upstream: Upstream,
    },
    /// A tenant that cannot be served now.
    Unavailable {
        /// Whose it is.
        slug: TenantSlug,
        /// What the client is told.
        why: Why,
    },
}

impl Route {
    fn upstream(&self) -> Option<&Upstream> {
        match self {
            Self::Tenant { upstream, .. } => Some(upstream),
            Self::Platform | Self::Unavailable { .. } => None,
        }
    }
}

/// Why a known tenant has no upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Provisioned, no release yet: 503.
    AwaitingDeploy,
    /// Billing: 402.
    Suspended,
    /// Deploying or waking with nothing live: the request is held, then 503.
    Starting,
    /// Stopped by its owner: 503.
    Stopped,
    /// The last operation failed and nothing is live: 503.
    Failed,
}

/// Host to route, with the generation of the last change it contains. Cloning is cheap.
#[derive(Clone)]
pub struct RouteTable {
    generation: u64,
    hosts: Sharded<Hostname, Arc<Route>>,
    /// How many routes name an upstream: tells at once whether one left the table.
    uses: Sharded<Upstream, usize>,
}

impl RouteTable {
    /// An empty table of generation 0.
    pub fn new() -> Self {
        Self { generation: 0, hosts: Sharded::new(), uses: Sharded::new() }
    }

    /// The number of the last change this table contains.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The route of a host.
    pub fn lookup(&self, host: &Hostname) -> Option<&Route> {
        self.hosts.get(host).map(AsRef::as_ref)
    }

    /// This table with the changes applied (`None` removes), under a new generation. `self` stays as it is.
    #[must_use]
    pub fn apply(&self, generation: u64, changes: impl IntoIterator<Item = (Hostname, Option<Route>)>) -> Self {
        let mut next = Self { generation, ..self.clone() };
        for (host, route) in changes {
            if let Some(upstream) = route.as_ref().and_then(Route::upstream) {
                let uses = next.uses.get(upstream).copied().unwrap_or(0);
                next.uses.insert(upstream.clone(), uses + 1);
            }
            let before = match route {
                Some(route) => next.hosts.insert(host, Arc::new(route)),
                None => next.hosts.remove(&host),
            };
            if let Some(upstream) = before.as_deref().and_then(Route::upstream) {
                next.release(upstream);
            }
        }
        next
    }

    /// All routes, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Hostname, &Route)> {
        self.hosts.iter().map(|(host, route)| (host, route.as_ref()))
    }

    /// How many hosts have a route.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether no host has a route.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a route leads to this upstream.
    pub(crate) fn uses(&self, upstream: &Upstream) -> bool {
        self.uses.get(upstream).is_some()
    }

    fn release(&mut self, upstream: &Upstream) {
        match self.uses.get(upstream).copied() {
            Some(uses) if uses > 1 => drop(self.uses.insert(upstream.clone(), uses - 1)),
            Some(_) => drop(self.uses.remove(upstream)),
            None => {}
        }
    }
}

impl Default for RouteTable {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for RouteTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouteTable")
            .field("generation", &self.generation)
            .field("hosts", &self.len())
            .finish_non_exhaustive()
    }
}

/// A map cut into shards behind `Arc`s: a clone shares all of them, a write copies one.
struct Sharded<K, V> {
    hasher: RandomState,
    shards: Vec<Arc<Shard<K, V>>>,
}

/// Keys sit behind an `Arc` too, so that copying a shard allocates its table only.
type Shard<K, V> = HashMap<Arc<K>, V, RandomState>;

impl<K: Hash + Eq, V: Clone> Sharded<K, V> {
    fn new() -> Self {
        let empty = Arc::new(Shard::default());
        Self { hasher: RandomState::default(), shards: vec![empty; SHARDS] }
    }

    fn index(&self, key: &K) -> usize {
        // The remainder is below 256, so nothing is cut off.
        usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or(0)
    }

    fn get(&self, key: &K) -> Option<&V> {
        self.shards[self.index(key)].get(key)
    }

    fn insert(&mut self, key: K, value: V) -> Option<V> {
        let index = self.index(&key);
        Arc::make_mut(&mut self.shards[index]).insert(Arc::new(key), value)
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        let index = self.index(key);
        // Looked up first: removing what is absent must not copy the shard.
        self.shards[index].contains_key(key).then(|| Arc::make_mut(&mut self.shards[index]).remove(key)).flatten()
    }

    fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter()).map(|(key, value)| (key.as_ref(), value))
    }

    fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }
}

impl<K, V> Clone for Sharded<K, V> {
    fn clone(&self) -> Self {
        Self { hasher: self.hasher.clone(), shards: self.shards.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(n: u16) -> Hostname {
        format!("h{n}.example.com").parse().expect("host")
    }

    fn tenant(port: u16) -> Route {
        Route::Tenant { slug: "0123456789ab".parse().expect("slug"), upstream: upstream(port) }
    }

    fn upstream(port: u16) -> Upstream {
        Upstream::Tcp(([127, 0, 0, 1], port).into())
    }

    #[test]
    fn a_change_leaves_the_old_table_as_it_was() {
        let old = RouteTable::new().apply(1, [(host(1), Some(tenant(1)))]);
        let new = old.apply(2, [(host(1), Some(tenant(2))), (host(2), Some(Route::Platform))]);
        assert_eq!((old.generation(), old.len(), old.lookup(&host(1))), (1, 1, Some(&tenant(1))));
        assert_eq!((new.generation(), new.len(), new.lookup(&host(1))), (2, 2, Some(&tenant(2))));
        assert!(old.uses(&upstream(1)) && !old.uses(&upstream(2)));
        assert!(new.uses(&upstream(2)) && !new.uses(&upstream(1)));
        assert_eq!(new.apply(3, [(host(1), None)]).lookup(&host(1)), None);
    }

    #[test]
    fn routes_have_one_form_on_disk() {
        let json = |route: &Route| serde_json::to_string(route).expect("json");
        assert_eq!(json(&Route::Platform), r#"{"to":"platform"}"#);
        assert_eq!(json(&tenant(80)), r#"{"to":"tenant","slug":"0123456789ab","upstream":{"tcp":"127.0.0.1:80"}}"#);
        let waiting = Route::Unavailable { slug: "0123456789ab".parse().expect("slug"), why: Why::AwaitingDeploy };
        assert_eq!(json(&waiting), r#"{"to":"unavailable","slug":"0123456789ab","why":"awaiting_deploy"}"#);
        for route in [Route::Platform, tenant(80), waiting] {
            assert_eq!(serde_json::from_str::<Route>(&json(&route)).expect("reads back"), route);
        }
    }

    proptest! {
        #[test]
        fn a_table_behaves_like_a_map(changes in prop::collection::vec((0..40u16, prop::option::of(0..8u16)), 0..120)) {
            let mut model = HashMap::new();
            let mut table = RouteTable::new();
            for (generation, (name, port)) in (1..).zip(changes) {
                table = table.apply(generation, [(host(name), port.map(tenant))]);
                match port {
                    Some(port) => drop(model.insert(host(name), tenant(port))),
                    None => drop(model.remove(&host(name))),
                }
                prop_assert_eq!(table.generation(), generation);
                for port in 0..8 {
                    prop_assert_eq!(table.uses(&upstream(port)), model.values().any(|route| *route == tenant(port)));
                }
            }
            prop_assert_eq!(table.len(), model.len());
            for (host, route) in table.iter() {
                prop_assert_eq!(model.get(host), Some(route));
            }
        }
    }
}
