//! Layers made by strangers: nothing outside the image's directory is touched, and the launch is refused.

use crate::host::Host;
use std::{fs, os::unix::fs::PermissionsExt, path::Path};
use systemprompt_compute::{
    ComputeDriver, DriverError, InstanceSpec,
    testing::{app_layer, get, image_of, poll, running},
};
use systemprompt_oci::ImageConfig;
use tar::{Builder, EntryType, Header};

/// One entry whose names are written as they are: the builder itself would refuse most of them.
fn entry(tar: &mut Builder<Vec<u8>>, kind: EntryType, path: &str, link: &str, mode: u32, content: &[u8]) {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    let gnu = header.as_gnu_mut().expect("gnu");
    gnu.name[..path.len()].copy_from_slice(path.as_bytes());
    gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    tar.append(&header, content).expect("entry");
}

fn layer(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, path, link) in entries {
        let content: &[u8] = if kind.is_file() { b"evil" } else { b"" };
        entry(&mut tar, *kind, path, link, 0o777, content);
    }
    tar.into_inner().expect("tar")
}

fn pax(records: &[(&str, &str)], path: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    tar.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_bytes()))).expect("pax");
    entry(&mut tar, EntryType::Regular, path, "", 0o644, content);
    tar.into_inner().expect("tar")
}

