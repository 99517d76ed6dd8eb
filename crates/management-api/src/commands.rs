//! The program's commands. `serve` has a module of its own; the others are short.

use crate::{
    app::Site,
    certs::CertificateFile,
    config::{AccountArguments, Arguments, Command, DataArguments, EdgeArguments, Layout},
    edge_role::{EdgeDirectory, EdgePlan},
    http,
    identity::{self, NewAccount, Role},
    installation::{
        Clusters, existing_data, lock_data, open_control_database, open_data, open_seal, open_stopping_driver,
        refuse_absent_instances, start_cluster, take_down,
    },
    seal::Sealer,
    serve,
};
use anyhow::Context as _;
use std::{io::IsTerminal as _, path::Path, process::ExitCode, sync::Arc, time::Duration};
use systemprompt_postgres::{Access, Cluster, StopMode};
use systemprompt_workflow::Db;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// How long an edge alone waits for the database before it serves what its snapshot has.
const FIRST_LOAD: Duration = Duration::from_secs(2);

/// Runs one command to its end.
pub(crate) fn run(arguments: Arguments) -> ExitCode {
    start_logging();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&anyhow::Error::new(error).context("starting the runtime")),
    };
    let result = runtime.block_on(async {
        match arguments.command {
            Command::Serve(arguments) => serve::serve(arguments).await,
            Command::Edge(arguments) => edge_alone(arguments).await,
            Command::Stop(arguments) => stop_leftovers(&arguments).await,
            Command::CreateAccount(arguments) => create_account(&arguments).await,
            Command::Token(arguments) => print_token(&arguments).await,
            Command::Endpoints => print_endpoints(),
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(1));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

#[allow(clippy::print_stderr, reason = "the last words of a process that could not run")]
fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {}", with_causes(error));
    ExitCode::FAILURE
}

/// The message and those of its causes that it does not already say itself.
fn with_causes(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .map(ToString::to_string)
        .fold(error.to_string(), |said, cause| if said.contains(&cause) { said } else { format!("{said}: {cause}") })
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,sqlx=warn".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// An edge without anything else: serves from the snapshot, follows the database while it is there.
async fn edge_alone(arguments: EdgeArguments) -> anyhow::Result<()> {
    let asked = asked_to_stop()?;
    let layout = open_data(&arguments.data.data)?;
    let seal = Arc::new(Sealer::load(&layout.seal_key())?);
    let directory = EdgeDirectory::claim(&layout, seal.clone())?;
    let certificate_file = CertificateFile::new(layout.edge_certificates(), seal);
    let missing = |path: &Path| {
        format!(
            "there is no {} yet; run `management-api serve --data {}` first",
            path.display(),
            layout.root().display()
        )
    };
    let snapshot = directory.load()?.with_context(|| missing(&directory.snapshot_file()))?;
    let plan = EdgePlan {
        table: snapshot.table(),
        certificates: certificate_file.read()?.with_context(|| missing(certificate_file.path()))?,
        certificate_file,
        directory,
        platform: snapshot.platform,
    };
    let (edge, follower) = plan.bind(&arguments).await?;
    refuse_absent_instances(&layout);
    let https = edge.https_addr();
    // The follower goes on until the edge has drained: it must not sign off while requests are open.
    let (draining, stop) = (CancellationToken::new(), CancellationToken::new());
    let registered = follower.registered();
    let following = tokio::spawn(follower.run(snapshot.database_url, stop.clone()));
    // What changed since the snapshot, if the database is there to tell; connections wait in the accept queue.
    tokio::select! {
        _ = timeout(FIRST_LOAD, registered.cancelled()) => {}
        () = asked.cancelled() => {}
    }
    let mut serving = tokio::spawn(edge.serve(draining.clone()));
    announce(&arguments.site(https.port()), Some(https), &layout.ca().join("ca.pem"), None);
    let outcome = tokio::select! {
        ended = &mut serving => Err(serve::edge_ended(ended)),
        () = asked.cancelled() => Ok(()),
    };
    draining.cancel();
    if outcome.is_ok() {
        let report = serving.await.context("the edge")?;
        tracing::info!(?report, "the edge has drained");
    }
    stop.cancel();
    following.await.context("the edge's follower")?;
    outcome
}

/// Stops instances and clusters of a control plane that is not running. Starts and makes nothing.
async fn stop_leftovers(arguments: &DataArguments) -> anyhow::Result<()> {
    let layout = existing_data(&arguments.data)?;
    let _lock = lock_data(&layout)?;
    let clusters = Clusters::existing(&layout).await?;
    let seal = Sealer::load(&layout.seal_key())?;
    take_down(&layout, open_stopping_driver(&layout, &seal), &clusters, Duration::from_secs(10)).await
}

/// Beside a running `serve` as well as without one.
#[allow(clippy::print_stdout, reason = "stdout is data")]
async fn create_account(arguments: &AccountArguments) -> anyhow::Result<()> {
    let mut password = zeroize::Zeroizing::new(String::new());
    std::io::Read::read_to_string(&mut std::io::stdin().lock(), &mut password).context("reading the password")?;
    let new = NewAccount {
        email: arguments.email.parse()?,
        password: password.trim_end_matches('\n').parse()?,
        name: None,
        role: if arguments.operator { Role::Operator } else { Role::Member },
    };
    let layout = open_data(&arguments.data.data)?;
    open_seal(&layout)?;
    let signed_in = with_control_database(&layout, async |db| Ok(identity::create_signed_in(&db, new).await?)).await?;
    println!("{}", serde_json::to_string(&signed_in)?);
    Ok(())
}

/// Starts the control plane's cluster if it does not run, and then stops it again, so that nothing is left of a command
/// beside what it was to do.
async fn with_control_database<T>(
    layout: &Layout,
    run: impl AsyncFnOnce(Db) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let running = match Cluster::existing("control", &layout.cluster("control")).await? {
        Some(control) => control.is_alive().await,
        None => false,
    };
    let control = start_cluster(layout, "control", Access::ControlPlane).await?;
    let outcome = async {
        let db = open_control_database(&control).await?;
        let outcome = run(db.clone()).await;
        db.pool().close().await;
        outcome
    };
    let outcome = outcome.await;
    // A `serve` that has started meanwhile has the lock, and the cluster with it.
    if !running
        && let Ok(_alone) = lock_data(layout)
        && let Err(error) = control.stop(StopMode::Fast).await
    {
        tracing::warn!(%error, "the control plane's database server still runs");
    }
    outcome
}

/// The way back in when every token has ended, was revoked or never arrived.
#[allow(clippy::print_stdout, reason = "stdout is data")]
async fn print_token(arguments: &DataArguments) -> anyhow::Result<()> {
    anyhow::ensure!(
        Layout::new(&arguments.data).cluster("control").exists(),
        "there is no installation in {}; `management-api serve` makes one, or give its directory with --data",
        arguments.data.display()
    );
    let layout = open_data(&arguments.data)?;
    let signed_in = with_control_database(&layout, async |db| Ok(identity::sign_in_operator(&db).await?)).await?;
    let signed_in =
        signed_in.context("there is no operator yet: make one with `management-api create-account --operator`")?;
    println!("{}", serde_json::to_string(&signed_in)?);
    Ok(())
}

#[allow(clippy::print_stdout, reason = "stdout is data")]
fn print_endpoints() -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(&http::endpoints().table())?);
    Ok(())
}

/// One JSON line for whoever started us.
#[allow(clippy::print_stdout, reason = "stdout is data: this line is the whole of it")]
pub(crate) fn announce(site: &Site, https: Option<std::net::SocketAddr>, ca: &Path, setup_token_file: Option<&Path>) {
    let ready = serde_json::json!({
        "event": "ready",
        "https": https.map(|address| address.to_string()),
        "api_url": site.api_url(),
        "ca_file": ca,
        "setup_token_file": setup_token_file,
    });
    println!("{ready}");
}

/// Cancelled by the first SIGTERM or SIGINT from now on.
pub(crate) fn asked_to_stop() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let asked = CancellationToken::new();
    let guard = asked.clone().drop_guard();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        drop(guard);
    });
    Ok(asked)
}
