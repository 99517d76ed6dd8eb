//! The whole stack, as a person and as an attacker would use it.

mod access;
mod browser;
mod crash;
mod deletion;
mod edge;
mod environment;
mod faults;
mod killed;
mod logs;
mod neighbours;
mod registry;
mod spine;
mod starts;
mod up;
