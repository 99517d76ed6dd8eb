//! One deploy as the client sees it.
//!
//! | state | does | then |
//! |---|---|---|
//! | Build | packs the project, layer by layer, from the cache where nothing changed | Token |
//! | Token | asks for ten minutes of pushing | Push, or Submit when nothing is to be pushed |
//! | Push | sends what the registry lacks | Submit; Token again when the token ended meanwhile |
//! | Submit | asks for the deploy, with one key per command | Watch; itself again when no answer came, or the tenant is busy |
//! | Watch | follows the tenant's events to the last frame | done, or failed with the instance's last lines |
//!
//! Every state can be entered again: layers are cached, blobs are asked for before they are sent, the key makes a
//! repeated submit the same deploy, and events are read from the log. Until Submit nothing has changed in the cloud;
//! after it the deploy goes on without us.

use crate::{api_url::ApiUrl, client::CloudApiClient, error::CloudError};
use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};
use systemprompt_contract::{
    ApiError, DeployAccepted, DeployRequest, DeploymentEvent, DeploymentId, DeploymentState, ErrorCode, Event,
    OperationId, OperationStatus, RegistryToken, RequestId, TenantId, token,
};
use systemprompt_oci::{
    BuiltImage, ImageBuilder, PushError, PushEvent, PushReport, RegistryClient,
    build::{BuildError, BuildEvent, BuildSpec, LayerCache, LeftOut},
};
use url::Url;

/// How often a push may outlive its token before something else must be wrong.
const MAX_TOKENS: u32 = 3;
const MAX_SUBMITS: u32 = 6;
const SUBMIT_PAUSE: Duration = Duration::from_millis(250);
/// How long a deploy waits for what else is being done to its tenant, such as the deploy of a command that was killed.
const BUSY_WITHIN: Duration = Duration::from_mins(5);
const BUSY_PAUSE: Duration = Duration::from_secs(2);
/// After so much silence of the stream the operation itself is asked.
const ASK_AFTER: Duration = Duration::from_secs(10);
/// After so much silence of everything nobody is asked any more.
const GIVE_UP_AFTER: Duration = Duration::from_mins(5);

/// What to deploy, and where.
#[derive(Debug, Clone)]
pub struct DeploySpec {
    /// The tenant.
    pub tenant: TenantId,
    /// What the image is made of.
    pub build: BuildSpec,
    /// Where finished layers are kept, of all projects; never in one, whose files may be a stranger's.
    pub cache_dir: PathBuf,
    /// Whether the image is sent.
    pub push: PushMode,
}

/// Whether the image is sent to the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PushMode {
    /// What the registry lacks.
    Push,
    /// Nothing: the very image must have been pushed before.
    Skip,
}

/// What happens during a deploy.
#[derive(Debug, Clone)]
pub enum DeployProgress {
    /// The next state begins.
    Stage(DeployStage),
    /// What was found in the project and does not go into the image; not empty.
    LeftOut(Vec<LeftOut>),
    /// The build came further.
    Build(BuildEvent),
    /// The push came further.
    Push(PushEvent),
    /// Something else is being done to the tenant; the deploy is asked for again until that is over.
    Busy,
    /// From here on the cloud goes on by itself.
    Accepted(DeployAccepted),
    /// The cloud came further.
    Step(DeploymentEvent),
}

/// The states of the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeployStage {
    /// Packing.
    Build,
    /// Asking for the right to push.
    Token,
    /// Sending.
    Push,
    /// Asking for the deploy.
    Submit,
    /// Following it.
    Watch,
}

/// Gets every [`DeployProgress`], from several threads during the build.
pub type DeploySink = Arc<dyn Fn(DeployProgress) + Send + Sync>;

/// A release that is live.
#[derive(Debug, Clone)]
pub struct Deployed {
    /// The operation.
    pub operation_id: OperationId,
    /// The release.
    pub deployment_id: DeploymentId,
    /// What runs.
    pub digest: String,
    /// Where.
    pub app_url: Option<String>,
    /// What was sent; none with [`PushMode::Skip`].
    pub push: Option<PushReport>,
    /// How long each part took.
    pub timings: DeployTimings,
}

