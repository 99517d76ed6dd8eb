//! Reconcilers keep something true. They take no input, can be run at any time, and wait for the next pass when
//! something fails.

pub(crate) mod clusters;
pub(crate) mod garbage;
pub(crate) mod instances;
