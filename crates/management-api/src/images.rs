//! The registry as the compute driver sees it.

use futures_util::future::BoxFuture;
use systemprompt_compute::{DriverError, ImageSource};
use systemprompt_contract::TenantId;
use systemprompt_oci::{Digest, StoredImage};
use systemprompt_registry::{ImageError, Registry};

/// Images straight from the registry's disk: the driver runs on the same host.
#[derive(Debug)]
pub(crate) struct RegistryImages {
    registry: Registry,
}

impl RegistryImages {
    pub(crate) fn new(registry: Registry) -> Self {
        Self { registry }
    }
}

impl ImageSource for RegistryImages {
    fn image(&self, tenant: TenantId, digest: &Digest) -> BoxFuture<'_, Result<StoredImage, DriverError>> {
        let digest = *digest;
        Box::pin(async move {
            self.registry.image(tenant, &digest).await.map_err(|error| match error {
                ImageError::NotFound => DriverError::NotFound(error.to_string()),
                ImageError::Store(_) => DriverError::Transient(error.to_string()),
                _ => DriverError::Rejected(error.to_string()),
            })
        })
    }
}
