use crate::{
    context::{Session, cloud_tenant},
    error::CliError,
    output::{ArtifactType, Printer, Progress, Text, bytes},
    settings::{self, Settings},
};
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use systemprompt_cloud::{
    BuildError, BuildEvent, BuildSpec, Deploy, DeployError, DeployProgress, DeploySink, DeploySpec, DeployStage,
    Deployed, HOW_TO_LOOK, ImageBuilder, LayerCache, LeftOut, Plan, Profile, ProfileTarget, PushEvent, PushMode,
};
use systemprompt_contract::{DeploymentId, OperationId, TenantId};

pub(crate) struct Request {
    pub(crate) tenant: Option<String>,
    pub(crate) dry_run: bool,
    pub(crate) allow_secret: Vec<PathBuf>,
    pub(crate) skip_push: bool,
    pub(crate) binary: Option<PathBuf>,
}

#[derive(Serialize)]
struct Released {
    tenant_id: TenantId,
    status: &'static str,
    app_url: Option<String>,
    operation_id: OperationId,
    deployment_id: DeploymentId,
    digest: String,
    uploaded_bytes: u64,
    uploaded_blobs: usize,
    build_ms: u128,
    push_ms: u128,
    rollout_ms: u128,
}

pub(crate) async fn deploy(request: Request, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let profile = cloud_profile(settings)?;
    let build = build_spec(&request, &profile, settings)?;
    let cache_dir = settings::layer_cache()?;
    if request.dry_run {
        let plan = planned(&ImageBuilder::new(build), &cache_dir).map_err(DeployError::from)?;
        return printer.value(ArtifactType::Table, &plan, |text| describe(&plan, text));
    }
    let tenant = cloud_tenant(&settings.tenant_in_force(request.tenant.as_deref(), Some(&profile))?)?;
    let Session { client, .. } = settings.session(printer)?;
    let push = if request.skip_push { PushMode::Skip } else { PushMode::Push };
    let spec = DeploySpec { tenant, build, cache_dir, push };
    let progress = printer.progress();
    let stage = Arc::new(Mutex::new(DeployStage::Build));
    let run = Deploy::new(client, spec).run(sink(progress.clone(), Arc::clone(&stage)));
    let outcome = tokio::select! {
        outcome = run => outcome.map_err(CliError::from),
        signal = tokio::signal::ctrl_c() => {
            signal?;
            Err(interrupted(*stage.lock().unwrap_or_else(PoisonError::into_inner)))
        }
    };
    progress.finish();
    report(tenant, outcome?, printer)
}

/// What would go in, if nothing in it is a secret.
fn planned(builder: &ImageBuilder, cache_dir: &Path) -> Result<Plan, BuildError> {
    let plan = builder.plan()?;
    builder.check(&plan, &LayerCache::open(cache_dir)?)?;
    Ok(plan)
}

fn interrupted(stage: DeployStage) -> CliError {
    match stage {
        DeployStage::Build | DeployStage::Token | DeployStage::Push => {
            CliError::interrupted("stopped before anything was deployed; what was sent is kept for the next time")
        }
        DeployStage::Submit => {
            CliError::interrupted("stopped while the cloud was asked; it may have accepted the deploy")
                .hint(HOW_TO_LOOK)
        }
        DeployStage::Watch => {
            CliError::interrupted("stopped watching; the deploy goes on in the cloud").hint(HOW_TO_LOOK)
        }
    }
}

fn report(tenant_id: TenantId, deployed: Deployed, printer: &Printer) -> Result<(), CliError> {
    let released = Released {
        tenant_id,
        status: "running",
        app_url: deployed.app_url,
        operation_id: deployed.operation_id,
        deployment_id: deployed.deployment_id,
        digest: deployed.digest,
        uploaded_bytes: deployed.push.map_or(0, |push| push.uploaded_bytes),
        uploaded_blobs: deployed.push.map_or(0, |push| push.uploaded_blobs),
        build_ms: deployed.timings.build.as_millis(),
        push_ms: deployed.timings.push.as_millis(),
        rollout_ms: deployed.timings.rollout.as_millis(),
    };
    let total = deployed.timings.build + deployed.timings.push + deployed.timings.rollout;
    printer.value(ArtifactType::PresentationCard, &released, |text| {
        let at = released.app_url.as_deref().map_or_else(String::new, |url| format!(" at {url}"));
        text.line(format!("Running{at}"));
        text.pair("digest", Some(&released.digest));
        text.pair("sent", Some(format!("{} in {} blobs", bytes(released.uploaded_bytes), released.uploaded_blobs)));
        text.pair("took", Some(format!("{:.2} s", total.as_secs_f64())));
    })
}