#[tokio::test(flavor = "multi_thread")]
async fn hostile_entries_are_refused_and_touch_nothing() {
    use EntryType::{Block, Char, Directory, Fifo, GNUSparse, Link, Regular, Symlink};
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let canary = host.directory.path().join("canary");
    fs::create_dir(&canary).expect("canary");
    fs::write(canary.join("file"), "canary").expect("canary");
    fs::set_permissions(canary.join("file"), fs::Permissions::from_mode(0o600)).expect("canary");
    let outside = canary.to_str().expect("path");
    let outside_file = format!("{outside}/file");
    let deep = "d/".repeat(100);
    let long = "x".repeat(300);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("..", layer(&[(Regular, "../../../../evil", "")])),
        (".. inside", layer(&[(Regular, "a/../../evil", "")])),
        ("absolute", layer(&[(Regular, "/evil", "")])),
        ("absolute directory", layer(&[(Directory, outside, "")])),
        ("absolute by pax", pax(&[("path", &outside_file)], "harmless", b"evil")),
        (".. by pax", pax(&[("path", "../../evil")], "harmless", b"evil")),
        ("through a link", layer(&[(Symlink, "a", outside), (Regular, "a/file", "")])),
        ("through a relative link", layer(&[(Symlink, "a", "../../.."), (Regular, "a/evil", "")])),
        ("directory through a link", layer(&[(Symlink, "a", outside), (Directory, "a/evil", "")])),
        ("link through a link", layer(&[(Symlink, "a", outside), (Symlink, "a/evil", "x")])),
        ("through two links", layer(&[(Symlink, "a", "."), (Symlink, "a/b", outside), (Regular, "a/b/evil", "")])),
        ("hard link outside", layer(&[(Link, "a", &outside_file)])),
        ("hard link ..", layer(&[(Link, "a", "../../../../../../etc/shadow")])),
        ("hard link through a link", layer(&[(Symlink, "a", outside), (Link, "b", "a/file")])),
        ("hard link to a link", layer(&[(Symlink, "a", &outside_file), (Link, "b", "a")])),
        ("hard link to nothing", layer(&[(Link, "a", "b")])),
        ("hard link to itself", layer(&[(Regular, "a", ""), (Link, "a", "a")])),
        ("hard link to a directory", layer(&[(Directory, "a", ""), (Link, "b", "a")])),
        ("whiteout through a link", layer(&[(Symlink, "a", outside), (Regular, "a/.wh.file", "")])),
        ("opaque through a link", layer(&[(Symlink, "a", outside), (Regular, "a/.wh..wh..opq", "")])),
        ("whiteout of ..", layer(&[(Regular, "a/.wh...", "")])),
        ("whiteout of nothing", layer(&[(Regular, "a/.wh.", "")])),
        ("character device", layer(&[(Char, "dev/mem", "")])),
        ("block device", layer(&[(Block, "disk", "")])),
        ("pipe", layer(&[(Fifo, "pipe", "")])),
        ("sparse", layer(&[(GNUSparse, "sparse", "")])),
        ("sparse by pax", pax(&[("GNU.sparse.realsize", "1000000000000")], "sparse", b"x")),
        ("too deep", pax(&[("path", &format!("{deep}x"))], "x", b"x")),
        ("name too long", pax(&[("path", &long)], "x", b"x")),
        ("NUL in a name", pax(&[("path", "a\0b")], "x", b"x")),
        ("two sizes", pax(&[("size", "1024")], "x", b"evil")),
        ("size that is no number", pax(&[("size", "-1")], "x", b"evil")),
        ("mount point is a file", layer(&[(Regular, "proc", "")])),
        ("mount point is a link", layer(&[(Symlink, "tmp", outside)])),
        ("volume below a link", layer(&[(Symlink, "app", outside)])),
        ("resolver is a link", layer(&[(Directory, "etc", ""), (Symlink, "etc/resolv.conf", &outside_file)])),
        ("no archive", vec![b'x'; 4096]),
        ("cut off", layer(&[(Regular, "a", "")])[..515].to_vec()),
    ];
    for (what, tar) in cases {
        let config = ImageConfig { entrypoint: vec![what.to_owned()], ..ImageConfig::default() };
        let image = host.images.add(None, image_of(host.directory.path(), &[tar], config).expect("image"));
        let spec = InstanceSpec { image, ..host.fixture().instance(&app, "serve") };
        let result = driver.launch(&handle, &spec).await;
        assert!(matches!(result, Err(DriverError::Rejected(_))), "{what}: {result:?}");
        assert_eq!(fs::read_to_string(canary.join("file")).expect("canary"), "canary", "{what}");
        assert_eq!(fs::read_dir(&canary).expect("canary").count(), 1, "{what}");
        let mode = fs::metadata(canary.join("file")).expect("canary").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{what}");
    }
    assert!(!Path::new("/evil").exists());
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let config = ImageConfig { entrypoint: vec!["/a".to_owned()], ..ImageConfig::default() };
    let tar = layer(&[(EntryType::Regular, "a", "")]);
    let image = image_of(host.directory.path(), std::slice::from_ref(&tar), config).expect("image");
    let mut changed = tar;
    changed[512] ^= 1;
    fs::write(&image.layers[0].path, changed).expect("layer");
    let image = host.images.add(None, image);
    let spec = InstanceSpec { image, ..host.fixture().instance(&app, "serve") };
    let result = driver.launch(&handle, &spec).await;
    assert!(matches!(&result, Err(DriverError::Rejected(text)) if text.contains("digest")), "{result:?}");
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_lie_on_each_other_and_images_go_with_their_last_instance() {
    use EntryType::{Directory, Link, Regular, Symlink};
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    let program = app_layer(Path::new(crate::host::APP)).expect("layer");
    let mut lower = Builder::new(Vec::new());
    entry(&mut lower, Directory, "d/", "", 0o700, b"");
    for name in ["d/kept", "d/hidden", "o/hidden", "o/sub/hidden", "file", "dir/inside"] {
        entry(&mut lower, Regular, name, "", 0o6600, b"lower");
    }
    entry(&mut lower, Link, "hard", "d/kept", 0o644, b"");
    entry(&mut lower, Symlink, "link", "/d/kept", 0o777, b"");
    let mut upper = Builder::new(Vec::new());
    entry(&mut upper, Regular, "d/.wh.hidden", "", 0, b"");
    entry(&mut upper, Regular, "o/new", "", 0o644, b"upper");
    entry(&mut upper, Regular, "o/.wh..wh..opq", "", 0, b"");
    entry(&mut upper, Directory, "file/", "", 0o755, b"");
    entry(&mut upper, Regular, "file/now", "", 0o644, b"upper");
    entry(&mut upper, Regular, "dir", "", 0o644, b"upper");
    entry(&mut upper, Regular, "d/kept", "", 0o644, b"upper");
    let layers = [program, lower.into_inner().expect("tar"), upper.into_inner().expect("tar")];
    let config =
        ImageConfig { entrypoint: vec!["/app/bin/app".to_owned(), "app".to_owned()], ..ImageConfig::default() };
    let image = host.images.add(None, image_of(host.directory.path(), &layers, config).expect("image"));
    let spec = InstanceSpec { image, ..host.fixture().instance(&app, "serve") };
    let instance = driver.launch(&handle, &spec).await.expect("a launch");
    let address = running(&driver, &instance).await;
    poll("health", || async { get(address, "/api/v1/health").await.is_ok() }).await;
    for (path, expected) in [
        ("/d/kept", Some("upper")),
        ("/link", Some("upper")),
        ("/hard", Some("lower")),
        ("/d/hidden", None),
        ("/o/new", Some("upper")),
        ("/o/hidden", None),
        ("/o/sub/hidden", None),
        ("/file/now", Some("upper")),
        ("/dir", Some("upper")),
        ("/d/.wh.hidden", None),
    ] {
        let (status, body) = get(address, &format!("/read?{path}")).await.expect("an answer");
        assert_eq!((status == 200).then_some(body.as_str()), expected, "{path}: {body}");
    }
    let root = host.data().join("images").join(image.hex()).join("root");
    let mode = |path: &str| fs::metadata(root.join(path)).expect("meta").permissions().mode() & 0o7777;
    assert_eq!((mode("hard"), mode("d")), (0o644, 0o755), "readable for all, without set-id bits");

    // A second instance of the image shares it; it goes with the last.
    let second = host.fixture().instance(&app, "serve");
    let second = driver.launch(&handle, &InstanceSpec { image, ..second }).await.expect("a launch");
    for instance in [&instance, &second] {
        assert!(root.exists());
        driver.stop(instance, std::time::Duration::from_secs(5)).await.expect("a stop");
        driver.remove(instance).await.expect("a removal");
    }
    assert!(!root.exists());
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_takes_long_to_unpack_holds_up_no_other() {
    let host = Host::new();
    let driver = host.driver();
    let app = host.fixture().app();
    let handle = driver.ensure_app(&app).await.expect("an app");
    // As whoever unpacks another one holds it.
    let unpacking = fs::File::create(host.data().join("locks/images")).expect("lock");
    rustix::fs::flock(&unpacking, rustix::fs::FlockOperation::LockShared).expect("lock");
    let spec = host.fixture().instance(&app, "serve");
    let launch = tokio::time::timeout(std::time::Duration::from_secs(30), driver.launch(&handle, &spec)).await;
    drop(unpacking);
    launch.expect("no wait").expect("a launch");
    driver.destroy_app(&handle).await.expect("the app's end");
    host.check_nothing_left();
}
