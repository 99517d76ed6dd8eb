//! What instances may use, and how it is told when they wanted more.

use crate::host::Host;
use std::time::{Duration, Instant};
use systemprompt_compute::{
    ComputeDriver, DriverError, ExitReason, InstanceHandle, InstanceSpec, InstanceState,
    process::ProcessDriver,
    testing::{get, image_of, poll, running},
};
use systemprompt_oci::{Digest, ImageConfig};

async fn exit_reason(driver: &ProcessDriver, instance: &InstanceHandle) -> ExitReason {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        match driver.inspect(instance).await.expect("a state") {
            InstanceState::Exited { reason, .. } => return reason,
            other => assert!(Instant::now() < deadline, "expected an end, got {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_beyond_the_limit_ends_the_instance_and_is_named() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let spec = InstanceSpec { memory_mb: 64, ..host.fixture().instance(&app, "allocate:300") };
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    assert_eq!(exit_reason(&driver, &instance).await, ExitReason::OutOfMemory);
    // Another driver says the same, and a new attempt starts with a clean count.
    assert_eq!(exit_reason(&host.driver(), &instance).await, ExitReason::OutOfMemory);

    let spec = InstanceSpec { memory_mb: 64, ..host.fixture().instance(&app, "serve") };
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(&driver, &instance).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    assert_eq!(get(address, "/allocate?20").await.expect("within the limit").0, 200);
    let _ = get(address, "/allocate?300").await;
    assert_eq!(exit_reason(&driver, &instance).await, ExitReason::OutOfMemory);
    driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(&driver, &instance).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    get(address, "/exit?3").await.expect_err("it ends before it answers");
    assert_eq!(exit_reason(&driver, &instance).await, ExitReason::Code(3), "the earlier end is not counted");
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_are_bounded_and_what_is_left_in_the_background_ends() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.run(&driver).await;
    let started: u64 = app.ask("/tasks?500").await.parse().expect("a number");
    assert!((30..64).contains(&started), "{started} of at most 64");
    driver.destroy_app(&app.app).await.expect("the app's end");

    let app = host.run(&driver).await;
    app.ask("/daemon").await;
    get(app.address, "/exit?5").await.expect_err("it ends before it answers");
    assert_eq!(exit_reason(&driver, &app.instance).await, ExitReason::Code(5));
    let files = host.data().join("apps").join(app.app.as_str());
    poll("the daemon's end", || async { crate::host::processes_of(&files).is_empty() }).await;
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_cannot_run_says_why() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let launch = |config: ImageConfig| {
        let image = image_of(host.directory.path(), &[Vec::new()], config).expect("image");
        let image = host.images.add(None, image);
        let spec = InstanceSpec { image, ..host.fixture().instance(&app, "serve") };
        let (driver, handle) = (&driver, &handle);
        async move { driver.launch(handle, &spec).await }
    };
    let none = launch(ImageConfig::default()).await;
    assert!(matches!(&none, Err(DriverError::Rejected(text)) if text.contains("ENTRYPOINT")), "{none:?}");
    let missing = launch(ImageConfig { entrypoint: vec!["/no/such".to_owned()], ..ImageConfig::default() }).await;
    let reason = exit_reason(&driver, &missing.expect("a launch")).await;
    assert!(matches!(&reason, ExitReason::SetupFailed(text) if text.contains("/no/such")), "{reason}");
    let nowhere = ImageConfig { cmd: vec!["/x".to_owned()], working_dir: "/none".to_owned(), ..ImageConfig::default() };
    let reason = exit_reason(&driver, &launch(nowhere).await.expect("a launch")).await;
    assert!(matches!(&reason, ExitReason::SetupFailed(text) if text.contains("/none")), "{reason}");
    let absent = InstanceSpec { image: Digest::of(b"absent"), ..host.fixture().instance(&app, "serve") };
    assert!(matches!(driver.launch(&handle, &absent).await, Err(DriverError::NotFound(_))));
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_tenants_image_and_app_are_refused() {
    let host = Host::new();
    let driver = host.driver();
    let (app, other) = (host.fixture().app(), host.fixture().app());
    let config = ImageConfig { entrypoint: vec!["/x".to_owned()], ..ImageConfig::default() };
    let image = image_of(host.directory.path(), &[Vec::new()], config).expect("image");
    let image = host.images.add(Some(other.tenant), image);
    let handle = driver.ensure_app(&app).await.expect("an app");
    let theirs = InstanceSpec { image, ..host.fixture().instance(&app, "serve") };
    assert!(matches!(driver.launch(&handle, &theirs).await, Err(DriverError::NotFound(_))));
    let intruder = host.fixture().instance(&other, "serve");
    assert!(matches!(driver.launch(&handle, &intruder).await, Err(DriverError::Conflict(_))));
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}
