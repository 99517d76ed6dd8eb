//! A whole installation for tests: the real binaries on real PostgreSQL, killed and started at will, gone at the end.

mod app;
mod browser;
mod load;
mod stack;
mod world;

pub use app::{Pushed, TestApp, push, wait_over};
pub use browser::Browser;
pub use load::{LoadReport, open_loop};
pub use stack::program;
pub use stack::{CliOutput, PATIENCE, Stack, Start, TenantRef, until};
pub use world::{World, connect};
