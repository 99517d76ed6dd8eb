//! The registry over real HTTP.

mod access;
mod clients;
mod crash;
mod disk;
mod garbage;
mod image;
mod protocol;
mod push;
mod resume;
mod support;
