//! A launch that is cut short anywhere converges, and there is never a second copy.

use crate::host::{Control, Host};
use futures_util::future::join_all;
use std::fs;
use systemprompt_compute::{
    AppHandle, ComputeDriver, InstanceHandle, InstanceState,
    testing::{CRASH_POINTS, get, poll, running},
};

/// SIGABRT: the point was passed, and not the end of the launch.
const ABORTED: Option<i32> = Some(6);

#[tokio::test(flavor = "multi_thread")]
async fn a_launch_that_dies_at_any_point_converges() {
    for point in CRASH_POINTS {
        let host = Host::new();
        let app = host.fixture().app();
        let spec = host.fixture().instance(&app, "serve");
        let mut control = Control::start(&host.order(Some(&spec)), |command| {
            command.env("SYSTEMPROMPT_CRASH_POINT", point);
        });
        let line = control.line();
        if point.starts_with("compute.launcher.") {
            assert!(line.starts_with("error "), "{point}: the launcher died, and launch says {line:?}");
            control.kill();
        } else {
            assert_eq!((line.as_str(), control.signal()), ("", ABORTED), "{point}");
        }

        let driver = host.driver();
        let handle = AppHandle::new(app.app.as_str());
        let found = driver.instances().await.expect("instances");
        assert!(found.len() <= 1, "{point}: {found:?}");
        let instance = driver.launch(&handle, &spec).await.unwrap_or_else(|error| panic!("{point}: {error}"));
        let address = running(&driver, &instance).await;
        poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
        assert_eq!(applications(&host, &handle), 1, "{point}: one copy");
        assert_eq!(driver.launch(&handle, &spec).await.as_ref(), Ok(&instance));
        assert_eq!(applications(&host, &handle), 1, "{point}: one copy after another launch");
        driver.destroy_app(&handle).await.expect("the app's end");
        host.check_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_launch_left_can_be_destroyed_without_launching_again() {
    for point in
        ["compute.launch.recorded", "compute.launch.namespace", "compute.launch.cgroup", "compute.launch.ordered"]
    {
        let host = Host::new();
        let app = host.fixture().app();
        let spec = host.fixture().instance(&app, "serve");
        let mut control = Control::start(&host.order(Some(&spec)), |command| {
            command.env("SYSTEMPROMPT_CRASH_POINT", point);
        });
        assert_eq!(control.line(), "");
        assert_eq!(control.signal(), ABORTED, "{point}");
        let driver = host.driver();
        let handle = AppHandle::new(app.app.as_str());
        let instance = InstanceHandle::new(format!("{}/{}", app.app, spec.deployment));
        let state = driver.inspect(&instance).await.expect("a state");
        assert_ne!(state, InstanceState::Absent, "{point}: orphans are found");
        driver.destroy_app(&handle).await.unwrap_or_else(|error| panic!("{point}: {error}"));
        poll("the launcher's end", || async { applications(&host, &handle) == 0 }).await;
        host.check_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_launches_at_once_make_one_instance() {
    let host = Host::new();
    let app = host.fixture().app();
    let drivers = [host.driver(), host.driver(), host.driver()];
    let handle = drivers[0].ensure_app(&app).await.expect("an app");
    let spec = host.fixture().instance(&app, "serve");
    let launches = join_all((0..12).map(|at| drivers[at % 3].launch(&handle, &spec))).await;
    let first = launches[0].as_ref().expect("a launch");
    assert!(launches.iter().all(|launch| launch.as_ref() == Ok(first)), "{launches:?}");
    let address = running(&drivers[1], first).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    assert_eq!(applications(&host, &handle), 1);

    // Launching, looking and stopping at once: each call ends, and nothing is left over.
    let launch = drivers[0].launch(&handle, &spec);
    let stop = drivers[1].stop(first, std::time::Duration::from_secs(5));
    let look = drivers[2].instances();
    let (launched, stopped, looked) = futures_util::join!(launch, stop, look);
    assert_eq!((launched.as_ref(), stopped), (Ok(first), Ok(())));
    assert_eq!(looked.expect("instances").len(), 1);
    assert!(applications(&host, &handle) <= 1);

    // Several deployments at once each get a network of their own.
    let specs: Vec<_> = (0..4).map(|_| host.fixture().instance(&app, "serve")).collect();
    let instances = join_all(specs.iter().map(|spec| drivers[0].launch(&handle, spec))).await;
    let mut addresses = Vec::new();
    for instance in &instances {
        addresses.push(running(&drivers[0], instance.as_ref().expect("a launch")).await);
    }
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 4, "{addresses:?}");
    drivers[0].destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

/// How many applications run under the app's own uid.
fn applications(host: &Host, app: &AppHandle) -> usize {
    let record = fs::read(host.data().join("apps").join(app.as_str()).join("app.json"));
    let Ok(record) = record else { return 0 };
    let record: serde_json::Value = serde_json::from_slice(&record).expect("record");
    let uid = record["uid"].as_u64().expect("uid").to_string();
    let is_application = |process: &std::path::Path| {
        let status = fs::read_to_string(process.join("status")).unwrap_or_default();
        let own = status.lines().any(|line| line.strip_prefix("Uid:\t").is_some_and(|rest| rest.starts_with(&uid)));
        let dead = status.contains("State:\tZ");
        own && !dead && fs::read(process.join("cmdline")).is_ok_and(|line| line.starts_with(b"/app/bin/app\0"))
    };
    fs::read_dir("/proc").expect("/proc").flatten().filter(|entry| is_application(&entry.path())).count()
}
