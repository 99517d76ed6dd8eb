//! A control plane to be killed: a process that launches one instance and then waits.

use super::{app_image, image::ImageDirectory};
use crate::{
    AppSpec, ComputeDriver, InstanceSpec,
    process::{ProcessConfig, ProcessDriver},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    ffi::OsString,
    io::{self, Read, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};
use systemprompt_contract::{DeploymentId, Region, Secret, TenantId};

/// What the control plane is to do, as JSON in its only argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControlOrder {
    /// The driver's data directory.
    pub data: PathBuf,
    /// Where the image's layer is written.
    pub images: PathBuf,
    /// Whose app.
    pub tenant: TenantId,
    /// What to launch; nothing: destroy all apps.
    pub deployment: Option<DeploymentId>,
    /// As [`ProcessConfig::unsafe_shared`].
    pub unsafe_shared: bool,
}

/// Does what its argument says, prints `ok HANDLE` or `error TEXT`, and waits for the end of stdin.
///
/// # Panics
/// When there is no runtime to be had.
pub fn control_main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let order = arguments.next().and_then(|order| serde_json::from_str(order.to_str()?).ok());
    let Some(order) = order else { return ExitCode::from(64) };
    let runtime = tokio::runtime::Runtime::new().expect("runtime");
    let line = match runtime.block_on(run(&order)) {
        Ok(handle) => format!("ok {handle}\n"),
        Err(error) => format!("error {error}\n"),
    };
    let _ = io::stdout().write_all(line.as_bytes());
    let _ = io::stdin().read_to_end(&mut Vec::new());
    ExitCode::SUCCESS
}

async fn run(order: &ControlOrder) -> Result<String, Box<dyn std::error::Error>> {
    let program = std::env::current_exe()?;
    let images = Arc::new(ImageDirectory::default());
    let image = images.add(None, app_image(&order.images, &program)?);
    let launcher = vec!["/proc/self/exe".into(), "launch-instance".into()];
    let config = ProcessConfig {
        unsafe_shared: order.unsafe_shared,
        ..ProcessConfig::new(order.data.clone(), launcher, images)
    };
    let driver = ProcessDriver::open(config)?;
    let Some(deployment) = order.deployment else {
        for found in driver.apps().await? {
            driver.destroy_app(&found.handle).await?;
        }
        return Ok(String::new());
    };
    let tenant = order.tenant;
    let (app, region) = (tenant.slug().app_name(), Region::default());
    let app = driver.ensure_app(&AppSpec { app, tenant, region, memory_mb: 256 }).await?;
    let env = BTreeMap::from([("TEST_APP".to_owned(), Secret::new("serve"))]);
    let spec = InstanceSpec { deployment, tenant, image, env, memory_mb: 256, max_pids: 64 };
    Ok(driver.launch(&app, &spec).await?.to_string())
}
