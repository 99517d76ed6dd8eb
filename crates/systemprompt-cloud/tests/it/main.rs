//! The client library against a server in the test, and its files against everything that can happen to files.

mod api;
mod deploy;
mod files;
mod login;
mod streams;
