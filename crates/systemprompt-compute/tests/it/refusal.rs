//! Hosts that lack something, and the driver without root.

use crate::host::{APP, Control, Host};
use std::{
    fs::{self, Permissions},
    os::unix::{fs::PermissionsExt, process::CommandExt},
    process::{Command, Stdio},
};
use systemprompt_compute::testing::ControlOrder;

const NOBODY: u32 = 65_534;

/// What a control plane says in a changed world: a shell line that runs before it, in namespaces of its own.
fn say_where(namespaces: &str, change: &str) -> String {
    let host = Host::new();
    let order = serde_json::to_string(&host.order(Some(&host.fixture().instance(&host.fixture().app(), "serve"))));
    let output = Command::new("unshare")
        .args([namespaces, "sh", "-c", &format!("{change} && exec \"$@\""), "sh", APP, "control-plane"])
        .arg(order.expect("order"))
        .stdin(Stdio::null())
        .output()
        .expect("unshare");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

#[test]
fn without_bubblewrap_it_says_what_to_install() {
    let said = say_where("-m", "mount --bind /dev/null $(command -v bwrap)");
    assert!(said.starts_with("error ") && said.contains("apt-get install bubblewrap"), "{said}");
}

#[test]
fn without_iptables_it_says_what_to_install() {
    let said = say_where("-m", "mount --bind /dev/null $(command -v iptables-restore)");
    assert!(said.starts_with("error ") && said.contains("apt-get install iptables"), "{said}");
}

#[test]
fn without_user_namespaces_it_says_what_to_allow() {
    let said = say_where("-Ur", "echo 0 > /proc/sys/user/max_user_namespaces");
    assert!(said.starts_with("error ") && said.contains("user namespaces must be allowed"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_root_there_is_one_tenant_unless_told_otherwise() {
    let host = Host::new();
    let directory = host.directory.path();
    std::os::unix::fs::chown(directory, Some(NOBODY), Some(NOBODY)).expect("chown");
    for entry in fs::read_dir(directory).expect("directory").flatten() {
        std::os::unix::fs::chown(entry.path(), Some(NOBODY), Some(NOBODY)).expect("chown");
    }
    // The program lies where nobody may look, perhaps.
    let program = directory.join("program");
    fs::copy(APP, &program).expect("copy");
    fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("mode");
    let run = |order: &ControlOrder| {
        let mut command = Command::new(&program);
        command.arg("control-plane").arg(serde_json::to_string(order).expect("order"));
        command.stdin(Stdio::null()).uid(NOBODY).gid(NOBODY);
        let output = command.output().expect("a control plane");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    };
    let order = |unsafe_shared| {
        let app = host.fixture().app();
        ControlOrder { unsafe_shared, ..host.order(Some(&host.fixture().instance(&app, "serve"))) }
    };
    let first = order(false);
    let said = run(&first);
    assert!(said.starts_with("ok "), "{said}");
    let address = shared_address(&host, &said);
    assert!(address.ip().is_loopback());
    let health = || async { systemprompt_compute::testing::get(address, "/api/v1/health").await.is_ok() };
    systemprompt_compute::testing::poll("health", health).await;
    assert_eq!(run(&first), said, "the same again");
    let refused = run(&order(false));
    assert!(refused.starts_with("error ") && refused.contains("--unsafe-shared"), "{refused}");
    let accepted = run(&order(true));
    assert!(accepted.starts_with("ok "), "{accepted}");
    let destroyed = run(&host.order(None));
    assert_eq!(destroyed, "ok", "stopped without root as well");
    assert!(!health().await);

    let orders = [order(false), order(false)];
    let said = std::thread::scope(|scope| {
        let threads = orders.each_ref().map(|order| scope.spawn(|| run(order)));
        threads.map(|thread| thread.join().expect("no panic"))
    });
    let started: Vec<_> = said.iter().filter(|said| said.starts_with("ok ")).collect();
    assert!(started.len() == 1 && said.iter().any(|said| said.contains("--unsafe-shared")), "of two at once: {said:?}");
    let address = shared_address(&host, started[0]);
    let health = || async { systemprompt_compute::testing::get(address, "/api/v1/health").await.is_ok() };
    systemprompt_compute::testing::poll("health", health).await;
    systemprompt_compute::testing::get(address, "/exit?0").await.expect_err("it ends before it answers");
    systemprompt_compute::testing::poll("its end", || async { crate::host::processes_of(&host.data()).is_empty() })
        .await;
    let next = run(&order(false));
    assert!(next.starts_with("ok "), "what has ended does not count: {next}");
    assert_eq!(run(&host.order(None)), "ok");
    assert_eq!(crate::host::processes_of(&host.data()), Vec::<String>::new());
}

/// The address in the record of the instance that a control plane launched.
fn shared_address(host: &Host, said: &str) -> std::net::SocketAddr {
    let (app, deployment) = said.trim_start_matches("ok ").split_once('/').expect("a handle");
    let path = host.data().join("apps").join(app).join("instances").join(deployment).join("instance.json");
    let record: serde_json::Value = serde_json::from_slice(&fs::read(path).expect("record")).expect("record");
    record["reach"]["shared"]["address"].as_str().expect("address").parse().expect("address")
}

#[test]
fn a_control_plane_that_ends_by_itself_is_no_fault_of_the_tests() {
    let host = Host::new();
    let control = Control::start(&host.order(None), |_| {});
    assert_eq!(control.signal(), None);
}