/// Wall time of the parts of a deploy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DeployTimings {
    /// Build.
    pub build: Duration,
    /// Token and push.
    pub push: Duration,
    /// Submit and watch.
    pub rollout: Duration,
}

/// Why a release is not live; if another was, it still serves.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// No image.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// Not pushed.
    #[error(transparent)]
    Push(#[from] PushError),
    /// The registry's name cannot be called.
    #[error("the cloud named a registry that cannot be called: {0:?}")]
    Registry(String),
    /// A call failed before the deploy was accepted.
    #[error(transparent)]
    Cloud(#[from] CloudError),
    /// The cloud refused the release after it was accepted.
    #[error("{}", error.message)]
    Failed {
        /// Why.
        error: ApiError,
        /// Last lines of the instance that failed.
        logs: Vec<String>,
    },
    /// The deploy was asked for and may have been accepted: no answer came.
    #[error("the cloud did not answer whether it accepted the deploy: {0}")]
    Unanswered(CloudError),
    /// The deploy was accepted, but its end was not seen.
    #[error("the deploy was accepted and goes on, but it can no longer be followed: {source}")]
    Lost {
        /// The operation.
        operation: OperationId,
        /// What broke.
        source: CloudError,
    },
    /// The thread that built ended; the reason is in its own message.
    #[error("the image build stopped unexpectedly")]
    BuildStopped,
}

impl DeployError {
    /// For programs, lower snake case.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Build(BuildError::Secrets(_)) => "secrets_in_image",
            Self::Build(_) | Self::BuildStopped => "build_failed",
            Self::Push(_) | Self::Registry(_) => "push_failed",
            Self::Cloud(error) => error.code(),
            Self::Failed { error, .. } => error.code.as_str(),
            Self::Unanswered(_) => "deploy_unanswered",
            Self::Lost { .. } => "deploy_not_followed",
        }
    }

    /// Finds the call that failed in the log of the cloud.
    pub fn request_id(&self) -> Option<RequestId> {
        match self {
            Self::Cloud(error) | Self::Unanswered(error) | Self::Lost { source: error, .. } => error.request_id(),
            Self::Failed { error, .. } => error.request_id,
            Self::Build(_) | Self::Push(_) | Self::Registry(_) | Self::BuildStopped => None,
        }
    }

    /// What to do next.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Build(BuildError::Secrets(_)) => {
                Some("Take it out of the project, or allow one file: --allow-secret PATH".to_owned())
            }
            Self::Build(BuildError::CacheFolder { .. }) => {
                Some("Remove it, or set XDG_CACHE_HOME to a folder of yours.".to_owned())
            }
            Self::Build(_) | Self::BuildStopped | Self::Registry(_) => None,
            Self::Push(_) => {
                Some("Nothing was deployed; run the same command again: what was sent is kept.".to_owned())
            }
            Self::Cloud(error) => error.hint(),
            Self::Failed { error, .. } => error.hint.clone(),
            Self::Unanswered(_) | Self::Lost { .. } => Some(HOW_TO_LOOK.to_owned()),
        }
    }
}

/// For whoever stops watching a deploy that was accepted.
pub const HOW_TO_LOOK: &str = "See how it ends: systemprompt cloud status, systemprompt cloud logs";

/// A deploy to be run once; running the same project again is another deploy.
#[derive(Debug)]
pub struct Deploy {
    client: CloudApiClient,
    spec: DeploySpec,
    /// One per command, so that a submit whose answer was lost starts nothing twice.
    key: String,
}

enum State {
    Build,
    Token { image: Arc<BuiltImage>, tokens: u32 },
    Push { image: Arc<BuiltImage>, token: RegistryToken, tokens: u32 },
    Submit { image: Arc<BuiltImage>, token: RegistryToken, pushed: Option<PushReport> },
    Watch { accepted: DeployAccepted, pushed: Option<PushReport> },
    Done(Deployed),
}

impl Deploy {
    /// A deploy of `spec` through `client`.
    pub fn new(client: CloudApiClient, spec: DeploySpec) -> Self {
        Self { client, spec, key: token::random_text() }
    }

