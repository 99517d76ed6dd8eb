use crate::{
    commands::open_in_browser,
    context::Session,
    error::CliError,
    output::{ArtifactType, Printer, Progress},
    settings::Settings,
};
use serde::Serialize;
use std::{path::Path, sync::OnceLock, time::Duration};
use systemprompt_cloud::{
    CheckoutError, CheckoutOutcome, CheckoutProgress, CloudApiClient, NewCloudTenantParams, StoredTenant, TenantStore,
    TenantStoreError, follow_checkout, resume_command, run_checkout_callback_flow,
};
use systemprompt_contract::{CheckoutCreated, CheckoutId, CheckoutRequest, Plan, Region, TenantId, TenantName};

pub(crate) struct Request {
    pub(crate) name: Option<TenantName>,
    pub(crate) region: Region,
    pub(crate) plan: Option<String>,
    /// A checkout that was started before.
    pub(crate) checkout: Option<CheckoutId>,
    pub(crate) open_browser: bool,
    pub(crate) within: Duration,
}

#[derive(Serialize)]
struct Created {
    checkout_id: CheckoutId,
    id: TenantId,
    name: String,
    status: String,
    app_url: String,
    needs_deploy: bool,
}

/// Buys and waits. The tenant is in `tenants.json`, selected, as soon as its id is known, so that whatever happens
/// afterwards leaves something to go on with.
pub(crate) async fn create(request: Request, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let Session { client, .. } = settings.session(printer)?;
    let path = settings.tenants_path(settings.profile()?.as_ref())?;
    let progress = printer.progress();
    let begun = request.checkout.map_or_else(OnceLock::new, OnceLock::from);
    let outcome = tokio::select! {
        outcome = checkout(request, &client, settings, printer, &path, &progress, &begun) => outcome,
        signal = tokio::signal::ctrl_c() => {
            signal?;
            Err(match begun.get() {
                Some(id) => CliError::interrupted("stopped waiting; the checkout stays as it is").hint(go_on(*id)),
                None => CliError::interrupted("stopped before anything was bought"),
            })
        }
    };
    progress.finish();
    let outcome = outcome?;
    let tenant = client.tenant(outcome.tenant).await?;
    TenantStore::update(&path, |store| store.upsert(StoredTenant::from(&tenant.summary)))?;
    let created = Created {
        checkout_id: outcome.checkout,
        id: outcome.tenant,
        name: tenant.summary.name,
        status: tenant.summary.status,
        app_url: tenant.app_url,
        needs_deploy: outcome.needs_deploy,
    };
    printer.value(ArtifactType::PresentationCard, &created, |text| {
        text.line(format!("{} is ready", created.name));
        text.pair("id", Some(created.id));
        text.pair("status", Some(&created.status));
        text.pair("url", Some(&created.app_url));
    })?;
    if created.needs_deploy {
        printer.next("systemprompt cloud deploy");
    }
    Ok(())
}

async fn checkout(
    request: Request,
    client: &CloudApiClient,
    settings: &Settings,
    printer: &Printer,
    path: &Path,
    progress: &Progress,
    begun: &OnceLock<CheckoutId>,
) -> Result<CheckoutOutcome, CliError> {
    let (region, open_browser, within) = (request.region, request.open_browser, request.within);
    let mut sink = |event: CheckoutProgress| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        match event {
            CheckoutProgress::Created(created) => {
                begun.get_or_init(|| created.checkout_session_id);
                announce(&created, open_browser, progress);
            }
            CheckoutProgress::Tenant { id, name } => {
                remember(path, id, &name, region)?;
                progress.step(&format!("{name}: bought, tenant {id}"));
            }
            CheckoutProgress::Event(event) => {
                let what = event.message.unwrap_or_else(|| event.status.clone());
                progress.step(&format!("{}: {what}", event.tenant_name));
            }
        }
        Ok(())
    };
    if let Some(id) = request.checkout {
        progress.now("Waiting for the checkout to be confirmed");
        return follow_checkout(client, id, within, &mut sink).await.map_err(|error| unfinished(error, Some(id)));
    }
    let plan = choose_plan(client.plans().await?, request.plan.as_deref(), settings, printer).await?;
    let name = request.name.or_else(|| name_of_project(settings));
    let checkout = CheckoutRequest { price_id: plan.paddle_price_id, region, redirect_uri: None, name };
    let outcome = run_checkout_callback_flow(client, checkout, within, &mut sink).await;
    outcome.map_err(|error| unfinished(error, begun.get().copied()))
}

