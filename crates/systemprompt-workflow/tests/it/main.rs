//! The engine and the event log on real PostgreSQL.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail as the test itself")]

mod crash;
mod database;
mod events;
mod helpers;
mod lab;
mod lease;
mod queue;
mod run;