    /// Runs to the end. Dropping the future before [`DeployProgress::Accepted`] changes nothing in the cloud; after
    /// it the deploy goes on.
    ///
    /// # Errors
    /// [`DeployError`]; the release that served before still does.
    pub async fn run(self, sink: DeploySink) -> Result<Deployed, DeployError> {
        let mut state = State::Build;
        let mut timings = DeployTimings::default();
        loop {
            if let Some(stage) = state.stage() {
                sink(DeployProgress::Stage(stage));
            }
            let (started, spent) = (Instant::now(), state.spent(&mut timings));
            let next = match state {
                State::Build => self.build(&sink).await?,
                State::Token { image, tokens } => self.token(image, tokens).await?,
                State::Push { image, token, tokens } => self.push(image, token, tokens, &sink).await?,
                State::Submit { image, token, pushed } => self.submit(&image, &token, pushed, &sink).await?,
                State::Watch { accepted, pushed } => self.watch(accepted, pushed, &sink).await?,
                State::Done(deployed) => return Ok(Deployed { timings, ..deployed }),
            };
            if let Some(spent) = spent {
                *spent += started.elapsed();
            }
            state = next;
        }
    }

    async fn build(&self, sink: &DeploySink) -> Result<State, DeployError> {
        let (spec, sink) = (self.spec.clone(), Arc::clone(sink));
        let built = tokio::task::spawn_blocking(move || {
            let builder = ImageBuilder::new(spec.build);
            let cache = LayerCache::open(spec.cache_dir)?;
            let plan = builder.plan()?;
            if !plan.left_out.is_empty() {
                sink(DeployProgress::LeftOut(plan.left_out.clone()));
            }
            builder.build(&plan, &cache, &|event| sink(DeployProgress::Build(event)))
        });
        let image = built.await.map_err(|_| DeployError::BuildStopped)??;
        Ok(State::Token { image: Arc::new(image), tokens: 1 })
    }

    async fn token(&self, image: Arc<BuiltImage>, tokens: u32) -> Result<State, DeployError> {
        let token = self.client.registry_token(self.spec.tenant).await?;
        Ok(match self.spec.push {
            PushMode::Push => State::Push { image, token, tokens },
            PushMode::Skip => State::Submit { image, token, pushed: None },
        })
    }

    async fn push(
        &self,
        image: Arc<BuiltImage>,
        token: RegistryToken,
        tokens: u32,
        sink: &DeploySink,
    ) -> Result<State, DeployError> {
        let base = self.registry_url(&token.registry)?;
        let (http, password) = (self.client.http().clone(), token.token.clone());
        let registry = RegistryClient::new(http, base, token.username.clone(), password);
        let progress = |event| sink(DeployProgress::Push(event));
        match registry.push(&image, &token.repository, &token.tag, &progress).await {
            Ok(report) => Ok(State::Submit { image, token, pushed: Some(report) }),
            Err(PushError::Unauthorized) if tokens < MAX_TOKENS => Ok(State::Token { image, tokens: tokens + 1 }),
            Err(error) => Err(error.into()),
        }
    }

