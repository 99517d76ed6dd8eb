//! Private clusters on the host's real PostgreSQL.
#![allow(clippy::unwrap_used, reason = "a test's helpers may fail as the test itself")]

mod access;
mod adoption;
mod refusal;
mod support;
mod testing;
