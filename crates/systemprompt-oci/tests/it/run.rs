//! The image is whole: its program starts with nothing but the image below it.

use crate::project::{Project, build};
use std::{path::Path, process::Command};
use systemprompt_oci::open_layer;

#[test]
fn the_program_runs_with_nothing_but_the_image() {
    let project = Project::new();
    let mut spec = project.spec();
    spec.binary = std::env::current_exe().expect("this test"); // a dynamic program with a known answer
    let (image, _) = build(&spec, &project.cache()).expect("image");
    let root = tempfile::tempdir().expect("dir");
    for layer in &image.layers {
        tar::Archive::new(open_layer(layer).expect("layer")).unpack(root.path()).expect("our own layer");
    }
    let output = sandboxed(root.path()).args(["/app/bin/systemprompt", "--list"]).output().expect("bwrap is installed");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.contains("the_program_runs_with_nothing_but_the_image"), "{text}");
}

#[test]
fn without_its_libraries_it_does_not_run() {
    let project = Project::new();
    let image = project.build();
    let root = tempfile::tempdir().expect("dir");
    for layer in &image.layers {
        tar::Archive::new(open_layer(layer).expect("layer")).unpack(root.path()).expect("our own layer");
    }
    let run = || sandboxed(root.path()).arg("/app/bin/systemprompt").status().expect("bwrap is installed").success();
    assert!(run(), "/bin/true in the image");
    std::fs::remove_dir_all(root.path().join("lib")).expect("the libraries");
    assert!(!run(), "this test can fail");
}

fn sandboxed(root: &Path) -> Command {
    let mut command = Command::new("bwrap");
    command.args(["--unshare-all", "--die-with-parent", "--ro-bind"]).arg(root).args(["/", "--proc", "/proc"]);
    command.args(["--dev", "/dev", "--tmpfs", "/tmp", "--chdir", "/app", "--"]);
    command
}
