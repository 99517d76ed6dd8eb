use crate::{
    commands::confirmed,
    context::cloud_tenant,
    error::CliError,
    output::{ArtifactType, Printer},
    settings::Settings,
};
use chrono::Utc;
use serde::Serialize;
use systemprompt_cloud::{StoredTenant, TenantStore, TenantStoreError, TenantType};
use systemprompt_contract::{OperationId, ReleaseView, TenantSummary};

/// How final a deletion is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeleteMode {
    /// The data stays for 48 hours.
    Restorable,
    /// The data goes now.
    Purge,
}

#[derive(Serialize)]
struct Row {
    id: String,
    name: String,
    tenant_type: TenantType,
    has_database: bool,
    status: Option<String>,
    region: Option<String>,
    hostname: Option<String>,
    selected: bool,
}

#[derive(Serialize)]
struct List {
    tenants: Vec<Row>,
    total: usize,
}

pub(crate) async fn list(settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let seen = settings.session(printer)?.client.tenants().await?;
    let profile = settings.profile()?;
    let sync = |store: &mut TenantStore| {
        store.sync(seen.iter().map(StoredTenant::from), Utc::now());
        store.clone()
    };
    let store = match TenantStore::update(&settings.tenants_path(profile.as_ref())?, sync) {
        // What was fetched is shown all the same.
        Err(error @ TenantStoreError::File(_)) => {
            printer.warn(&format!("the list is not kept: {error}"));
            sync(&mut settings.tenants(profile.as_ref())?)
        }
        updated => updated?,
    };
    let tenants: Vec<_> = store.tenants.iter().map(|tenant| row(tenant, &store, &seen)).collect();
    let list = List { total: tenants.len(), tenants };
    printer.value(ArtifactType::Table, &list, |text| {
        if list.tenants.is_empty() {
            return text.line("No tenants yet");
        }
        let cell = |value: &Option<String>| value.clone().unwrap_or_default();
        let rows = list.tenants.iter().map(|row| {
            let mark = if row.selected { "*" } else { "" };
            [
                mark.to_owned(),
                row.id.clone(),
                row.name.clone(),
                cell(&row.status),
                cell(&row.region),
                cell(&row.hostname),
            ]
        });
        text.table(["", "ID", "NAME", "STATUS", "REGION", "HOST"], &rows.collect::<Vec<_>>());
    })?;
    if list.total == 0 {
        printer.next("systemprompt cloud tenant create");
    }
    Ok(())
}

fn row(tenant: &StoredTenant, store: &TenantStore, seen: &[TenantSummary]) -> Row {
    let summary = seen.iter().find(|summary| summary.id.to_string() == tenant.id);
    Row {
        id: tenant.id.clone(),
        name: tenant.name.clone(),
        tenant_type: tenant.tenant_type,
        // Every tenant of the cloud has one from phase 1 on; its URL need not be known here.
        has_database: tenant.is_cloud() || tenant.has_database_url(),
        status: summary.map(|summary| summary.status.clone()),
        region: tenant.region.clone(),
        hostname: tenant.hostname.clone(),
        selected: store.selected.as_deref() == Some(&tenant.id),
    }
}

#[derive(Serialize)]
struct Shown {
    id: String,
    name: String,
    tenant_type: TenantType,
    app_id: Option<String>,
    hostname: Option<String>,
    region: Option<String>,
    has_database: bool,
    status: Option<String>,
    app_url: Option<String>,
    release: Option<ReleaseView>,
}

pub(crate) async fn show(id: Option<&str>, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let profile = settings.profile()?;
    let id = settings.tenant_in_force(id, profile.as_ref())?;
    let known = settings.tenants(profile.as_ref())?.find_tenant(&id).filter(|tenant| tenant.is_local()).cloned();
    let shown = match known {
        Some(local) => Shown::local(local),
        None => Shown::cloud(&id, settings, printer).await?,
    };
    printer.value(ArtifactType::PresentationCard, &shown, |text| {
        text.pair("id", Some(&shown.id));
        text.pair("name", Some(&shown.name));
        text.pair("status", shown.status.as_ref());
        text.pair("url", shown.app_url.as_ref());
        text.pair("region", shown.region.as_ref());
        text.pair("app", shown.app_id.as_ref());
        text.pair("digest", shown.release.as_ref().map(|release| &release.digest));
        text.pair("live since", shown.release.as_ref().map(|release| release.live_since.format("%F %T UTC")));
    })
}

