//! What really exists, seen from outside the control plane: rows, databases, roles, processes, folders.

use crate::Stack;
use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};
use std::{collections::BTreeSet, fs, path::Path};
use systemprompt_contract::TenantId;

/// One look at everything.
#[derive(Debug, PartialEq, Eq)]
pub struct World {
    /// `sp_…` databases.
    pub databases: BTreeSet<String>,
    /// `sp_…` roles.
    pub roles: BTreeSet<String>,
    /// Tenants whose app runs, one entry an app process.
    pub instances: Vec<String>,
    /// `(id, phase)` of every tenant row.
    pub tenants: Vec<(String, String)>,
    /// Operations that are not over, or parked.
    pub open_operations: Vec<String>,
    /// `sp-…` folders of the process driver.
    pub apps: BTreeSet<String>,
}

impl World {
    /// Looks.
    ///
    /// # Errors
    /// When a cluster cannot be asked.
    pub async fn look(stack: &Stack) -> anyhow::Result<Self> {
        let mut tenants_cluster = connect(stack, "tenants", "postgres").await?;
        let databases =
            names(&mut tenants_cluster, "SELECT datname::text FROM pg_database WHERE datname LIKE 'sp\\_%'").await?;
        let roles =
            names(&mut tenants_cluster, "SELECT rolname::text FROM pg_roles WHERE rolname LIKE 'sp\\_%'").await?;
        let mut control = connect(stack, "control", "systemprompt").await?;
        let tenants =
            sqlx::query_as("SELECT id::text, phase::text FROM tenants ORDER BY id").fetch_all(&mut control).await?;
        let open_operations = sqlx::query_scalar(
            "SELECT workflow || ' ' || status || ' ' || coalesce(failure::text, '') || coalesce(parked::text, '')
             FROM operations WHERE status NOT IN ('succeeded', 'failed')",
        )
        .fetch_all(&mut control)
        .await?;
        Ok(Self {
            databases,
            roles,
            instances: app_processes(stack.https_port())?,
            tenants,
            open_operations,
            apps: app_folders(&stack.data()),
        })
    }

    /// Whether everything there is belongs to exactly these tenants, of which `running` have one instance each.
    ///
    /// # Errors
    /// With what is too much or too little.
    pub fn check(&self, tenants: &[TenantId], running: &[TenantId]) -> anyhow::Result<()> {
        let databases: BTreeSet<String> = tenants.iter().map(|id| id.slug().database().to_string()).collect();
        let apps: BTreeSet<String> = tenants.iter().map(|id| id.slug().app_name().to_string()).collect();
        let mut instances: Vec<String> = running.iter().map(ToString::to_string).collect();
        instances.sort_unstable();
        ensure!(self.open_operations.is_empty(), "operations that are not over: {:?}", self.open_operations);
        ensure!(self.databases == databases, "databases: expected {databases:?}, found {:?}", self.databases);
        ensure!(self.roles == databases, "roles: expected {databases:?}, found {:?}", self.roles);
        ensure!(self.apps == apps, "apps: expected {apps:?}, found {:?}", self.apps);
        ensure!(self.instances == instances, "instances: expected {instances:?}, found {:?}", self.instances);
        let mut ids: Vec<String> = tenants.iter().map(ToString::to_string).collect();
        ids.sort_unstable();
        let found: Vec<&String> = self.tenants.iter().map(|(id, _)| id).collect();
        ensure!(found.iter().copied().eq(ids.iter()), "tenants: expected {ids:?}, found {:?}", self.tenants);
        Ok(())
    }
}

/// A connection as the superuser of one of the clusters.
///
/// # Errors
/// When the cluster does not run.
pub async fn connect(stack: &Stack, cluster: &str, database: &str) -> anyhow::Result<PgConnection> {
    let pid_file = stack.data().join("postgres").join(cluster).join("postmaster.pid");
    let text = fs::read_to_string(&pid_file).with_context(|| format!("reading {}", pid_file.display()))?;
    let socket = text.lines().nth(4).context("postmaster.pid names the socket directory")?;
    Ok(PgConnection::connect(&format!("postgres://systemprompt@localhost/{database}?host={socket}")).await?)
}

async fn names(connection: &mut PgConnection, query: &'static str) -> anyhow::Result<BTreeSet<String>> {
    Ok(sqlx::query_scalar::<_, String>(query).fetch_all(connection).await?.into_iter().collect())
}

/// The tenant of every app process of this installation, told by its environment and not by any book of ours.
/// Tests run beside each other; the port in `APP_URL` tells whose an app is.
///
/// # Errors
/// When processes cannot be listed.
pub fn app_processes(https_port: u16) -> anyhow::Result<Vec<String>> {
    let mut tenants = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let process = entry?.path();
        let Ok(environment) = fs::read(process.join("environ")) else { continue };
        let Ok(command) = fs::read_to_string(process.join("comm")) else { continue };
        let variable = |name: &str| {
            let mut variables = environment.split(|byte| *byte == 0);
            variables.find_map(|variable| String::from_utf8_lossy(variable).strip_prefix(name).map(str::to_owned))
        };
        let ours = variable("APP_URL=").is_some_and(|url| url.ends_with(&format!(":{https_port}")));
        if ours && command.trim() == "systemprompt" {
            tenants.extend(variable("TENANT_ID="));
        }
    }
    tenants.sort_unstable();
    Ok(tenants)
}

fn app_folders(data: &Path) -> BTreeSet<String> {
    let Ok(folders) = fs::read_dir(data.join("compute/apps")) else { return BTreeSet::new() };
    folders.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(tenant: TenantId) -> World {
        World {
            databases: BTreeSet::from([tenant.slug().database().to_string()]),
            roles: BTreeSet::from([tenant.slug().database().to_string()]),
            instances: vec![tenant.to_string()],
            tenants: vec![(tenant.to_string(), "running".to_owned())],
            open_operations: Vec::new(),
            apps: BTreeSet::from([tenant.slug().app_name().to_string()]),
        }
    }

    #[test]
    fn one_thing_too_much_or_too_little_is_seen() {
        let tenant = TenantId::new();
        assert!(world(tenant).check(&[tenant], &[tenant]).is_ok());
        let spoiled: [fn(&mut World); 7] = [
            |world| world.instances.push(world.instances[0].clone()),
            |world| world.instances.clear(),
            |world| world.databases.extend(["sp_0123456789ab".to_owned()]),
            |world| drop(world.roles.pop_first()),
            |world| world.apps.extend(["sp-0123456789ab".to_owned()]),
            |world| world.open_operations.push("deploy_tenant stuck".to_owned()),
            |world| world.tenants.push((TenantId::new().to_string(), "running".to_owned())),
        ];
        for spoil in spoiled {
            let mut world = world(tenant);
            spoil(&mut world);
            assert!(world.check(&[tenant], &[tenant]).is_err(), "{world:?}");
        }
    }
}
