//! The figures of the spine, on an installation of their own.

use super::{
    control::{ControlDatabase, pss_mib},
    load::Load,
    nginx,
    row::{Goal, Report, median, percentile},
};
use crate::{
    packages,
    shell::Shell,
    up::{Cloud, Installation, Profile, Server, Tenant, build},
};
use anyhow::{Context as _, Result, ensure};
use rustix::fs::statfs;
use std::{fs, io::Stdout, net::TcpListener, path::PathBuf, sync::mpsc, time::Duration};

const PHASE1: Goal = Goal { figure: "phase1_ms", unit: "ms", at_most: 500.0 };
const DEPLOY: Goal = Goal { figure: "deploy_ms", unit: "ms", at_most: 3000.0 };
const REDEPLOY: Goal = Goal { figure: "redeploy_ms", unit: "ms", at_most: 1500.0 };
const REDEPLOY_FAILED: Goal = Goal { figure: "redeploy_failed", unit: "requests", at_most: 0.0 };
const ROUTE: Goal = Goal { figure: "route_ms", unit: "ms", at_most: 50.0 };
const CONTROL_PSS: Goal = Goal { figure: "control_pss_mib", unit: "MiB", at_most: 60.0 };
const EDGE_CPU: Goal = Goal { figure: "edge_h1_cpu_vs_nginx", unit: "ratio", at_most: 1.0 };
const IMAGE_BUILD: Goal = Goal { figure: "image_build_ms", unit: "ms", at_most: 200.0 };

/// `TMPFS_MAGIC` of linux/magic.h.
const TMPFS: i64 = 0x0102_1994;
const PROVISIONS: usize = 20;
const DEPLOYS: usize = 5;
const REDEPLOYS: usize = 5;
const REDEPLOYS_UNDER_LOAD: usize = 10;
const REQUESTS_PER_SECOND: u32 = 200;
const ROUTE_CHANGES: usize = 100;
const IMAGE_BUILDS: usize = 5;
const AT_REST: Duration = Duration::from_mins(1);

const GOALS: [Goal; 8] = [PHASE1, DEPLOY, REDEPLOY, REDEPLOY_FAILED, ROUTE, CONTROL_PSS, EDGE_CPU, IMAGE_BUILD];

/// Measures everything; prints one line a figure as it is measured, and at the end those that could not be.
pub(super) fn run(shell: &Shell, profile: Profile) -> Result<()> {
    let mut report = Report::new(&GOALS, std::io::stdout());
    let outcome = measure_all(shell, profile, &mut report);
    report.finish()?;
    outcome
}

