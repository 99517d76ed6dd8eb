//! Where tenants run: the [`ComputeDriver`] trait, and [`process::ProcessDriver`], the embedded default that runs
//! an unpacked image in a bubblewrap sandbox on this host.
//!
//! A driver holds no state that only its memory knows: every handle it gives out is text that finds the same app
//! or instance again in another process, and every call may be repeated. Nothing here can express a certificate
//! or a host name: those belong to the edge alone.

mod driver;
mod error;
pub mod process;
#[cfg(feature = "testing")]
pub mod testing;

pub use driver::{
    AppHandle, AppSpec, Capabilities, ComputeDriver, ExitReason, FoundApp, FoundInstance, ImageSource, InstanceHandle,
    InstanceSpec, InstanceState, LogEntry, LogStart, Replace,
};
pub use error::{CapacityScope, DriverError, Next};
