//! What can happen to private files: other users, links, other writers, a kill at any instant, a full disk.

use chrono::Utc;
use std::{
    fs,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use systemprompt_cloud::{
    ApiUrl, CloudCredentials, CredentialsError, PrivateFileError, StoredTenant, TenantStore, TenantStoreError,
};
use systemprompt_contract::Secret;
use tempfile::TempDir;

fn project() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join(".systemprompt/credentials.json");
    (directory, path)
}

fn credentials(token: impl Into<String>) -> CloudCredentials {
    CloudCredentials {
        api_token: Secret::new(token),
        api_url: ApiUrl::default(),
        authenticated_at: Some(Utc::now()),
        user_email: "dev@example.com".to_owned(),
    }
}

fn tenant(id: &str) -> StoredTenant {
    StoredTenant { id: id.to_owned(), name: id.to_owned(), ..StoredTenant::default() }
}

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).expect("exists").permissions().mode() & 0o7777
}

#[test]
fn what_is_written_is_read_and_nothing_is_left_over() {
    let (directory, path) = project();
    assert!(CloudCredentials::load_from_path(&path).expect("absent is fine").is_none());
    let written = credentials("sp_live_a.b.c");
    written.save_to_path(&path).expect("saved");
    assert_eq!(CloudCredentials::load_from_path(&path).expect("read"), Some(written));
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("a parent")), 0o700);
    let mut names: Vec<_> = fs::read_dir(directory.path().join(".systemprompt"))
        .expect("listed")
        .flatten()
        .map(|entry| entry.file_name())
        .collect();
    names.sort();
    assert_eq!(names, [".gitignore", "credentials.json"]);
    assert_eq!(fs::read_to_string(directory.path().join(".systemprompt/.gitignore")).expect("read"), "*\n");
    assert!(
        CloudCredentials::delete_at_path(&path).expect("removed")
            && !CloudCredentials::delete_at_path(&path).expect("gone")
    );
}

#[test]
fn the_ignore_file_is_ensured_at_every_write() {
    let (_directory, path) = project();
    credentials("a").save_to_path(&path).expect("saved");
    let ignore = path.with_file_name(".gitignore");
    fs::remove_file(&ignore).expect("removed");
    credentials("b").save_to_path(&path).expect("saved");
    assert_eq!(fs::read_to_string(&ignore).expect("made again"), "*\n");
    fs::write(&ignore, "docker/\n!credentials.json\n").expect("written");
    credentials("c").save_to_path(&path).expect("saved");
    assert_eq!(fs::read_to_string(&ignore).expect("completed"), "docker/\n!credentials.json\n*\n");
}

#[test]
fn files_of_other_clients_are_read() {
    let (_directory, path) = project();
    credentials("x").save_to_path(&path).expect("saved");
    fs::write(&path, r#"{"api_token":"sp_live_abc123...","api_url":"https://api.systemprompt.io","user_email":"developer@example.com"}"#).expect("written");
    let read = CloudCredentials::load_from_path(&path).expect("the seed's three fields").expect("there");
    assert_eq!(read.authenticated_at, None);
    for bad in [
        "",
        "{",
        "[]",
        r#"{"api_token":"hunter2"}"#,
        r#"{"api_token":"hunter2","api_url":"http://evil.example","user_email":"a@b"}"#,
    ] {
        fs::write(&path, bad).expect("written");
        let error = CloudCredentials::load_from_path(&path).expect_err(bad);
        assert!(!error.to_string().contains("hunter2"), "{error}");
        assert!(error.hint(&ApiUrl::default()).is_some());
    }
}

#[test]
fn no_link_and_nothing_but_a_plain_file_is_followed() {
    let (directory, path) = project();
    let elsewhere = directory.path().join("elsewhere");
    fs::write(&elsewhere, "theirs").expect("written");
    fs::create_dir(path.parent().expect("a parent")).expect("made");
    symlink(&elsewhere, &path).expect("linked");
    for error in [CloudCredentials::load_from_path(&path).err(), credentials("a").save_to_path(&path).err()] {
        assert!(matches!(error, Some(CredentialsError::File(PrivateFileError::Link(_)))), "{error:?}");
    }
    assert_eq!(fs::read_to_string(&elsewhere).expect("untouched"), "theirs");
    fs::remove_file(&path).expect("removed");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0).expect("a FIFO");
    for error in [CloudCredentials::load_from_path(&path).err(), credentials("a").save_to_path(&path).err()] {
        assert!(matches!(error, Some(CredentialsError::File(PrivateFileError::NotAFile(_)))), "{error:?}");
    }
    // The ignore file and the temporary file are no way out either.
    fs::remove_file(&path).expect("removed");
    symlink(&elsewhere, path.with_file_name(".credentials.json.tmp")).expect("linked");
    credentials("a").save_to_path(&path).expect("the link is replaced, not followed");
    symlink(&elsewhere, path.with_file_name(".gitignore.x")).expect("linked");
    fs::rename(path.with_file_name(".gitignore.x"), path.with_file_name(".gitignore")).expect("renamed");
    assert!(credentials("b").save_to_path(&path).is_err());
    assert_eq!(fs::read_to_string(&elsewhere).expect("untouched"), "theirs");
}

