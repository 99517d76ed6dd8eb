//! The edge against nginx: the same page of the same instance over TLS keep-alive, turn and turn about, and what
//! each spends on a request.

use super::{control::cpu_ticks, row::median};
use crate::shell::{Shell, find_program};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    fs,
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

const ROUNDS: usize = 5;
const ROUND_SECONDS: u32 = 8;
const CONNECTIONS: u32 = 32;

/// One server to measure.
struct Side {
    process: u32,
    port: u16,
}

/// CPU of the edge per request, as a share of nginx's: the median of the rounds' ratios.
pub(super) fn compare(shell: &Shell, edge_process: u32, edge_port: u16, host: &str, instance: &str) -> Result<f64> {
    ensure!(rustix::process::geteuid().is_root(), "wrk has to resolve {host}: run as root");
    let folder = tempfile::Builder::new().prefix("xtask-nginx-").tempdir()?;
    let nginx = Nginx::start(shell, folder.path(), host, instance)?;
    let hosts = folder.path().join("hosts");
    fs::write(&hosts, format!("127.0.0.1 localhost {host}\n"))?;

    let edge = Side { process: edge_process, port: edge_port };
    let other = Side { process: nginx.process.id(), port: nginx.port };
    for side in [&edge, &other] {
        per_request(shell, side, host, &hosts, 1)?; // connections to the instance, caches
    }
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        // Whoever goes first finds a cooler machine: take turns.
        let (ours, theirs) = if round % 2 == 0 {
            let ours = per_request(shell, &edge, host, &hosts, ROUND_SECONDS)?;
            (ours, per_request(shell, &other, host, &hosts, ROUND_SECONDS)?)
        } else {
            let theirs = per_request(shell, &other, host, &hosts, ROUND_SECONDS)?;
            (per_request(shell, &edge, host, &hosts, ROUND_SECONDS)?, theirs)
        };
        eprintln!("round {}: edge {ours:.1} us, nginx {theirs:.1} us a request", round + 1);
        ratios.push(ours / theirs);
    }
    median(&ratios).context("no round was run")
}

/// Microseconds of CPU per request.
fn per_request(shell: &Shell, side: &Side, host: &str, hosts: &Path, seconds: u32) -> Result<f64> {
    let before = cpu_ticks(side.process)?;
    // A hosts file of wrk's own, in a mount namespace of its own: plain Debian cannot resolve *.localhost.
    let mut wrk = Command::new("unshare");
    wrk.args(["--mount", "--propagation", "private", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
    wrk.arg(hosts).args(["wrk", "-t1", &format!("-c{CONNECTIONS}"), &format!("-d{seconds}s")]);
    let said = shell.read_quiet(wrk.arg(format!("https://{host}:{}/", side.port)))?;
    let requests = parse_wrk(&said)?;
    let ticks = cpu_ticks(side.process)? - before;
    let ticks_per_second = rustix::param::clock_ticks_per_second();
    #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
    Ok(ticks as f64 * 1e6 / ticks_per_second as f64 / requests as f64)
}

/// Requests that were answered; any failed one makes the round worthless.
fn parse_wrk(said: &str) -> Result<u64> {
    if let Some(bad) = said.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
        bail!("wrk: {}", bad.trim());
    }
    let requests = said.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse().ok());
    requests.filter(|requests| *requests > 0).with_context(|| format!("wrk counted no requests:\n{said}"))
}

/// nginx by hand, not as a service: as many workers as the edge has, and connections to the instance kept alive.
struct Nginx {
    process: Child,
    port: u16,
}

impl Nginx {
    fn start(shell: &Shell, folder: &Path, host: &str, instance: &str) -> Result<Self> {
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]);
        openssl.args(["-subj", &format!("/CN={host}"), "-addext", &format!("subjectAltName=DNS:{host}")]);
        shell.read_quiet(openssl.current_dir(folder).args(["-keyout", "key.pem", "-out", "cert.pem"]))?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let workers = thread::available_parallelism().map_or(1, usize::from);
        let configuration = folder.join("nginx.conf");
        fs::write(&configuration, nginx_configuration(folder, port, workers, instance))?;
        let program = find_program("nginx").context("nginx is not installed")?;
        let mut process = Command::new(program)
            .arg("-c")
            .arg(&configuration)
            .arg("-p")
            .arg(folder)
            .stdin(Stdio::null())
            .spawn()
            .context("cannot start nginx")?;
        wait_for_port(&mut process, port)?;
        Ok(Self { process, port })
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let master = rustix::process::Pid::from_child(&self.process);
        // TERM: it ends its workers too.
        if rustix::process::kill_process(master, rustix::process::Signal::TERM).is_ok() {
            let _ = self.process.wait();
        }
    }
}

fn wait_for_port(process: &mut Child, port: u16) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        if let Some(status) = process.try_wait()? {
            bail!("nginx ended at once ({status})");
        }
        ensure!(Instant::now() < deadline, "nginx does not listen on port {port}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn nginx_configuration(folder: &Path, port: u16, workers: usize, instance: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off;
user root;
worker_processes {workers};
pid {folder}/pid;
error_log stderr warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream instance {{ server {instance}; keepalive 64; keepalive_requests 1000000; }}
    server {{
        listen 127.0.0.1:{port} ssl reuseport;
        ssl_certificate {folder}/cert.pem;
        ssl_certificate_key {folder}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3;
        keepalive_requests 1000000;
        location / {{
            proxy_pass http://instance;
            proxy_http_version 1.1;
            proxy_set_header Connection \"\";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
        }}
    }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_and_a_round_with_failures_is_none() {
        let good =
            "Running 8s test @ https://a\n  1 threads and 32 connections\n  123456 requests in 8.00s, 20.31MB read\n";
        assert_eq!(parse_wrk(good).unwrap(), 123_456);
        assert!(parse_wrk(&format!("{good}  Non-2xx or 3xx responses: 7\n")).is_err());
        assert!(parse_wrk(&format!("  Socket errors: connect 0, read 1, write 0, timeout 0\n{good}")).is_err());
        assert!(parse_wrk("0 requests in 8.00s").is_err());
    }
}
