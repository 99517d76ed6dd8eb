//! The same program as a tenant's server.

use crate::{cli::Cli, cloud::Cloud};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
};
use systemprompt_postgres::testing::TestCluster;

#[test]
fn an_incomplete_environment_is_told_as_a_whole() {
    let cloud = Cloud::absent();
    let cli = Cli::new(&cloud);
    let ended =
        cli.command(&["infra", "services", "serve", "--foreground"]).env("PORT", "hunter2").output().expect("ran");
    assert_eq!(ended.status.code(), Some(1));
    let stderr = String::from_utf8(ended.stderr).expect("text");
    assert_eq!(
        stderr,
        "error[invalid_environment]: the environment is not complete: PORT must be a number from 0 to 65535; WEB_DIR is missing; \
         SYSTEMPROMPT_SERVICES_PATH is missing; DATABASE_URL is missing\n"
    );
    assert_eq!(ended.stdout, b"");
}

#[tokio::test]
async fn it_serves_until_sigterm_and_logs_json_lines() {
    let cluster = TestCluster::start().await;
    let url = cluster.create_database().await;
    let cloud = Cloud::absent();
    let cli = Cli::new(&cloud);
    cli.write("web/dist/index.html", "hello");
    cli.write("services/config/config.yaml", "agents: {}\n");
    // The profile says another port; the environment beats it.
    cli.write(".systemprompt/profiles/local/profile.yaml", "name: local\nserver:\n  host: 127.0.0.1\n  port: 1\n");
    let mut child = cli
        .command(&["--json", "infra", "services", "start"])
        .env("DATABASE_URL", &url)
        .env("PORT", "0")
        .spawn()
        .expect("started");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().expect("a line").expect("text")).expect("JSON") };
    let address = loop {
        let line = next();
        if line["message"] == "listening" {
            break line["address"].as_str().expect("an address").to_owned();
        }
    };
    let mut stream = TcpStream::connect(&address).expect("connected");
    stream.write_all(b"GET /api/v1/health HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n").expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("text");
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a process");
    kill_process(pid, Signal::TERM).expect("sent");
    let last = lines.map(|line| line.expect("text")).last().expect("lines");
    assert!(last.contains("\"stopped\"") && !last.contains("postgres://"), "{last}");
    let ended = child.wait_with_output().expect("ended");
    assert_eq!(ended.status.code(), Some(0));
    assert_eq!(ended.stdout, b"{\"data\":{\"status\":\"stopped\"},\"artifact_type\":\"text\"}\n");
}
