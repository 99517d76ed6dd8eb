//! The command line is killed in the middle of a deploy. The same command again has to succeed, and nothing is there
//! twice.

use crate::crash::settled;
use anyhow::{Context as _, ensure};
use e2e::{Stack, Start, TenantRef, until};
use std::{
    fs::{self, File},
    path::Path,
    process::Stdio,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::{AbortHandle, JoinSet},
};

/// What of a push still arrives: a part of its largest layer, whatever else is sent beside it.
const ARRIVES: usize = 1 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_command_killed_in_the_middle_of_a_push_leaves_nothing_to_trip_over() -> anyhow::Result<()> {
    let (stack, line) = behind_a_line().await?;
    let tenant = stack.provision("pushing").await?;
    let folder = stack.data().join("registry/tenants").join(tenant.id.to_string());
    let uploads = || fs::read_dir(folder.join("uploads")).into_iter().flatten().flatten();
    let half_written = || uploads().any(|upload| upload.metadata().is_ok_and(|upload| upload.len() > 0));
    killed(&stack, &tenant, &line, Cut::Push, async |_| true).await?;
    until("what had arrived is kept", async || half_written()).await?;
    ensure!(!folder.join("manifests").exists(), "the push was not cut in its middle");

    stack.deploy(&tenant).await?;
    released(&stack, &tenant, &["live"]).await?;
    // Nor does one that sends something new.
    fs::write(tenant.project.join("web/dist/new.html"), "new")?;
    stack.deploy(&tenant).await?;
    released(&stack, &tenant, &["live", "retired"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_killed_before_its_deploy_arrives_has_deployed_nothing() -> anyhow::Result<()> {
    let (stack, line) = behind_a_line().await?;
    let tenant = stack.provision("asking").await?;
    killed(&stack, &tenant, &line, Cut::Call, async |said| said.contains("pushed sha256:")).await?;
    ensure!(deployments(&stack).await?.is_empty(), "the call arrived");
    settled(&stack, &[tenant.id], &[]).await?;

    stack.deploy(&tenant).await?;
    released(&stack, &tenant, &["live"]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_killed_before_its_deploy_is_answered_has_deployed_once() -> anyhow::Result<()> {
    let (stack, line) = behind_a_line().await?;
    let tenant = stack.provision("asked").await?;
    killed(&stack, &tenant, &line, Cut::Answer, async |_| deployments(&stack).await.is_ok_and(|all| !all.is_empty()))
        .await?;

    // What was accepted goes on by itself, and the next one waits for its end.
    stack.deploy(&tenant).await?;
    released(&stack, &tenant, &["live", "retired"]).await
}

/// The tenant answers, from one instance of one release; `states` are those of all deploys.
async fn released(stack: &Stack, tenant: &TenantRef, states: &[&str]) -> anyhow::Result<()> {
    settled(stack, &[tenant.id], &[tenant.id]).await?;
    let found = deployments(stack).await?;
    ensure!(found == states, "expected deploys {states:?}, found {found:?}");
    let (status, _) = stack.get(tenant, "/").await?;
    ensure!(status == 200, "{status}");
    Ok(())
}

async fn deployments(stack: &Stack) -> anyhow::Result<Vec<String>> {
    let mut control = e2e::connect(stack, "control", "systemprompt").await?;
    let states = sqlx::query_scalar("SELECT state::text FROM deployments ORDER BY state::text");
    Ok(states.fetch_all(&mut control).await?)
}

async fn behind_a_line() -> anyhow::Result<(Stack, Line)> {
    let mut stack = Stack::prepare()?;
    let line = Line::open(|port| stack.put_behind(port)).await?;
    stack.begin(&Start::default()).await?;
    Ok((stack, line))
}

/// `cloud deploy` through a line that is cut, killed when the cut was reached and `when` is true of what it said.
async fn killed(
    stack: &Stack,
    tenant: &TenantRef,
    line: &Line,
    cut: Cut,
    mut when: impl AsyncFnMut(&str) -> bool,
) -> anyhow::Result<()> {
    let signed_in = stack.cli(tenant, &["cloud", "auth", "whoami"]).await?;
    ensure!(signed_in.ok, "{signed_in:?}");
    line.cut(Some(cut));
    let (said, id) = (tenant.project.with_extension("said"), tenant.id.to_string());
    let mut command = stack.cli_command(&tenant.project, &["cloud", "deploy", "--tenant", &id])?;
    let mut child = command.stdout(Stdio::null()).stderr(File::create(&said)?).spawn()?;
    let words = |said: &Path| fs::read_to_string(said).unwrap_or_default();
    let reached = until("the command is where it is to be killed", async || {
        line.was_cut() && when(&words(&said)).await || child.try_wait().is_ok_and(|status| status.is_some())
    });
    reached.await.with_context(|| words(&said))?;
    ensure!(child.try_wait()?.is_none(), "it ended by itself: {}", words(&said));
    child.kill().await?;
    line.cut(None);
    Ok(())
}

/// Where nothing gets through any more, without a connection ending.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Cut {
    /// In the middle of what is sent to the registry.
    Push,
    /// What the API is told once the push has begun: the deploy call.
    Call,
    /// What the API answers once the push has begun.
    Answer,
}

/// The way of everybody to the cloud. Dropped, all its connections end.
struct Line {
    state: Arc<State>,
    accepting: AbortHandle,
}

#[derive(Default)]
struct State {
    cut: Mutex<Option<Cut>>,
    pushing: AtomicBool,
    pushed: AtomicUsize,
    was_cut: AtomicBool,
}

impl Line {
    /// `put` is told the line's port and says where it leads.
    async fn open(put: impl FnOnce(u16) -> u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let cloud = put(listener.local_addr()?.port());
        let state = Arc::<State>::default();
        let accepting = tokio::spawn({
            let state = Arc::clone(&state);
            async move {
                let mut connections = JoinSet::new();
                while let Ok((client, _)) = listener.accept().await {
                    connections.spawn(connect(client, cloud, Arc::clone(&state)));
                }
            }
        });
        Ok(Self { state, accepting: accepting.abort_handle() })
    }

    fn cut(&self, cut: Option<Cut>) {
        *self.state.cut.lock().expect("nobody panics with it") = cut;
    }

    fn was_cut(&self) -> bool {
        self.state.was_cut.load(Ordering::SeqCst)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn connect(client: TcpStream, cloud: u16, state: Arc<State>) -> anyhow::Result<()> {
    // The first bytes of TLS name the server in clear.
    let mut hello = [0; 1 << 14];
    client.readable().await?;
    let peeked = client.peek(&mut hello).await?;
    let to_registry = hello[..peeked].windows(9).any(|name| name == b"registry.");
    state.pushing.fetch_or(to_registry, Ordering::SeqCst);
    let (calling, answering) = client.into_split();
    let (answers, calls) = TcpStream::connect(("127.0.0.1", cloud)).await?.into_split();
    let there = carry(calling, calls, |bytes| state.lets_call(to_registry, bytes));
    let back = carry(answers, answering, |bytes| state.lets_answer(to_registry, bytes));
    tokio::try_join!(there, back).map(drop)
}

/// Carries bytes for as long as `lets` takes them all; then nothing more is read, and nobody hangs up.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, lets: impl Fn(usize) -> usize) -> anyhow::Result<()> {
    let mut buffer = vec![0; 1 << 14];
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(to.shutdown().await?);
        }
        let through = lets(read);
        to.write_all(&buffer[..through]).await?;
        if through < read {
            std::future::pending::<()>().await;
        }
    }
}

impl State {
    /// How many of these bytes of a client get through.
    fn lets_call(&self, to_registry: bool, bytes: usize) -> usize {
        self.through(bytes, |cut| match cut {
            Cut::Push => to_registry && self.pushed.fetch_add(bytes, Ordering::SeqCst) > ARRIVES,
            Cut::Call => !to_registry && self.pushing.load(Ordering::SeqCst),
            Cut::Answer => false,
        })
    }

    /// How many of these bytes of the cloud get through.
    fn lets_answer(&self, from_registry: bool, bytes: usize) -> usize {
        self.through(bytes, |cut| cut == Cut::Answer && !from_registry && self.pushing.load(Ordering::SeqCst))
    }

    fn through(&self, bytes: usize, is_cut: impl FnOnce(Cut) -> bool) -> usize {
        let cut = self.cut.lock().expect("nobody panics with it").is_some_and(is_cut);
        self.was_cut.fetch_or(cut, Ordering::SeqCst);
        if cut { 0 } else { bytes }
    }
}