/// The profile the image will run with.
fn cloud_profile(settings: &Settings) -> Result<Profile, CliError> {
    let names = || settings.project.profile_names().join(", ");
    let profile = settings.profile()?.ok_or_else(|| match names() {
        none if none.is_empty() => CliError::new("no_profile", "this project has no profile")
            .hint("Write .systemprompt/profiles/production/profile.yaml; examples/hello has one to start from."),
        names => CliError::usage(format!("there are several profiles; name one with --profile: {names}")),
    })?;
    if profile.target == ProfileTarget::Cloud {
        return Ok(profile);
    }
    let message =
        format!("the profile {:?} has the target local; a deploy needs one with `target: cloud`", profile.name);
    Err(CliError::new("local_profile", message).hint(format!("Name another with --profile: {}", names())))
}

fn build_spec(request: &Request, profile: &Profile, settings: &Settings) -> Result<BuildSpec, CliError> {
    let binary = match &request.binary {
        Some(binary) => binary.clone(),
        None => std::env::current_exe()
            .map_err(|error| CliError::new("system", format!("this program cannot find its own file: {error}")))?,
    };
    let spec = BuildSpec::new(settings.project.root(), binary, profile.directory_name());
    Ok(BuildSpec { allow_secret: request.allow_secret.clone(), ..spec })
}

fn describe(plan: &Plan, text: &mut Text) {
    for layer in &plan.layers {
        text.line(format!("{} ({}, {} entries)", layer.name, bytes(layer.size_bytes()), layer.entries.len()));
        for entry in layer.entries.iter().filter(|_| layer.name != "base") {
            if entry.size > 0 || entry.mode & 0o111 == 0 {
                text.line(format!("  /{} ({})", entry.path, bytes(entry.size)));
            }
        }
    }
    for left in &plan.left_out {
        text.line(format!("left out: {} ({})", left.path.display(), left.why));
    }
    text.line(format!("{} in {} layers, before compression", bytes(plan.size_bytes()), plan.layers.len()));
}

/// Tells a person how far it is, and remembers it.
fn sink(progress: Progress, reached: Arc<Mutex<DeployStage>>) -> DeploySink {
    Arc::new(move |event| match event {
        DeployProgress::Stage(stage) => {
            *reached.lock().unwrap_or_else(PoisonError::into_inner) = stage;
            progress.now(stage_text(stage));
        }
        DeployProgress::LeftOut(left_out) => progress.step(&left_out_text(&left_out)),
        DeployProgress::Build(BuildEvent::Scanned { files }) => progress.now(&format!("Packing {files} files")),
        DeployProgress::Build(BuildEvent::Layer { name, size, cached: false }) => {
            progress.step(&format!("built  {name} ({})", bytes(size)));
        }
        DeployProgress::Push(PushEvent::Uploading { size, .. }) => progress.now(&format!("Sending {}", bytes(size))),
        DeployProgress::Push(PushEvent::Manifest { digest }) => progress.step(&format!("pushed {digest}")),
        DeployProgress::Build(BuildEvent::Layer { .. }) | DeployProgress::Push(_) => {}
        DeployProgress::Busy => progress.now("Waiting for the end of what else is being done to this tenant"),
        DeployProgress::Accepted(deploy) => {
            progress.step(&format!("deploy accepted, operation {}", deploy.operation_id));
        }
        DeployProgress::Step(event) => progress.step(&event.message),
    })
}

/// Few are named; `--dry-run` shows them all.
fn left_out_text(left_out: &[LeftOut]) -> String {
    const NAMED: usize = 3;
    let named: Vec<_> = left_out.iter().take(NAMED).map(|left| left.path.display().to_string()).collect();
    let more = if left_out.len() > NAMED { ", …" } else { "" };
    let named = named.join(", ");
    format!("left out {} of the project: {named}{more} (why: systemprompt cloud deploy --dry-run)", left_out.len())
}

const fn stage_text(stage: DeployStage) -> &'static str {
    match stage {
        DeployStage::Build => "Building the image",
        DeployStage::Token => "Asking for the right to push",
        DeployStage::Push => "Pushing",
        DeployStage::Submit => "Asking for the deploy",
        DeployStage::Watch => "Waiting for the new release to be healthy",
    }
}
