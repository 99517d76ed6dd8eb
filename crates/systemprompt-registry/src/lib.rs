//! The image registry: push and pull as the OCI distribution specification 1.1 says, on disk, a repository per tenant
//! behind one shared name.
//!
//! Every client sees the repository `systemprompt-images`. What is in it depends on the token: blobs, manifests, the
//! tag and uploads are looked up below the token's tenant and nowhere else, so "absent" and "not yours" are the same
//! lookup with the same answer. Contents are stored once; links say who may see them.
//!
//! ```text
//! ROOT/lock                          held by the running process
//! ROOT/blobs/HEX                     contents by digest, shared
//! ROOT/checked/HEX                   verdict on a layer (its diff id), so that it is read only once
//! ROOT/tenants/ID/links/HEX          this tenant has pushed the blob; its time is the last use
//! ROOT/tenants/ID/manifests/HEX      manifests
//! ROOT/tenants/ID/tag                digest of the manifest behind `tenant-ID`
//! ROOT/tenants/ID/uploads/UUID       an upload; its length is the offset
//! ```
//!
//! A crash leaves at most an upload that can go on, or a blob without a link that the next collection removes: a file
//! is complete and on disk before it gets its name, a blob has its name before its link, a manifest before its tag.

mod error;
mod token;

pub use error::{ImageError, InvalidImage, OpenError, StoreError};
pub use token::{Grant, TokenKey};
