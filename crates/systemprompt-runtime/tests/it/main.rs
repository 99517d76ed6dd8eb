//! The tenant's server over HTTP and over raw sockets, beside a real PostgreSQL.

mod health;
mod lifecycle;
mod site;
mod tenant;
