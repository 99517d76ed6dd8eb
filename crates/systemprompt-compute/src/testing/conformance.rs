//! What every driver must do, as one body that runs against any of them.

use crate::{
    AppHandle, AppSpec, Capabilities, ComputeDriver, DriverError, ExitReason, InstanceHandle, InstanceSpec,
    InstanceState, LogStart,
};
use futures_util::{StreamExt, TryStreamExt};
use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};
use systemprompt_contract::{DeploymentId, Region, Secret, TenantId};
use systemprompt_oci::Digest;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// What the body needs: an image whose command is [`app_main`](super::app_main), for any tenant.
#[derive(Debug, Clone, Copy)]
pub struct Fixture {
    /// The image.
    pub image: Digest,
    /// Variables that every instance of it has besides those it is given: the image's own and the driver's.
    pub own_variables: &'static [&'static str],
}

impl Fixture {
    /// A new app of a new tenant.
    pub fn app(&self) -> AppSpec {
        let tenant = TenantId::new();
        AppSpec { app: tenant.slug().app_name(), tenant, region: Region::default(), memory_mb: 256 }
    }

    /// A new deployment of an app, with `TEST_APP` as its behaviour.
    pub fn instance(&self, app: &AppSpec, behaviour: &str) -> InstanceSpec {
        InstanceSpec {
            deployment: DeploymentId::new(),
            tenant: app.tenant,
            image: self.image,
            env: BTreeMap::from([("TEST_APP".to_owned(), Secret::new(behaviour))]),
            memory_mb: app.memory_mb,
            max_pids: 64,
        }
    }
}

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the whole body. `open` gives the driver anew each time, as another process would have it. The driver may have
/// other apps; they are left alone.
///
/// # Panics
/// With what was expected, when the driver does not conform.
pub async fn conformance(open: &(dyn Fn() -> Box<dyn ComputeDriver> + Sync), fixture: &Fixture) {
    let driver = &*open();
    let Capabilities { .. } = driver.capabilities();
    nothing_is_no_error(driver, fixture).await;
    life_of_an_instance(driver, fixture).await;
    environment_and_output(driver, fixture).await;
    ends_and_their_reasons(driver, fixture).await;
    two_of_one_app(driver, fixture).await;
    another_driver_goes_on(open, fixture).await;
}

async fn nothing_is_no_error(driver: &dyn ComputeDriver, fixture: &Fixture) {
    for text in ["", "unknown", "sp-000000000000", "sp-000000000000/00000000-0000-4000-8000-000000000000"] {
        let instance = InstanceHandle::new(text);
        assert_eq!(driver.inspect(&instance).await, Ok(InstanceState::Absent), "{text:?}");
        assert_eq!(driver.stop(&instance, Duration::ZERO).await, Ok(()), "{text:?}");
        assert_eq!(driver.remove(&instance).await, Ok(()), "{text:?}");
        assert_eq!(driver.destroy_app(&AppHandle::new(text)).await, Ok(()), "{text:?}");
        let first = driver.logs(&instance, LogStart::Beginning, false).next().await;
        assert!(matches!(first, None | Some(Err(DriverError::NotFound(_)))), "{text:?}: {first:?}");
    }
    let app = fixture.app();
    let unknown = driver.launch(&AppHandle::new(app.app.as_str()), &fixture.instance(&app, "serve")).await;
    assert!(matches!(unknown, Err(DriverError::NotFound(_))), "an app that was never made: {unknown:?}");
}