fn measure_all(shell: &Shell, profile: Profile, report: &mut Report<Stdout>) -> Result<()> {
    packages::ensure(shell, &[packages::TO_RUN])?;
    // One figure's need only: without it, that one is short.
    let compared = packages::ensure(shell, &[packages::TO_MEASURE]);
    shell.interrupts.check()?;
    let programs = build(shell, profile, &["e2e"])?;
    // Not /tmp: where that is memory, nothing waits for a disk.
    let folder = tempfile::Builder::new().prefix("xtask-bench-").tempdir_in("/var/tmp")?;
    ensure!(statfs(folder.path())?.f_type != TMPFS, "/var/tmp is in memory: commits would cost nothing there");
    // PostgreSQL and the tenants run as other users and have to get through.
    fs::set_permissions(folder.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let installation = installation(programs, folder.path().join("data"))?;
    note_commits(shell, &installation)?;
    let cloud = Cloud::start(shell, installation.clone())?;
    match measure(shell, &cloud, report) {
        Ok(tenant) => {
            // An edge alone: then what the process takes is the edge's.
            cloud.kill()?;
            let measured =
                figure(shell, report, EDGE_CPU, || compared.and_then(|()| edge_cpu(shell, &installation, &tenant)));
            shell.run(&mut installation.management_api("stop"))?;
            measured
        }
        Err(error) => {
            eprintln!("{}", cloud.log_tail());
            cloud.stop()?;
            Err(error)
        }
    }
}

/// A figure that cannot be measured is short and says why; the others go on. Only an interrupt ends all.
fn figure(shell: &Shell, report: &mut Report<Stdout>, goal: Goal, measure: impl FnOnce() -> Result<f64>) -> Result<()> {
    eprintln!("── {}", goal.figure);
    let value = measure();
    shell.interrupts.check()?;
    match value {
        Ok(value) => report.measured(goal, value)?,
        Err(error) => eprintln!("{} could not be measured: {error:#}", goal.figure),
    }
    Ok(())
}

/// Has the control plane's PostgreSQL keep the times of commits, from its next start on.
fn note_commits(shell: &Shell, installation: &Installation) -> Result<()> {
    let cloud = Cloud::start(shell, installation.clone())?;
    let control = ControlDatabase::of(&installation.data)?;
    let noted = control.query(shell, "ALTER SYSTEM SET track_commit_timestamp = on");
    cloud.stop()?;
    noted.map(drop)
}

fn installation(programs: PathBuf, data: PathBuf) -> Result<Installation> {
    Ok(Installation {
        programs,
        data,
        zone: "systemprompt.localhost".to_owned(),
        https: free_port()?,
        http: "off".to_owned(),
        http_api: None,
    })
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

fn measure(shell: &Shell, cloud: &Cloud, report: &mut Report<Stdout>) -> Result<Tenant> {
    cloud.sign_in(shell)?;
    let (tenant, _) = cloud.provision(shell, "hello")?;
    cloud.deploy(shell, &tenant)?;
    cloud.verify(shell, &tenant)?;
    let bench = Bench { shell, cloud, tenant, control: ControlDatabase::of(&cloud.installation().data)? };

    // Memory first: later figures add tenants.
    bench.figure(report, CONTROL_PSS, Bench::control_pss)?;
    let mut fresh = Vec::new();
    bench.figure(report, PHASE1, |bench| bench.phase1(&mut fresh))?;
    bench.figure(report, DEPLOY, |bench| bench.deploy(&fresh))?;
    bench.figure(report, REDEPLOY, Bench::redeploy)?;
    bench.figure(report, REDEPLOY_FAILED, Bench::redeploy_failed)?;
    bench.figure(report, ROUTE, Bench::route)?;
    bench.figure(report, IMAGE_BUILD, Bench::image_build)?;
    Ok(bench.tenant)
}

struct Bench<'a> {
    shell: &'a Shell,
    cloud: &'a Cloud,
    /// Deployed, serves.
    tenant: Tenant,
    control: ControlDatabase,
}

impl Bench<'_> {
    fn figure(
        &self,
        report: &mut Report<Stdout>,
        goal: Goal,
        measure: impl FnOnce(&Self) -> Result<f64>,
    ) -> Result<()> {
        figure(self.shell, report, goal, || measure(self))
    }

    fn control_pss(&self) -> Result<f64> {
        let (interrupted, rest) = mpsc::channel();
        self.shell.interrupts.listen(move || {
            // Sent too late, nobody waits any more.
            let _ = interrupted.send(());
        });
        // A minute at rest is what is asked for; an interrupt ends it.
        let _ = rest.recv_timeout(AT_REST);
        self.shell.interrupts.check()?;
        pss_mib(self.cloud.process())
    }

    /// By the database's clock, from the commit of the confirmation to that of `awaiting_deploy`: rows that are written
    /// once tell by whom, and of whom the time of the commit is kept.
    fn phase1(&self, fresh: &mut Vec<Tenant>) -> Result<f64> {
        for number in 1..=PROVISIONS {
            fresh.push(self.cloud.provision(self.shell, &format!("bench-{number}"))?.0);
        }
        let rows = self.control.query(
            self.shell,
            "SELECT extract(epoch FROM pg_xact_commit_timestamp(e.xmin) - pg_xact_commit_timestamp(i.xmin)) * 1000
             FROM tenants t JOIN inbox_events i ON position(t.checkout_id::text IN i.body) > 0
             JOIN events e ON e.subject = 'tenant:' || t.id AND e.body #>> '{data,event_type}' = 'tenant_ready'
             WHERE t.name LIKE 'bench-%'",
        )?;
        ensure!(rows.len() == PROVISIONS, "expected {PROVISIONS} provisions in the books, found {}", rows.len());
        let times: Vec<f64> = rows.iter().map(|row| row.parse()).collect::<Result<_, _>>()?;
        median(&times).context("nothing was provisioned")
    }

    fn deploy(&self, fresh: &[Tenant]) -> Result<f64> {
        ensure!(fresh.len() >= DEPLOYS, "there are no fresh tenants to deploy to");
        self.median_ms(fresh.iter().take(DEPLOYS).map(|tenant| {
            // A first deploy has nothing to start from.
            self.cloud.forget_layers()?;
            Ok(self.cloud.deploy(self.shell, tenant)?.wall)
        }))
    }

    fn redeploy(&self) -> Result<f64> {
        self.median_ms((0..REDEPLOYS).map(|_| {
            self.cloud.change_example()?;
            Ok(self.cloud.deploy(self.shell, &self.tenant)?.wall)
        }))
    }

    fn redeploy_failed(&self) -> Result<f64> {
        let Installation { programs, .. } = self.cloud.installation();
        let load = Load::open_loop(programs, &self.tenant.url, &self.ca_file(), REQUESTS_PER_SECOND)?;
        for _ in 0..REDEPLOYS_UNDER_LOAD {
            self.cloud.change_example()?;
            self.cloud.deploy(self.shell, &self.tenant)?;
        }
        let report = load.finish()?;
        eprintln!(
            "{} requests, {} failed, p50 {} us, p99 {} us {:?}",
            report.sent, report.failed, report.p50_us, report.p99_us, report.failures
        );
        ensure!(report.sent > 0, "no request was sent");
        #[allow(clippy::cast_precision_loss, reason = "far below 2^52")]
        Ok(report.failed as f64)
    }

    /// A host that appears 100 times, each time with the live tenant's route; between, it goes away again.
    fn route(&self) -> Result<f64> {
        let Installation { programs, zone, .. } = self.cloud.installation();
        let host = format!("bench-route.{zone}");
        let live = host_of(&self.tenant.url)?;
        let mut session = self.control.session()?;
        let mut watch = Load::watch(programs, &self.cloud.installation().url("bench-route"), &self.ca_file())?;
        let mut times = Vec::new();
        for _ in 0..ROUTE_CHANGES {
            watch.expect(200)?;
            let begin = session.ask(&change_route(&host, live, true))?;
            times.push(milliseconds(begin.parse()?, watch.seen()?)?);
            watch.expect(502)?;
            session.ask(&change_route(&host, live, false))?;
            watch.seen()?;
        }
        percentile(&times, 95).context("no route was changed")
    }

    /// The command line's own measure with its cache filled and one file changed: what a person waits for between
    /// two edits.
    fn image_build(&self) -> Result<f64> {
        self.median_ms((0..IMAGE_BUILDS).map(|_| {
            self.cloud.change_example()?;
            Ok(self.cloud.deploy(self.shell, &self.tenant)?.build)
        }))
    }

    fn median_ms(&self, times: impl Iterator<Item = Result<Duration>>) -> Result<f64> {
        let times: Vec<f64> = times.map(|time| Ok(time?.as_secs_f64() * 1000.0)).collect::<Result<_>>()?;
        self.shell.interrupts.check()?;
        median(&times).context("nothing was measured")
    }

    fn ca_file(&self) -> PathBuf {
        self.cloud.installation().ca_file()
    }
}

