//! The same input gives the same image; a small change gives a small change.

use crate::project::{Project, build, copy_folder, entries};
use std::{
    collections::BTreeSet,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    time::{Duration, SystemTime},
};
use systemprompt_oci::{Digest, ImageConfig, Manifest, build::BuildSpec, inspect_layer};

#[test]
fn the_same_files_give_the_same_image_whatever_their_times() {
    let (one, two) = (Project::new(), Project::new());
    fs::remove_dir_all(two.root()).expect("empty");
    copy_folder(&one.root(), &two.root());
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    let index = File::options().append(true).open(two.path("web/dist/index.html")).expect("open");
    index.set_modified(long_ago).expect("time");
    fs::set_permissions(two.path("web/dist/index.html"), fs::Permissions::from_mode(0o600)).expect("mode");
    let (first, second) = (one.build(), two.build());
    assert_eq!(first.digest, second.digest);
    assert_eq!(first.manifest, second.manifest);
    assert_eq!(first.config, second.config);
    assert_eq!(first.digest, one.build().digest, "and again from the cache");
}

#[test]
fn one_changed_web_file_changes_one_small_layer() {
    let project = Project::new();
    for number in 0..200 {
        project.write(&format!("web/dist/pages/{number}.html"), format!("page {number}"));
    }
    let before = project.build();
    project.write("web/dist/pages/17.html", "another page 17");
    project.write("web/dist/pages/new.html", "a new page lies with some others");
    fs::remove_file(project.path("web/dist/pages/new.html")).expect("remove");
    let (after, written) = build(&project.spec(), &project.cache()).expect("image");
    assert_eq!(written.len(), 1, "{written:?}");
    let layers = |image: &systemprompt_oci::BuiltImage| {
        image.layers.iter().map(|layer| layer.descriptor.digest).collect::<BTreeSet<_>>()
    };
    let changed: Vec<_> = layers(&after).difference(&layers(&before)).copied().collect();
    assert_eq!(changed.len(), 1);
    let changed = after.layers.iter().find(|layer| layer.descriptor.digest == changed[0]).expect("that one");
    assert!(changed.descriptor.size < 4000, "{}", changed.descriptor.size);
    assert_eq!(before.layers.len(), after.layers.len());
}

#[test]
fn manifest_and_configuration_say_what_is_there() {
    let project = Project::new();
    let image = project.build();
    let manifest = Manifest::parse(&image.manifest).expect("manifest");
    assert_eq!(image.digest, Digest::of(&image.manifest));
    assert_eq!(manifest.config, image.config_descriptor);
    assert_eq!(manifest.config.digest, Digest::of(&image.config));
    let config = ImageConfig::parse(&image.config).expect("config");
    for (layer, (descriptor, diff_id)) in image.layers.iter().zip(manifest.layers.iter().zip(&config.diff_ids)) {
        assert_eq!((&layer.descriptor, &layer.diff_id), (descriptor, diff_id));
        assert_eq!(inspect_layer(layer).expect("readable").diff_id, layer.diff_id);
        let blob = fs::read(&layer.path).expect("blob");
        assert_eq!((Digest::of(&blob), blob.len() as u64), (descriptor.digest, descriptor.size));
    }
    assert_eq!(
        config.command().expect("command"),
        ["/app/bin/systemprompt", "infra", "services", "serve", "--foreground"]
    );
    assert_eq!((config.working_dir.as_str(), config.user.as_str(), config.os.as_str()), ("/app", "app", "linux"));
    for expected in [
        "HOST=0.0.0.0",
        "PORT=8080",
        "RUST_LOG=info",
        "SYSTEMPROMPT_SERVICES_PATH=/app/services",
        "WEB_DIR=/app/web",
        "SYSTEMPROMPT_PROFILE=/app/services/profiles/prod/profile.yaml",
    ] {
        assert!(config.env.iter().any(|variable| variable == expected), "{expected} in {:?}", config.env);
    }
}

#[test]
fn everything_lies_where_the_program_looks_for_it() {
    let project = Project::new();
    project.write("services/run.sh", "#!/bin/sh\n");
    fs::set_permissions(project.path("services/run.sh"), fs::Permissions::from_mode(0o700)).expect("mode");
    project.write("extensions/mcp/tool/manifest.yaml", "x: 1");
    project.write(".systemprompt/profiles/local/profile.yml", "name: local\n");
    let found = entries(&project.build());
    let mode_of = |path: &str| found.iter().find(|entry| entry.0 == path).map(|entry| entry.1);
    for (path, mode) in [
        ("app/bin/systemprompt", 0o755),
        ("app/services/config/config.yaml", 0o644),
        ("app/services/run.sh", 0o755),
        ("app/services/profiles/prod/profile.yaml", 0o644),
        ("app/services/profiles/local/profile.yml", 0o644),
        ("app/extensions/mcp/tool/manifest.yaml", 0o644),
        ("app/web/dist/assets/app.js", 0o644),
        ("app/storage", 0o755),
        ("etc/ssl/certs/ca-certificates.crt", 0o644),
        ("etc/passwd", 0o644),
        ("etc/resolv.conf", 0o644),
        ("tmp", 0o1777),
        ("proc", 0o755),
    ] {
        assert_eq!(mode_of(path), Some(mode), "{path}");
    }
    let files: Vec<_> = found.iter().filter(|entry| !entry.2.is_empty()).map(|entry| &entry.0).collect();
    let distinct: BTreeSet<_> = files.iter().collect();
    assert_eq!(files.len(), distinct.len(), "no file lies in two layers");
}

#[test]
fn the_plan_can_be_printed_without_contents() {
    let project = Project::new();
    let plan = project.plan();
    let json = serde_json::to_value(&plan).expect("serialise");
    assert_eq!(json["layers"][0]["name"], "base");
    assert_eq!(json["config"]["working_dir"], "/app");
    assert!(!json.to_string().contains("nologin"), "no generated content");
    assert!(plan.size_bytes() > 1_000_000, "the C library alone is more");
}

#[test]
fn labels_and_profile_are_part_of_the_image() {
    let project = Project::new();
    project.write(".systemprompt/profiles/prod/profile.yml", "also there\n");
    let mut spec: BuildSpec = project.spec();
    spec.labels.insert("org.opencontainers.image.title".into(), "hello".into());
    let (image, _) = build(&spec, &project.cache()).expect("image");
    let config = ImageConfig::parse(&image.config).expect("config");
    assert_eq!(config.labels["org.opencontainers.image.title"], "hello");
    assert!(config.env.iter().any(|variable| variable.ends_with("/prod/profile.yaml")), "yaml wins over yml");
    assert_ne!(image.digest, project.build().digest);
}
