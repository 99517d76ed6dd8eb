use crate::{
    cli::Cli,
    cloud::{Cloud, TENANT},
};
use std::{
    fs::{self, File},
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

#[test]
fn finished_layers_are_kept_with_the_user_and_never_in_the_project() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    // As a project may come from a stranger: the cache it brings along leads to old files of whoever deploys it.
    cli.write("victim/diary.txt", "dear diary");
    let long_ago = SystemTime::now() - Duration::from_hours(24 * 365);
    let diary = File::options().append(true).open(cli.home.path().join("victim/diary.txt")).expect("opened");
    diary.set_modified(long_ago).expect("time");
    fs::create_dir_all(cli.home.path().join(".systemprompt/cache/layers")).expect("made");
    symlink(cli.home.path().join("victim"), cli.home.path().join(".systemprompt/cache/layers/blobs")).expect("link");

    let dry_run = ["cloud", "deploy", "--binary", "/bin/true", "--dry-run", "--json"];
    let deploy = ["cloud", "deploy", "--binary", "/bin/true", "--tenant", TENANT, "--skip-push"];
    for args in [&dry_run[..], &deploy[..]] {
        let status = cli.command(args).status().expect("ran");
        assert!(status.success(), "{args:?}");
    }
    assert_eq!(cli.read("victim/diary.txt"), "dear diary");
    assert_eq!(fs::read_dir(cli.home.path().join("victim")).expect("there").count(), 1, "nothing was put there");
    let kept = cli.home.path().join(".cache/systemprompt/layers");
    assert!(kept.join("blobs").read_dir().expect("the cache").next().is_some());
    assert_eq!(fs::metadata(kept).expect("there").permissions().mode() & 0o777, 0o700);

    let elsewhere = tempfile::tempdir().expect("a directory");
    let with = |name: &str, value: &Path| {
        let output = cli.command(&dry_run).env_clear().env(name, value).output().expect("ran");
        (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
    };
    assert_eq!(with("XDG_CACHE_HOME", elsewhere.path()).0, Some(0));
    assert!(elsewhere.path().join("systemprompt/layers/blobs").is_dir());
    for (name, value) in [("OTHER", ""), ("HOME", "not/absolute"), ("XDG_CACHE_HOME", "")] {
        let (code, stdout) = with(name, Path::new(value));
        assert_eq!(code, Some(1), "{name}");
        assert!(stdout.contains("no_cache_folder") && stdout.contains("Set XDG_CACHE_HOME"), "{stdout}");
    }
    let (_, stdout) = with("XDG_CACHE_HOME", &link_to(elsewhere.path()));
    assert!(stdout.contains("it is a link") && stdout.contains("set XDG_CACHE_HOME"), "{stdout}");
}

/// A folder for caches whose cache is a link.
fn link_to(folder: &Path) -> PathBuf {
    let caches = folder.join("others");
    fs::create_dir_all(caches.join("systemprompt")).expect("made");
    symlink(folder.join("systemprompt/layers"), caches.join("systemprompt/layers")).expect("link");
    caches
}
