//! Support for testing drivers: one body of conformance that every driver must pass, an application that does on
//! request what tenants' applications may do, and an image to put it in.

mod app;
mod conformance;
mod control;
mod image;

pub use app::app_main;
pub use conformance::{Fixture, conformance, get, poll, running};
pub use control::{ControlOrder, control_main};
pub use image::{ImageDirectory, app_image, app_layer, image_of, shared_libraries};

/// Names that `SYSTEMPROMPT_CRASH_POINT` may have in a debug build: the driver, or its launcher, aborts there in the
/// middle of a launch.
pub const CRASH_POINTS: &[&str] = &crate::process::crash::OF_A_LAUNCH;