#[test]
fn a_file_that_others_could_read_is_closed_to_them() {
    let (_directory, path) = project();
    credentials("a").save_to_path(&path).expect("saved");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).expect("opened");
    CloudCredentials::load_from_path(&path).expect("loaded");
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn a_hard_link_elsewhere_keeps_its_content() {
    let (directory, path) = project();
    credentials("old").save_to_path(&path).expect("saved");
    let elsewhere = directory.path().join("elsewhere");
    fs::hard_link(&path, &elsewhere).expect("linked");
    credentials("new").save_to_path(&path).expect("saved");
    assert!(fs::read_to_string(&elsewhere).expect("read").contains("old"));
    assert_ne!(fs::metadata(&elsewhere).expect("there").ino(), fs::metadata(&path).expect("there").ino());
}

#[test]
fn a_directory_of_somebody_else_is_refused_and_one_open_to_others_is_closed() {
    let (directory, path) = project();
    let state = path.parent().expect("a parent").to_owned();
    let elsewhere = directory.path().join("real");
    fs::create_dir(&elsewhere).expect("made");
    symlink(&elsewhere, &state).expect("linked");
    let error = credentials("a").save_to_path(&path).expect_err("a link");
    assert!(matches!(error, CredentialsError::File(PrivateFileError::Link(_))), "{error:?}");
    assert_eq!(fs::read_dir(&elsewhere).expect("listed").count(), 0);
    fs::remove_file(&state).expect("removed");
    fs::create_dir(&state).expect("made");
    fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).expect("opened");
    credentials("a").save_to_path(&path).expect("saved");
    assert_eq!(mode(&state), 0o755);
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&state, Some(12345), None).expect("given away");
        let error = CloudCredentials::load_from_path(&path).expect_err("not ours");
        assert!(matches!(error, CredentialsError::File(PrivateFileError::Foreign { owner: 12345, .. })), "{error:?}");
    }
}

#[test]
fn two_hundred_edits_of_twenty_writers_are_all_there() {
    let (_directory, path) = project();
    let path = path.with_file_name("tenants.json");
    std::thread::scope(|scope| {
        for writer in 0..20 {
            let path = &path;
            scope.spawn(move || {
                for edit in 0..10 {
                    TenantStore::update(path, |store| store.upsert(tenant(&format!("{writer}-{edit}"))))
                        .expect("edited");
                }
            });
        }
    });
    assert_eq!(TenantStore::load_from_path(&path).expect("whole").len(), 200);
}