    async fn submit(
        &self,
        image: &BuiltImage,
        token: &RegistryToken,
        pushed: Option<PushReport>,
        sink: &DeploySink,
    ) -> Result<State, DeployError> {
        let request = DeployRequest {
            image: format!("{}/{}:{}", token.registry, token.repository, token.tag),
            digest: Some(image.digest.to_string()),
        };
        let (mut attempt, mut pause) = (1, SUBMIT_PAUSE);
        let mut unanswered = false;
        let mut busy_since = None;
        loop {
            match self.client.deploy(self.spec.tenant, &request, &self.key).await {
                Ok(accepted) => {
                    sink(DeployProgress::Accepted(accepted.clone()));
                    return Ok(State::Watch { accepted, pushed });
                }
                Err(error)
                    if error.is_busy() && busy_since.is_none_or(|since: Instant| since.elapsed() < BUSY_WITHIN) =>
                {
                    if busy_since.is_none() {
                        sink(DeployProgress::Busy);
                    }
                    let waited = busy_since.get_or_insert_with(Instant::now).elapsed();
                    tokio::time::sleep((waited / 2).clamp(SUBMIT_PAUSE, BUSY_PAUSE)).await;
                }
                Err(error) if attempt < MAX_SUBMITS && error.is_transient() => {
                    unanswered |= error.may_have_arrived();
                    tracing::debug!(%error, attempt, "submitting again with the same key");
                    tokio::time::sleep(pause).await;
                    (attempt, pause) = (attempt + 1, pause * 2);
                }
                Err(error) if unanswered || error.may_have_arrived() => return Err(DeployError::Unanswered(error)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn watch(
        &self,
        accepted: DeployAccepted,
        pushed: Option<PushReport>,
        sink: &DeploySink,
    ) -> Result<State, DeployError> {
        let operation = accepted.operation_id;
        let lost = |source| DeployError::Lost { operation, source };
        let mut events = self.client.tenant_events(self.spec.tenant);
        let mut heard = tokio::time::Instant::now();
        loop {
            let verdict = match tokio::time::timeout(ASK_AFTER, events.next()).await {
                Ok(Ok((_, Event::Deployment(event)))) if event.operation_id == operation => {
                    let verdict = Verdict::of_event(&event);
                    sink(DeployProgress::Step(event));
                    verdict
                }
                Ok(Ok(_)) => Verdict::GoOn,
                Ok(Err(error)) => return Err(lost(error)),
                Err(_) => match self.ask(operation).await {
                    Ok(verdict) => verdict,
                    Err(error) if error.is_transient() && heard.elapsed() < GIVE_UP_AFTER => continue,
                    Err(error) => return Err(lost(error)),
                },
            };
            heard = tokio::time::Instant::now();
            match verdict {
                Verdict::GoOn => {}
                Verdict::Failed { error, logs } => return Err(DeployError::Failed { error, logs }),
                Verdict::Live { app_url } => {
                    return Ok(State::Done(Deployed {
                        operation_id: operation,
                        deployment_id: accepted.deployment_id,
                        digest: accepted.digest,
                        app_url: app_url.or(accepted.app_url),
                        push: pushed,
                        timings: DeployTimings::default(),
                    }));
                }
            }
        }
    }

    /// The operation's own word, where the stream says nothing: it may have been cancelled by another.
    async fn ask(&self, operation: OperationId) -> Result<Verdict, CloudError> {
        let view = self.client.operation(operation).await?;
        Ok(Verdict::of_operation(view.status, view.error))
    }

    /// `https`, unless the registry is the very origin of an API on this machine that is called without TLS.
    fn registry_url(&self, authority: &str) -> Result<Url, DeployError> {
        let api_url = self.client.api_url();
        let base = if authority == api_url.authority() { api_url.to_string() } else { format!("https://{authority}") };
        let invalid = || DeployError::Registry(authority.to_owned());
        let origin: ApiUrl = base.parse().map_err(|_| invalid())?;
        Url::parse(origin.as_str()).map_err(|_| invalid())
    }
}

impl State {
    const fn stage(&self) -> Option<DeployStage> {
        Some(match self {
            Self::Build => DeployStage::Build,
            Self::Token { .. } => DeployStage::Token,
            Self::Push { .. } => DeployStage::Push,
            Self::Submit { .. } => DeployStage::Submit,
            Self::Watch { .. } => DeployStage::Watch,
            Self::Done(_) => return None,
        })
    }

    const fn spent<'a>(&self, timings: &'a mut DeployTimings) -> Option<&'a mut Duration> {
        match self {
            Self::Build => Some(&mut timings.build),
            Self::Token { .. } | Self::Push { .. } => Some(&mut timings.push),
            Self::Submit { .. } | Self::Watch { .. } => Some(&mut timings.rollout),
            Self::Done(_) => None,
        }
    }
}

/// What a frame, or the operation itself, says about the end.
#[derive(Debug, PartialEq)]
enum Verdict {
    GoOn,
    Live { app_url: Option<String> },
    Failed { error: ApiError, logs: Vec<String> },
}

impl Verdict {
    fn of_event(event: &DeploymentEvent) -> Self {
        match event.state {
            DeploymentState::Running => Self::GoOn,
            DeploymentState::Succeeded => {
                Self::Live { app_url: Some(&event.app_url).filter(|url| !url.is_empty()).cloned() }
            }
            DeploymentState::Failed => {
                let unexplained = || ApiError::new(ErrorCode::Internal, event.message.clone());
                let error = event.error.clone().unwrap_or_else(unexplained);
                Self::Failed { error, logs: event.logs.clone() }
            }
        }
    }

    fn of_operation(status: OperationStatus, error: Option<ApiError>) -> Self {
        match status {
            OperationStatus::Queued | OperationStatus::Running | OperationStatus::Unwinding => Self::GoOn,
            OperationStatus::Succeeded => Self::Live { app_url: None },
            OperationStatus::Failed | OperationStatus::Stuck => {
                let unexplained =
                    || ApiError::new(ErrorCode::Internal, format!("the deploy ended as {}", status.as_str()));
                Self::Failed { error: error.unwrap_or_else(unexplained), logs: Vec::new() }
            }
        }
    }
}

impl fmt::Display for DeployStage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Build => "build",
            Self::Token => "token",
            Self::Push => "push",
            Self::Submit => "submit",
            Self::Watch => "watch",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(state: DeploymentState) -> DeploymentEvent {
        DeploymentEvent {
            operation_id: OperationId::new(),
            deployment_id: DeploymentId::new(),
            step: systemprompt_contract::DeploymentStep::Probe,
            state,
            message: "the app never answered".to_owned(),
            app_url: String::new(),
            error: None,
            logs: vec!["last words".to_owned()],
        }
    }

    #[test]
    fn only_a_last_frame_ends_the_watch() {
        assert_eq!(Verdict::of_event(&event(DeploymentState::Running)), Verdict::GoOn);
        assert_eq!(Verdict::of_event(&event(DeploymentState::Succeeded)), Verdict::Live { app_url: None });
        let Verdict::Failed { error, logs } = Verdict::of_event(&event(DeploymentState::Failed)) else {
            panic!("a failed frame is a failure")
        };
        assert_eq!((error.message.as_str(), logs.len()), ("the app never answered", 1));
    }

    #[test]
    fn an_operation_that_is_over_is_believed() {
        assert_eq!(Verdict::of_operation(OperationStatus::Unwinding, None), Verdict::GoOn);
        assert!(matches!(Verdict::of_operation(OperationStatus::Stuck, None), Verdict::Failed { .. }));
        assert_eq!(Verdict::of_operation(OperationStatus::Succeeded, None), Verdict::Live { app_url: None });
    }

    fn deploy(api: &str) -> Deploy {
        let client = systemprompt_oci::http_client(&[]).expect("client");
        let spec = DeploySpec {
            tenant: TenantId::new(),
            build: BuildSpec::new(".", "x", "p"),
            cache_dir: PathBuf::new(),
            push: PushMode::Push,
        };
        Deploy { client: CloudApiClient::without_token(api.parse().expect("url"), client), spec, key: String::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cloud_that_falls_silent_is_given_up() {
        // Connections are taken by the kernel, and nobody ever answers.
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let deploy = deploy(&format!("http://{}", listener.local_addr().expect("address")));
        let accepted = DeployAccepted {
            status: "deploying".to_owned(),
            app_url: None,
            operation_id: OperationId::new(),
            deployment_id: DeploymentId::new(),
            digest: String::new(),
        };
        let sink: DeploySink = Arc::new(|_| {});
        let begun = tokio::time::Instant::now();
        let ended = deploy.watch(accepted, None, &sink).await.err();
        assert!(matches!(ended, Some(DeployError::Lost { .. })), "{ended:?}");
        assert!(begun.elapsed() >= GIVE_UP_AFTER && begun.elapsed() < GIVE_UP_AFTER * 2, "{:?}", begun.elapsed());
    }

    #[test]
    fn the_registry_is_called_with_tls_but_for_our_own_loopback() {
        let url = |api: &str, registry: &str| deploy(api).registry_url(registry).map(|url| url.to_string());
        assert_eq!(url("https://api.x.io", "registry.x.io:8443").expect("url"), "https://registry.x.io:8443/");
        assert_eq!(url("http://127.0.0.1:1", "127.0.0.1:1").expect("url"), "http://127.0.0.1:1/");
        assert_eq!(url("http://127.0.0.1:1", "127.0.0.1:2").expect("url"), "https://127.0.0.1:2/");
        for bad in ["", "a b", "user@evil", "evil/path", "evil?x"] {
            assert!(url("https://api.x.io", bad).is_err(), "{bad}");
        }
    }
}
