//! Instances and their output outlive the control plane.

use crate::host::{Control, Host};
use futures_util::TryStreamExt;
use systemprompt_compute::{
    ComputeDriver, InstanceHandle, InstanceState, LogStart,
    testing::{get, poll, running},
};

const LINES: usize = 100_000;

#[tokio::test(flavor = "multi_thread")]
async fn ten_megabytes_survive_the_death_of_the_control_plane() {
    let host = Host::new();
    let app = host.fixture().app();
    let spec = host.fixture().instance(&app, "serve");
    let mut control = Control::start(&host.order(Some(&spec)), |_| {});
    let line = control.line();
    let handle = InstanceHandle::new(line.strip_prefix("ok ").expect(&line));

    // A second driver looks on while the first lives; the application starts to write.
    let driver = host.driver();
    let address = running(&driver, &handle).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    let process = get(address, "/link?/proc/self/ns/pid").await.expect("an answer");
    get(address, &format!("/flood?{LINES}")).await.expect("an answer");
    control.kill();
    drop(driver);

    for _ in 0..20 {
        assert_eq!(get(address, "/api/v1/health").await.expect("it keeps answering").0, 200);
    }
    let driver = host.driver();
    let found = driver.instances().await.expect("instances");
    assert_eq!(found.len(), 1);
    assert_eq!((&found[0].handle, found[0].deployment), (&handle, spec.deployment));
    assert!(matches!(found[0].state, InstanceState::Running { address: found, .. } if found == address));
    let numbered = || async {
        let entries = driver.logs(&handle, LogStart::Beginning, false);
        let lines: Vec<_> = entries.map_ok(|entry| entry.text).try_collect().await.expect("output");
        lines.into_iter().filter(|line| line.ends_with("xxx")).collect::<Vec<_>>()
    };
    poll("all lines", || async { numbered().await.len() >= LINES }).await;
    for (number, line) in numbered().await.iter().enumerate() {
        assert_eq!(line.len(), 99, "line {number} is whole");
        assert_eq!(line[..9].parse(), Ok(number), "no line is lost, doubled or out of order");
    }
    assert_eq!(get(address, "/link?/proc/self/ns/pid").await.expect("an answer"), process, "the same process");

    let app = systemprompt_compute::AppHandle::new(app.app.as_str());
    assert_eq!(driver.launch(&app, &spec).await.as_ref(), Ok(&handle), "a launch finds it again");
    driver.destroy_app(&app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_bounded_and_no_line_of_what_is_kept_is_lost() {
    let host = Host::new();
    let config = systemprompt_compute::process::ProcessConfig { output_bytes: 1 << 20, ..host.config() };
    let driver = systemprompt_compute::process::ProcessDriver::open(config).expect("a driver");
    let app = host.run(&driver).await;
    app.ask("/flood?100000").await;
    let output = host.data().join("apps").join(app.app.as_str()).join("instances");
    let output = output.join(app.spec.deployment.to_string()).join("output");
    poll("a trimmed output", || async {
        let meta = std::fs::metadata(&output).expect("output");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&meta);
        meta.len() > 10_000_000 && blocks * 512 < 2 << 20
    })
    .await;
    let kept: Vec<_> = driver.logs(&app.instance, LogStart::Beginning, false).try_collect().await.expect("output");
    assert_eq!(&kept[kept.len() - 1].text[..9], "000099999");
    let first: usize = kept[0].text[..9].parse().expect("a whole line after the hole");
    assert!(kept.len() >= (1 << 20) / 100 && first + kept.len() == 100_000, "from {first}: {}", kept.len());
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_cannot_cut_off_what_it_has_printed() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.run(&driver).await;
    let lines = || async {
        let entries = driver.logs(&app.instance, LogStart::Beginning, false);
        entries.map_ok(|entry| entry.text).try_collect::<Vec<_>>().await.expect("output")
    };
    // As `echo > /dev/stdout` does: with O_TRUNC.
    assert_eq!(app.ask("/write?/dev/stdout").await, "written");
    poll("the line", || async { lines().await.iter().any(|line| line == "written") }).await;
    assert_eq!(lines().await[0], "started serve");
    app.ask("/flood?5000").await;
    get(app.address, "/exit?0").await.expect_err("it ends before it answers");
    poll("its end", || async { matches!(driver.inspect(&app.instance).await, Ok(InstanceState::Exited { .. })) }).await;
    let found = lines().await;
    driver.launch(&app.app, &app.spec).await.expect("a launch");
    assert_eq!(lines().await[..found.len()], found, "nothing came after its end");
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_of_an_earlier_boot_has_ended_and_starts_again() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.run(&driver).await;
    driver.stop(&app.instance, std::time::Duration::from_secs(5)).await.expect("a stop");
    let files = host.data().join("apps").join(app.app.as_str()).join("instances").join(app.spec.deployment.to_string());
    // What a machine that lost power leaves: no exit code, and another boot. The pids may mean anybody by now.
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("boot");
    for name in ["instance.json", "status"] {
        let text = std::fs::read_to_string(files.join(name)).expect(name);
        let text: String =
            text.lines().filter(|line| !line.contains("exit-code")).map(|line| line.to_owned() + "\n").collect();
        let text = text.replace(boot.trim(), "00000000-0000-4000-8000-000000000000");
        let pid = std::process::id();
        let text = text.replace("\"child-pid\": ", &format!("\"child-pid\": {pid}, \"was\": "));
        std::fs::write(files.join(name), text).expect(name);
    }
    let state = driver.inspect(&app.instance).await.expect("a state");
    let unknown = systemprompt_compute::ExitReason::Unknown;
    assert!(matches!(&state, InstanceState::Exited { reason, .. } if *reason == unknown), "{state:?}");
    driver.launch(&app.app, &app.spec).await.expect("a launch");
    let address = running(&driver, &app.instance).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_of_the_data_directory_takes_nothing_of_the_originals() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.run(&driver).await;
    let copy = host.directory.path().join("copy");
    let copied = std::process::Command::new("cp").arg("-a").args([&host.data(), &copy]).status().expect("cp");
    assert!(copied.success());
    let config = systemprompt_compute::process::ProcessConfig { data: copy.clone(), ..host.config() };
    let second = systemprompt_compute::process::ProcessDriver::open(config).expect("a driver");
    assert_ne!(std::fs::read_to_string(copy.join("installation")).expect("id"), host.id());
    let state = second.inspect(&app.instance).await.expect("a state");
    assert!(matches!(state, InstanceState::Exited { .. }), "not what runs for the original: {state:?}");
    second.destroy_app(&app.app).await.expect("the copy's end");
    assert_eq!(app.ask("/read?/proc/self/comm").await.trim(), "app", "the original runs on");
    driver.destroy_app(&app.app).await.expect("the app's end");
    host.check_nothing_left();
}