async fn life_of_an_instance(driver: &dyn ComputeDriver, fixture: &Fixture) {
    let app = fixture.app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    assert_eq!(driver.ensure_app(&app).await.as_ref(), Ok(&handle), "the same app again");
    let foreign = AppSpec { tenant: TenantId::new(), ..app.clone() };
    assert!(matches!(driver.ensure_app(&foreign).await, Err(DriverError::Conflict(_))), "another tenant's app");
    assert!(driver.apps().await.expect("apps").iter().any(|found| found.app == app.app));

    let spec = fixture.instance(&app, "serve");
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(driver, &instance).await;
    healthy(address).await;
    let process = get(address, "/link?/proc/self/ns/pid").await.expect("an answer");

    assert_eq!(driver.launch(&handle, &spec).await.as_ref(), Ok(&instance), "launched again: the same");
    let stored: InstanceHandle =
        serde_json::from_str(&serde_json::to_string(&instance).expect("text")).expect("handle");
    assert_eq!(running(driver, &stored).await, address);
    assert_eq!(get(address, "/link?/proc/self/ns/pid").await.expect("an answer"), process, "the same process");
    let other_image = InstanceSpec { image: Digest::of(b"another image"), ..spec.clone() };
    assert!(driver.launch(&handle, &other_image).await.is_err(), "another image under the same deployment");
    assert!(matches!(driver.remove(&instance).await, Err(DriverError::Conflict(_))), "removing what runs");

    assert_eq!(get(address, "/write?/app/storage/kept").await.expect("an answer").0, 200);
    let found = driver.instances().await.expect("instances");
    let found = found.iter().find(|found| found.handle == instance).expect("listed");
    assert_eq!((&found.app, found.deployment), (&app.app, spec.deployment));
    assert!(matches!(found.state, InstanceState::Running { .. }));

    driver.stop(&instance, PATIENCE).await.expect("a stop");
    driver.stop(&instance, PATIENCE).await.expect("a stop of what is stopped");
    assert_eq!(exit_reason(driver, &instance).await, ExitReason::Code(0), "the application ended by itself");
    assert!(!answers(address).await, "nothing answers any more");

    assert_eq!(driver.launch(&handle, &spec).await.as_ref(), Ok(&instance), "launched after its end: the same handle");
    let address = running(driver, &instance).await;
    healthy(address).await;
    assert_eq!(get(address, "/read?/app/storage/kept").await.expect("an answer").1, "written", "the volume is kept");
    driver.stop(&instance, PATIENCE).await.expect("a stop");
    let starts = lines(driver, &instance).await.iter().filter(|line| *line == "started serve").count();
    assert_eq!(starts, 2, "output is kept over a restart");

    driver.remove(&instance).await.expect("a removal");
    driver.remove(&instance).await.expect("a removal of what is removed");
    assert_eq!(driver.inspect(&instance).await, Ok(InstanceState::Absent));
    driver.destroy_app(&handle).await.expect("the app's end");
    driver.destroy_app(&handle).await.expect("the app's end again");
    assert!(!driver.apps().await.expect("apps").iter().any(|found| found.app == app.app));
    assert!(driver.instances().await.expect("instances").iter().all(|found| found.app != app.app));
}

async fn environment_and_output(driver: &dyn ComputeDriver, fixture: &Fixture) {
    let app = fixture.app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let mut spec = fixture.instance(&app, "serve");
    spec.env.insert("SPECIAL".to_owned(), Secret::new("a \"b\" $c `d` \n ü = '"));
    spec.env.insert("EMPTY".to_owned(), Secret::new(""));
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(driver, &instance).await;
    healthy(address).await;

    let environment = get(address, "/read?/proc/self/environ").await.expect("an answer").1;
    let found: BTreeMap<&str, &str> = environment.split('\0').filter_map(|pair| pair.split_once('=')).collect();
    let mut expected: Vec<&str> = spec.env.keys().map(String::as_str).collect();
    expected.extend(fixture.own_variables);
    expected.sort_unstable();
    expected.dedup();
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), expected, "names of the environment");
    for (name, value) in &spec.env {
        assert_eq!(found[name.as_str()], value.expose(), "{name}");
    }

    get(address, "/flood?2000").await.expect("an answer");
    poll("2000 lines", || async { lines(driver, &instance).await.len() >= 2002 }).await;
    let entries: Vec<_> = driver.logs(&instance, LogStart::Beginning, false).try_collect().await.expect("output");
    let after = entries[entries.len() - 5].cursor;
    let rest: Vec<_> = driver.logs(&instance, LogStart::After(after), false).try_collect().await.expect("output");
    assert_eq!(rest, entries[entries.len() - 4..], "a cursor means the entries after it");
    let tail: Vec<_> = driver.logs(&instance, LogStart::Tail(3), false).try_collect().await.expect("output");
    assert_eq!(tail, entries[entries.len() - 3..]);
    let mut following = driver.logs(&instance, LogStart::Tail(1), true);
    assert_eq!(following.next().await.expect("an entry").expect("entry"), entries[entries.len() - 1]);
    get(address, "/flood?1").await.expect("an answer");
    let next = tokio::time::timeout(PATIENCE, following.next()).await.expect("in time").expect("an entry");
    assert!(next.expect("entry").text.starts_with("000000000 xxx"));
    driver.destroy_app(&handle).await.expect("the end of an app with a running instance");
    assert_eq!(driver.inspect(&instance).await, Ok(InstanceState::Absent));
    assert!(!answers(address).await, "nothing answers any more");
}

async fn ends_and_their_reasons(driver: &dyn ComputeDriver, fixture: &Fixture) {
    let app = fixture.app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    for code in [0, 7] {
        let spec = fixture.instance(&app, &format!("exit:{code}"));
        let instance = driver.launch(&handle, &spec).await.expect("a launch");
        assert_eq!(exit_reason(driver, &instance).await, ExitReason::Code(code));
        assert_eq!(lines(driver, &instance).await, [format!("started exit:{code}")], "its last words");
    }
    let spec = fixture.instance(&app, "stubborn");
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(driver, &instance).await;
    healthy(address).await;
    let begun = Instant::now();
    driver.stop(&instance, Duration::from_millis(700)).await.expect("a stop");
    assert!(begun.elapsed() >= Duration::from_millis(700), "the grace is granted in full");
    assert!(lines(driver, &instance).await.contains(&"asked to terminate".to_owned()), "asked first");
    assert_eq!(exit_reason(driver, &instance).await, ExitReason::Signal(9));
    driver.destroy_app(&handle).await.expect("the app's end");
}