/// A call that fails does not end the checkout.
fn unfinished(error: CheckoutError, begun: Option<CheckoutId>) -> CliError {
    match (&error, begun) {
        (CheckoutError::Cloud(cloud), Some(_)) if cloud.is_not_found() => {
            CliError::from(error).hint("Start another one: systemprompt cloud tenant create")
        }
        (CheckoutError::Cloud(_), Some(id)) => CliError::from(error).hint_before(&go_on(id)),
        _ => error.into(),
    }
}

fn go_on(id: CheckoutId) -> String {
    format!("Go on with the checkout: {}", resume_command(id))
}

fn announce(created: &CheckoutCreated, open_browser: bool, progress: &Progress) {
    let id = created.checkout_session_id;
    progress.step("Complete the checkout in your browser:");
    progress.step(&format!("  {}", created.checkout_url));
    progress.step("With manual billing the operator confirms it:");
    progress.step(&format!("  systemprompt cloud checkout confirm {id}"));
    progress.step(&format!("To go on waiting later: {}", resume_command(id)));
    if open_browser && !open_in_browser(&created.checkout_url) {
        progress.step("No browser could be opened; open the address yourself.");
    }
    progress.now("Waiting for the checkout to be confirmed");
}

fn remember(path: &Path, id: TenantId, name: &str, region: Region) -> Result<(), TenantStoreError> {
    let tenant = StoredTenant::new_cloud(NewCloudTenantParams {
        id: id.to_string(),
        name: name.to_owned(),
        app_id: Some(id.slug().app_name().to_string()),
        hostname: None,
        region: Some(region.to_string()),
        internal_database_url: None,
        sync_token: None,
    });
    TenantStore::update(path, |store| {
        store.upsert(tenant);
        store.selected = Some(id.to_string());
    })
}

/// Nothing is bought that was not named, unless there is no choice.
async fn choose_plan(
    mut plans: Vec<Plan>,
    asked: Option<&str>,
    settings: &Settings,
    printer: &Printer,
) -> Result<Plan, CliError> {
    let names = plans.iter().map(|plan| plan.name.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(asked) = asked {
        let is_it =
            |plan: &Plan| plan.id == asked || plan.paddle_price_id == asked || plan.name.eq_ignore_ascii_case(asked);
        let found = plans.into_iter().find(is_it);
        return found
            .ok_or_else(|| CliError::new("no_such_plan", format!("there is no plan {asked:?}; there are: {names}")));
    }
    match plans.len() {
        0 => Err(CliError::new("no_plans", "this installation offers no plans").hint("Tell its operator.")),
        1 => Ok(plans.remove(0)),
        _ if settings.interactive => {
            let describe =
                |plan: &Plan| format!("{} ({} MiB, {} GiB)", plan.name, plan.memory_mb_default, plan.volume_gb);
            let choices: Vec<_> = plans.iter().map(describe).collect();
            printer.talk("Plans:");
            // Not on this thread: Ctrl-C must be heard.
            let chosen = tokio::task::spawn_blocking(move || crate::prompt::choose("Which plan?", &choices)).await;
            Ok(plans.swap_remove(chosen.map_err(|_| CliError::Declined)??))
        }
        _ => Err(CliError::usage(format!("there are several plans; name one with --plan: {names}"))),
    }
}

/// The project's directory, when that is a name a tenant may have.
fn name_of_project(settings: &Settings) -> Option<TenantName> {
    settings.project.root().file_name()?.to_str()?.parse().ok()
}
