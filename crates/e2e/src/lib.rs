//! A whole installation for tests: the real binaries on real PostgreSQL, killed and started at will, gone at the end.

mod app;
mod browser;
mod load;
mod person;
mod stack;
mod world;

pub use app::{Pushed, TestApp, push, wait_over};
pub use browser::Browser;
pub use load::{LoadClients, LoadReport, open_loop};
pub use person::{CliOutput, NO_WAY_HOME, TenantRef};
pub use stack::{PATIENCE, Stack, Start, program, until};
pub use world::{World, app_processes, connect};
