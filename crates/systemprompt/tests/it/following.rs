//! Commands that go on until somebody ends them.

use crate::{
    cli::Cli,
    cloud::{Cloud, Manner, TENANT},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader, Read as _},
    process::Child,
};

fn interrupt(child: &Child) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a process");
    kill_process(pid, Signal::INT).expect("sent");
}

#[test]
fn followed_lines_are_one_object_each() {
    let cloud = Cloud::start();
    let cli = Cli::signed_in(&cloud);
    let mut child = cli.start(&["--json", "cloud", "logs", "-f", "--tenant", TENANT]);
    let lines = BufReader::new(child.stdout.take().expect("piped")).lines().take(2);
    for (line, stream) in lines.zip(["output", "platform"]) {
        let value: Value = serde_json::from_str(&line.expect("text")).expect("JSON");
        assert_eq!((&value["data"]["stream"], &value["data"]["message"]), (&stream.into(), &"shop".into()));
    }
    child.kill().expect("killed");
    child.wait().expect("ended");
}

#[test]
fn a_reader_that_leaves_ends_it_without_a_word() {
    let cloud = Cloud::with(Manner { endless_logs: true, ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    for json in [&[][..], &["--json"]] {
        let mut child = cli.start(&[json, &["cloud", "logs", "-f", "--tenant", TENANT]].concat());
        let mut first = String::new();
        BufReader::new(child.stdout.take().expect("piped")).read_line(&mut first).expect("text");
        assert!(first.contains("shop"));
        let ended = child.wait_with_output().expect("ended");
        assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""));
    }
}

#[test]
fn ctrl_c_during_a_deploy_says_that_it_goes_on() {
    let cloud = Cloud::with(Manner { deploy_ends: None, ..Manner::default() });
    let cli = Cli::signed_in(&cloud);
    let mut child = cli.start(&["cloud", "deploy", "--binary", "/bin/true", "--tenant", TENANT]);
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.starts_with("deploy accepted") {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).expect("text"), 0, "it is accepted");
    }
    interrupt(&child);
    let mut rest = String::new();
    stderr.read_to_string(&mut rest).expect("text");
    assert_eq!(child.wait().expect("ended").code(), Some(130));
    assert!(rest.contains("error[interrupted]: stopped watching; the deploy goes on in the cloud\n"), "{rest}");
    assert!(rest.ends_with("hint: See how it ends: systemprompt cloud status, systemprompt cloud logs\n"), "{rest}");
}