#[test]
fn a_change_that_cannot_be_kept_changes_nothing() {
    let (_directory, path) = project();
    let path = path.with_file_name("tenants.json");
    assert!(matches!(TenantStore::load_from_path(&path), Err(TenantStoreError::NotSynced { .. })));
    TenantStore::update(&path, |store| store.upsert(tenant("a"))).expect("edited");
    let error = TenantStore::update(&path, |store| store.upsert(StoredTenant { id: "b".into(), ..Default::default() }));
    assert!(matches!(error, Err(TenantStoreError::Invalid { .. })), "{error:?}");
    assert_eq!(TenantStore::load_from_path(&path).expect("whole").len(), 1);
}

/// Started by the tests below in a process of its own: saves for ever, with a umask that takes nothing away. In the
/// run of all tests it has nothing to do.
#[test]
fn child_that_saves() {
    let Some(path) = std::env::var_os("SAVE_TO").map(PathBuf::from) else { return };
    rustix::process::umask(rustix::fs::Mode::empty());
    let token = "x".repeat(64 * 1024);
    for round in 0_u64.. {
        credentials(format!("{token}{round}")).save_to_path(&path).expect("saved");
    }
}

fn start_child(path: &Path) -> Child {
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "files::child_that_saves"])
        .env("SAVE_TO", path)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("started")
}

fn until<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long");
        std::thread::yield_now();
    }
}

#[test]
fn a_kill_at_any_instant_leaves_a_whole_private_file() {
    let (_directory, path) = project();
    for round in 0..40_u64 {
        let mut child = start_child(&path);
        let before = fs::metadata(&path).map(|meta| meta.ino()).ok();
        // Another inode: the child is inside its loop. From there, wander through it.
        until(|| fs::metadata(&path).ok().filter(|meta| Some(meta.ino()) != before));
        let spin_until = Instant::now() + Duration::from_micros(round * 173);
        until(|| (Instant::now() >= spin_until).then_some(()));
        child.kill().expect("killed");
        child.wait().expect("ended");
        let whole = CloudCredentials::load_from_path(&path).expect("never half").expect("never absent");
        assert!(whole.api_token.expose().len() > 64 * 1024);
    }
    // What a killed writer left over does not stand in the next one's way, and does not pile up.
    credentials("after").save_to_path(&path).expect("saved");
    assert_eq!(fs::read_dir(path.parent().expect("a parent")).expect("listed").count(), 2);
}

#[test]
fn others_can_never_read_it_whatever_the_umask() {
    let (_directory, path) = project();
    let mut child = start_child(&path);
    let state = path.parent().expect("a parent").to_owned();
    until(|| path.exists().then_some(()));
    let (mut looks, mut temporaries) = (0_u32, 0_u32);
    let until_when = Instant::now() + Duration::from_millis(700);
    while Instant::now() < until_when {
        for entry in fs::read_dir(&state).expect("listed").flatten() {
            let Ok(meta) = fs::symlink_metadata(entry.path()) else { continue };
            assert_eq!(meta.permissions().mode() & 0o077, 0, "{}", entry.path().display());
            temporaries += u32::from(entry.file_name() == ".credentials.json.tmp");
            looks += 1;
        }
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
    assert!(looks > 100 && temporaries > 0, "{looks} looks, {temporaries} at a temporary file");
}

#[test]
fn a_full_disk_keeps_the_old_file() {
    // RLIMIT_FSIZE of a shell is the full disk of one process; its signal is ignored, so the write fails.
    let (_directory, path) = project();
    credentials("old").save_to_path(&path).expect("saved");
    let script = "trap '' XFSZ; ulimit -f 8; exec \"$0\" --exact files::child_that_saves";
    let ran = Command::new("bash")
        .args(["-c", script])
        .arg(std::env::current_exe().expect("this test"))
        .env("SAVE_TO", &path)
        .output()
        .expect("ran");
    let said = String::from_utf8_lossy(&ran.stdout) + String::from_utf8_lossy(&ran.stderr);
    assert!(said.contains("File too large"), "64 KiB do not fit into 8: {said}");
    let kept = CloudCredentials::load_from_path(&path).expect("whole").expect("there");
    assert_eq!(kept.api_token.expose(), "old");
    assert_eq!(fs::read_dir(path.parent().expect("a parent")).expect("listed").count(), 2, "nothing left over");
}
