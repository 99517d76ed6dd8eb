//! Private PostgreSQL clusters: find the server's binaries, initialise, start, adopt, stop.
//!
//! A cluster belongs to a data directory. It listens on a unix socket only, never runs as root, and is detached:
//! it outlives the process that started it and is found again by its files. [`Cluster::start`] may be called at any
//! time by anybody who may: it initialises what is absent, adopts what runs and starts what does not. Whoever calls
//! it is the superuser `systemprompt` by peer authentication; there is no password.
//!
//! Beside the data directory `D` lie `D.lock` (held during a start), `D.log` (what the server says, 0600) and, while
//! a cluster is being made, `D.init-tmp`, which becomes `D` in one rename.

mod binaries;
mod cluster;
mod data_directory;
mod error;
mod layout;
mod owner;
mod postmaster;
mod settings;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod wire;

pub use binaries::{BinarySearch, MINIMUM_VERSION};
pub use cluster::{Cluster, ClusterConfig, StopMode};
pub use error::PostgresError;
pub use layout::{prepare_runtime_directory, runtime_directory};
pub use settings::{Access, Durability};

/// The superuser of every cluster, and the owner of what is in it.
pub const SUPERUSER: &str = "systemprompt";
