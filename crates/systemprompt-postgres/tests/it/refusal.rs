//! What it refuses, and what it says.

use crate::support::{Place, child, child_argument, is_running, pid_of, sql, start, stop};
use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};
use systemprompt_postgres::{BinarySearch, Cluster, PostgresError};

async fn refused_with(config: systemprompt_postgres::ClusterConfig, bin: &Path) -> String {
    Cluster::start_with(config, BinarySearch::only(bin)).await.unwrap_err().to_string()
}

fn fake_binaries(bin: &Path, version: u32) {
    fs::create_dir_all(bin).unwrap();
    for name in ["postgres", "initdb"] {
        fs::write(bin.join(name), format!("#!/bin/sh\necho '{name} (PostgreSQL) {version}.3'\n")).unwrap();
        fs::set_permissions(bin.join(name), Permissions::from_mode(0o755)).unwrap();
    }
}

#[tokio::test]
async fn missing_and_old_servers_are_named_with_the_cure() {
    let place = Place::new();
    let bin = place.path().join("bin");
    fs::create_dir(&bin).unwrap();
    let error = refused_with(place.control(), &bin).await;
    for part in ["apt-get install postgresql", "create_main_cluster = false", &bin.display().to_string()] {
        assert!(error.contains(part), "{error}");
    }
    fake_binaries(&bin, 13);
    let error = refused_with(place.control(), &bin).await;
    assert!(error.contains("expected PostgreSQL 15 or newer, found 13"), "{error}");
    assert!(!place.path().join("control").exists());
}

#[tokio::test]
async fn data_of_another_version_is_not_opened() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    stop(&cluster).await;
    let version_file = place.path().join("control/PG_VERSION");
    let before = fs::read_to_string(&version_file).unwrap();
    fs::write(&version_file, "99\n").unwrap();
    let error = start(place.control()).await.unwrap_err();
    assert!(matches!(&error, PostgresError::VersionMismatch { wanted: 99, .. }), "{error}");
    assert!(error.to_string().contains("apt-get install postgresql-99"), "{error}");
    fs::write(&version_file, before).unwrap();
    stop(&start(place.control()).await.unwrap()).await;
}

#[tokio::test]
async fn what_is_not_ours_is_left_as_it_is() {
    let place = Place::new();
    let data = place.path().join("control");
    fs::write(&data, "precious").unwrap();
    let error = start(place.control()).await.unwrap_err().to_string();
    assert!(error.contains("not a directory"), "{error}");
    assert_eq!(fs::read_to_string(&data).unwrap(), "precious");

    fs::remove_file(&data).unwrap();
    fs::create_dir(&data).unwrap();
    fs::write(data.join("thesis.txt"), "precious").unwrap();
    let error = start(place.control()).await.unwrap_err().to_string();
    assert!(error.contains("it holds other files"), "{error}");
    assert_eq!(fs::read_to_string(data.join("thesis.txt")).unwrap(), "precious");

    // An empty directory is as good as none.
    fs::remove_file(data.join("thesis.txt")).unwrap();
    let cluster = start(place.control()).await.unwrap();
    stop(&cluster).await;

    // A whole cluster that something else made, then one of ours that lost a part.
    fs::rename(data.join("systemprompt.cluster"), place.path().join("marker")).unwrap();
    let error = start(place.control()).await.unwrap_err().to_string();
    assert!(error.contains("something else made"), "{error}");
    fs::rename(place.path().join("marker"), data.join("systemprompt.cluster")).unwrap();
    fs::rename(data.join("global/pg_control"), place.path().join("pg_control")).unwrap();
    let error = start(place.control()).await.unwrap_err().to_string();
    assert!(error.contains("missing"), "{error}");
    assert!(data.join("base").exists());
}

#[tokio::test]
async fn a_private_parent_is_named_with_the_command_that_opens_it() {
    let place = Place::new();
    let parent = place.path().join("private");
    fs::create_dir(&parent).unwrap();
    fs::set_permissions(&parent, Permissions::from_mode(0o700)).unwrap();
    let mut config = place.control();
    config.data = parent.join("deep/control");
    let error = Cluster::start(config.clone()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("chmod o+x {}", parent.display())), "{error}");
    assert!(error.contains("postgres"), "{error}");
    fs::set_permissions(&parent, Permissions::from_mode(0o711)).unwrap();
    config.data = place.path().join("control");
    start(config).await.unwrap();
}

#[tokio::test]
async fn a_server_that_something_else_started_is_not_touched() {
    let place = Place::new();
    let cluster = start(place.control()).await.unwrap();
    stop(&cluster).await;
    let data = place.path().join("control");
    let sockets = place.path().join("elsewhere");
    fs::create_dir(&sockets).unwrap();
    fs::set_permissions(&sockets, Permissions::from_mode(0o777)).unwrap();
    let bin = newest_bin();
    let started = Command::new("setpriv")
        .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
        .arg(bin.join("pg_ctl"))
        .args(["-w", "-s", "-l", "/dev/null", "-D"])
        .arg(&data)
        .arg("-o")
        .arg(format!("-c listen_addresses= -c dynamic_shared_memory_type=mmap -k {}", sockets.display()))
        .arg("start")
        .current_dir("/")
        .status()
        .unwrap();
    assert!(started.success());
    let pid = pid_of(&data);
    let error = start(place.control()).await.unwrap_err().to_string();
    assert!(error.contains(&format!("kill -INT {pid}")), "{error}");
    assert!(error.contains(&sockets.display().to_string()), "{error}");
    assert!(is_running(&pid));
}

fn newest_bin() -> std::path::PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").unwrap().flatten();
    versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("pg_ctl").exists()).max().unwrap()
}

#[tokio::test]
async fn a_server_that_does_not_start_is_quoted() {
    let place = Place::new();
    let mut config = place.control();
    config.settings.push(("no_such_setting".to_owned(), "1".to_owned()));
    let error = start(config).await.unwrap_err().to_string();
    assert!(error.contains("no_such_setting") && error.contains("control.log"), "{error}");
    // What was made is whole all the same.
    let cluster = start(place.control()).await.unwrap();
    assert_eq!(sql(&cluster.url("postgres"), "SELECT 1").unwrap(), "1");
}

#[tokio::test]
async fn a_full_disk_is_named_and_leaves_room_for_another_try() {
    const TEST: &str = "refusal::a_full_disk_is_named_and_leaves_room_for_another_try";
    let place = Place::new();
    if let Some(root) = child_argument() {
        let mut config = place.control();
        config.data = root.join("full/control");
        let error = Cluster::start(config).await.unwrap_err().to_string();
        fs::write(root.join("said"), error).unwrap();
        let larger = Command::new("mount").args(["-o", "remount,size=256m"]).arg(root.join("full")).status().unwrap();
        assert!(larger.success());
        let mut config = place.control();
        config.data = root.join("full/control");
        stop(&start(config).await.unwrap()).await;
        return;
    }
    fs::create_dir(place.path().join("full")).unwrap();
    // The small file system exists in the child's own mount namespace only, so it ends with the child.
    let mount = format!("mount -t tmpfs -o size=8m,mode=711 none {}/full && exec \"$@\"", place.path().display());
    let inner = child(TEST, place.path());
    let status = Command::new("unshare")
        .args(["-m", "sh", "-c", &mount, "sh"])
        .arg(inner.get_program())
        .args(inner.get_args())
        .envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    let said = fs::read_to_string(place.path().join("said")).unwrap();
    assert!(said.contains("No space left on device"), "{said}");
}