/// Of an edge that serves what its snapshot has, with nothing else of ours running.
fn edge_cpu(shell: &Shell, installation: &Installation, tenant: &Tenant) -> Result<f64> {
    let host = host_of(&tenant.url)?;
    let control = ControlDatabase::of(&installation.data)?;
    let target = format!("SELECT target #>> '{{upstream,tcp}}' FROM routes WHERE host = '{host}'");
    let instance = control.query(shell, &target)?;
    let instance = instance.first().filter(|address| !address.is_empty());
    let instance = instance.context("the tenant's route names no address")?;
    let port = free_port()?;
    let mut command = installation.management_api("edge");
    command.args(["--zone", &installation.zone, "--http", "off", "--https", &format!("127.0.0.1:{port}")]);
    let edge = Server::start(shell, command, &installation.data.join("edge-alone.log"))?;
    let ratio = nginx::compare(shell, edge.id(), port, host, instance);
    edge.stop()?;
    ratio
}

fn host_of(url: &str) -> Result<&str> {
    let authority = url.strip_prefix("https://").and_then(|rest| rest.split('/').next());
    authority.and_then(|authority| authority.split(':').next()).with_context(|| format!("{url} names no host"))
}

/// Between two times in microseconds; an answer that came before its cause means that something else was measured.
fn milliseconds(begin: i64, seen: i64) -> Result<f64> {
    let microseconds = u32::try_from(seen - begin);
    let microseconds =
        microseconds.with_context(|| format!("the route was seen {} us before it was made", begin - seen))?;
    Ok(f64::from(microseconds) / 1000.0)
}

/// As the control plane publishes a route; answers when the commit was about to be sent, in microseconds since the
/// epoch: what comes behind it is a part of the time.
fn change_route(host: &str, live: &str, present: bool) -> String {
    let target = if present { "target" } else { "NULL::jsonb" };
    format!(
        "BEGIN;
         UPDATE route_clock SET generation = generation + 1;
         INSERT INTO routes (host, tenant_id, target, generation)
           SELECT '{host}', tenant_id, {target}, (SELECT generation FROM route_clock) FROM routes WHERE host = '{live}'
           ON CONFLICT (host) DO UPDATE SET target = excluded.target, generation = excluded.generation;
         NOTIFY systemprompt_routes;
         SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;
         COMMIT;"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_host_of_a_url_has_no_port() {
        assert_eq!(host_of("https://a.z:8443/").unwrap(), "a.z");
        assert_eq!(host_of("https://a.z").unwrap(), "a.z");
        assert!(host_of("a.z").is_err());
    }

    #[test]
    fn an_answer_before_its_cause_is_no_time() {
        assert!((milliseconds(1_000, 2_500).unwrap() - 1.5).abs() < 1e-9);
        assert!(milliseconds(2_500, 1_000).is_err());
    }
}
