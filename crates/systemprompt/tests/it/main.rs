//! The real program against a cloud in the test: exit codes, both streams, files.

mod cache;
mod cli;
mod cloud;
mod errors;
mod escapes;
mod following;
mod help;
mod json;
mod outputs;
mod serve;
