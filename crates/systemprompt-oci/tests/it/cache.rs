//! The cache saves work and is never believed.

use crate::project::{Project, build};
use std::fs;
use systemprompt_oci::{ImageBuilder, build::BuildError};

#[test]
fn a_second_build_writes_nothing() {
    let project = Project::new();
    let (first, written) = build(&project.spec(), &project.cache()).expect("image");
    assert_eq!(written.len(), first.layers.len());
    let (second, written) = build(&project.spec(), &project.cache()).expect("image");
    assert_eq!(written, [""; 0]);
    assert_eq!(first, second);
}

#[test]
fn damaged_entries_are_made_again() {
    type Damage = fn(&mut Vec<u8>);
    let project = Project::new();
    let first = project.build();
    let cache = project.cache_dir();
    let damage: [(&str, Damage); 4] = [
        ("blobs", |blob| *blob.last_mut().expect("not empty") ^= 1),
        ("blobs", |blob| blob.truncate(blob.len() / 2)),
        ("layers", |record| record.clear()),
        ("layers", |record| *record.last_mut().expect("not empty") ^= 1),
    ];
    for (folder, damage) in damage {
        for entry in fs::read_dir(cache.join(folder)).expect("cache") {
            let path = entry.expect("entry").path();
            let mut content = fs::read(&path).expect("read");
            damage(&mut content);
            fs::write(&path, content).expect("write");
        }
        let (again, written) = build(&project.spec(), &project.cache()).expect("image");
        assert_eq!((&again, written.len()), (&first, first.layers.len()), "{folder}");
    }
    fs::write(cache.join("files"), "nonsense").expect("write");
    assert_eq!(project.build(), first);
    fs::remove_dir_all(&cache).expect("remove");
    assert_eq!(project.build().digest, first.digest);
}

#[test]
fn a_change_of_the_same_size_right_after_a_build_is_seen() {
    let project = Project::new();
    let mut digests = Vec::new();
    for round in 0..10 {
        project.write("web/dist/index.html", format!("round {round}"));
        digests.push(project.build().digest);
    }
    let rounds = digests.len();
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), rounds);
}

#[test]
fn a_file_that_changes_between_plan_and_build_is_an_error() {
    let project = Project::new();
    let builder = ImageBuilder::new(project.spec());
    let plan = builder.plan().expect("plan");
    project.write("web/dist/index.html", "longer than what was planned for");
    let error = builder.build(&plan, &project.cache(), &|_| {}).expect_err("changed");
    assert!(matches!(error, BuildError::Changed { .. }), "{error}");
    fs::remove_file(project.path("web/dist/index.html")).expect("remove");
    let error = builder.build(&plan, &project.cache(), &|_| {}).expect_err("gone");
    assert!(matches!(error, BuildError::Read { .. }), "{error}");
}

#[test]
fn two_builds_at_once_share_a_cache() {
    let project = Project::new();
    let digests: Vec<_> = std::thread::scope(|scope| {
        let builds: Vec<_> = (0..4).map(|_| scope.spawn(|| project.build().digest)).collect();
        builds.into_iter().map(|build| build.join().expect("no panic")).collect()
    });
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]));
}
