//! The edge: TLS, routing by host, forwarding, drain.
//!
//! Everything a request needs is in memory: a [`RouteTable`] and a [`CertTable`] arrive through `watch`
//! channels and are read as snapshots. Each worker is a thread with a runtime, listeners (`SO_REUSEPORT`)
//! and an upstream pool of its own, so that a request never crosses a core.
//!
//! ```text
//! socket -> TLS (CertTable by SNI) -> [h1: framing gate | h2: frame meter] -> hyper -> service -> pool -> upstream
//! ```

mod access;
mod answer;
mod bind;
mod body;
mod certs;
mod config;
mod connection;
mod edge;
mod exchange;
mod flood;
#[doc(hidden)]
pub mod gate;
mod headers;
mod input;
mod pool;
mod probe;
mod redirect;
mod routes;
mod service;
mod stream;
mod target;
mod tls;
mod tunnel;
mod unread;
mod upload;
mod upstream;
mod worker;

pub use bind::BindError;
pub use certs::{CertError, CertPattern, CertTable, Certificate};
pub use config::{EdgeConfig, Limits, Upstream};
pub use edge::{BoundEdge, DrainReport, Edge, EdgeHandle};
pub use probe::{ProbeAnswer, ProbeError, probe};
pub use routes::{Route, RouteTable, Why};
