//! The edge from outside: real TLS clients and raw sockets in front, real HTTP servers behind.

mod access;
mod answers;
mod bind;
mod drain;
mod framing;
mod gate;
mod harness;
mod headers;
mod limits;
mod names;
mod probe;
mod streaming;
mod switch;
mod upgrade;