async fn two_of_one_app(driver: &dyn ComputeDriver, fixture: &Fixture) {
    let app = fixture.app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let old = driver.launch(&handle, &fixture.instance(&app, "serve")).await.expect("the old");
    healthy(running(driver, &old).await).await;
    if driver.capabilities().replace == crate::Replace::Overlap {
        let new = driver.launch(&handle, &fixture.instance(&app, "serve")).await.expect("the new beside the old");
        let (old_address, new_address) = (running(driver, &old).await, running(driver, &new).await);
        assert_ne!(old_address, new_address);
        healthy(new_address).await;
        healthy(old_address).await;
        driver.stop(&old, PATIENCE).await.expect("the old's end");
        healthy(new_address).await;
    }
    driver.destroy_app(&handle).await.expect("the app's end");
}

async fn another_driver_goes_on(open: &(dyn Fn() -> Box<dyn ComputeDriver> + Sync), fixture: &Fixture) {
    const VALUE: &str = "a-value-that-nobody-may-see";
    let app = fixture.app();
    let driver = open();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let mut spec = fixture.instance(&app, "serve");
    spec.env.insert("SECRET".to_owned(), Secret::new(VALUE));
    // A caller that gives up at once, and a driver that is gone: repeating converges.
    let given_up = tokio::time::timeout(Duration::from_millis(1), driver.launch(&handle, &spec)).await;
    drop((given_up, driver));
    let instance = open().launch(&handle, &spec).await.expect("a launch");
    let address = running(&*open(), &instance).await;
    healthy(address).await;
    let process = get(address, "/link?/proc/self/ns/pid").await.expect("an answer");

    let driver = open();
    assert_eq!(running(&*driver, &instance).await, address, "it outlives the driver that launched it");
    assert_eq!(driver.launch(&handle, &spec).await.as_ref(), Ok(&instance), "found again by another");
    assert_eq!(get(address, "/link?/proc/self/ns/pid").await.expect("an answer"), process, "the same process");
    let refused = InstanceSpec { image: Digest::of(b"another image"), ..spec.clone() };
    let error = driver.launch(&handle, &refused).await.expect_err("another image under the same deployment");
    let found = driver.instances().await.expect("instances");
    for text in [format!("{error} {error:?}"), format!("{instance:?} {found:?} {driver:?}")] {
        assert!(!text.contains(VALUE), "a value of the environment in {text}");
    }
    driver.destroy_app(&handle).await.expect("the app's end");
    assert!(!answers(address).await, "stopped by a driver that did not launch it");
}

/// Waits until the instance runs and returns its address.
///
/// # Panics
/// When it does not in time, or ends.
pub async fn running(driver: &dyn ComputeDriver, instance: &InstanceHandle) -> SocketAddr {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match driver.inspect(instance).await.expect("a state") {
            InstanceState::Running { address, .. } => return address,
            InstanceState::Starting if Instant::now() < deadline => tokio::time::sleep(Duration::from_millis(5)).await,
            other => panic!("expected a running instance, got {other:?}"),
        }
    }
}

async fn exit_reason(driver: &dyn ComputeDriver, instance: &InstanceHandle) -> ExitReason {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match driver.inspect(instance).await.expect("a state") {
            InstanceState::Exited { reason, .. } => return reason,
            other => assert!(Instant::now() < deadline, "expected an instance that has ended, got {other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn healthy(address: SocketAddr) {
    poll("health", || async { get(address, "/api/v1/health").await.is_ok_and(|(status, _)| status == 200) }).await;
}

/// Where nothing is any more, packets may vanish: no answer within a second is none.
async fn answers(address: SocketAddr) -> bool {
    let answer = tokio::time::timeout(Duration::from_secs(1), get(address, "/api/v1/health")).await;
    matches!(answer, Ok(Ok(_)))
}

async fn lines(driver: &dyn ComputeDriver, instance: &InstanceHandle) -> Vec<String> {
    let entries = driver.logs(instance, LogStart::Beginning, false);
    entries.map_ok(|entry| entry.text).try_collect().await.expect("output")
}

/// Waits until a condition holds.
///
/// # Panics
/// When it does not hold in time.
pub async fn poll<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "expected {what} in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Status and body of one HTTP request to the test application.
///
/// # Errors
/// When nothing answers within some seconds.
pub async fn get(address: SocketAddr, target: &str) -> io::Result<(u16, String)> {
    let exchange = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(format!("GET {target} HTTP/1.1\r\nHost: app\r\n\r\n").as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
        let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned());
        status.zip(body).ok_or_else(|| io::Error::other(format!("expected an HTTP answer, got {answer:?}")))
    };
    match tokio::time::timeout(Duration::from_secs(5), exchange).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "no answer within 5 s")),
    }
}