impl Shown {
    fn local(tenant: StoredTenant) -> Self {
        Self {
            has_database: tenant.has_database_url(),
            id: tenant.id,
            name: tenant.name,
            tenant_type: tenant.tenant_type,
            app_id: tenant.app_id,
            hostname: tenant.hostname,
            region: tenant.region,
            status: None,
            app_url: None,
            release: None,
        }
    }

    async fn cloud(id: &str, settings: &Settings, printer: &Printer) -> Result<Self, CliError> {
        let view = settings.session(printer)?.client.tenant(cloud_tenant(id)?).await?;
        Ok(Self {
            id: view.summary.id.to_string(),
            name: view.summary.name,
            tenant_type: TenantType::Cloud,
            app_id: view.summary.fly_app_name,
            hostname: view.summary.hostname.or(view.summary.fly_hostname),
            region: Some(view.summary.region.to_string()),
            has_database: true,
            status: Some(view.summary.status),
            app_url: Some(view.app_url),
            release: view.release,
        })
    }
}

#[derive(Serialize)]
struct Selected {
    selected: String,
}

pub(crate) async fn select(id: &str, settings: &Settings, printer: &Printer) -> Result<(), CliError> {
    let profile = settings.profile()?;
    let path = settings.tenants_path(profile.as_ref())?;
    if settings.tenants(profile.as_ref())?.find_tenant(id).is_none() {
        // It may have been bought elsewhere since the list was fetched.
        let seen = settings.session(printer)?.client.tenants().await?;
        TenantStore::update(&path, |store| store.sync(seen.iter().map(StoredTenant::from), Utc::now()))?;
    }
    let known = TenantStore::update(&path, |store| {
        let known = store.find_tenant(id).is_some();
        if known {
            store.selected = Some(id.to_owned());
        }
        known
    })?;
    if !known {
        return Err(CliError::new("not_found", format!("there is no tenant {id:?} in this project or account"))
            .hint("List them: systemprompt cloud tenant list"));
    }
    if let Some(other) = profile.and_then(|profile| profile.tenant_id).filter(|other| other != id) {
        printer.warn(&format!("the profile names {other}, which beats the selection"));
    }
    let view = Selected { selected: id.to_owned() };
    printer.value(ArtifactType::Text, &view, |text| text.line(format!("Selected {id}")))
}

#[derive(Serialize)]
struct Deleted {
    message: &'static str,
    details: DeletedDetails,
}

#[derive(Serialize)]
struct DeletedDetails {
    id: String,
    operation_id: OperationId,
}

pub(crate) async fn delete(
    id: Option<&str>,
    mode: DeleteMode,
    yes: bool,
    settings: &Settings,
    printer: &Printer,
) -> Result<(), CliError> {
    let profile = settings.profile()?;
    let id = cloud_tenant(&settings.tenant_in_force(id, profile.as_ref())?)?;
    let client = settings.session(printer)?.client;
    let tenant = client.tenant(id).await?;
    let question = match mode {
        DeleteMode::Restorable => {
            format!("Delete {:?} ({id})? It stops now; its data goes after 48 hours.", tenant.summary.name)
        }
        DeleteMode::Purge => format!("Delete {:?} ({id}) and ALL ITS DATA now, for good?", tenant.summary.name),
    };
    confirmed(&question, yes, settings)?;
    let operation_id = client.delete_tenant(id, mode == DeleteMode::Purge).await?;
    TenantStore::update(&settings.tenants_path(profile.as_ref())?, |store| store.remove(&id.to_string()))?;
    let message = match mode {
        DeleteMode::Restorable => "Deleted; its data goes after 48 hours",
        DeleteMode::Purge => "Deleted; its data is being removed",
    };
    let view = Deleted { message, details: DeletedDetails { id: id.to_string(), operation_id } };
    printer.value(ArtifactType::Text, &view, |text| text.line(format!("{}: {message}", tenant.summary.name)))
}
