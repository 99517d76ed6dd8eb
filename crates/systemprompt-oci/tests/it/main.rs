//! Builds images of small projects and looks at what came out.

mod build;
mod cache;
mod content;
mod project;
mod run;
