//! What really exists, seen from outside the control plane: rows, databases, roles, processes, folders.

use crate::Stack;
use anyhow::{Context as _, ensure};
use sqlx::{Connection as _, PgConnection};
use std::{collections::BTreeSet, fs, path::Path, time::Duration};
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
    /// Tenants of which the registry has anything.
    pub registry_tenants: BTreeSet<String>,
    /// Blobs that nothing keeps: no link of a tenant, or one that no manifest needs and no push of the last day made.
    pub orphan_blobs: BTreeSet<String>,
    /// Manifests and blobs of releases that may still start, and that are not there.
    pub missing_blobs: BTreeSet<String>,
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
        let releases: Vec<(String, String)> =
            sqlx::query_as("SELECT tenant_id::text, digest FROM deployments WHERE state IN ('pending', 'live')")
                .fetch_all(&mut control)
                .await?;
        let registry = Registry::look(&stack.data().join("registry"), &releases)?;
        Ok(Self {
            databases,
            roles,
            instances: app_processes(stack.https_port())?,
            tenants,
            open_operations,
            apps: app_folders(&stack.data()),
            registry_tenants: registry.tenants,
            orphan_blobs: registry.orphans,
            missing_blobs: registry.missing,
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
        let purged: Vec<_> = self.registry_tenants.iter().filter(|id| !ids.contains(id)).collect();
        ensure!(purged.is_empty(), "images of tenants that are gone: {purged:?}");
        ensure!(self.orphan_blobs.is_empty(), "blobs that nothing keeps: {:?}", self.orphan_blobs);
        ensure!(self.missing_blobs.is_empty(), "parts of releases that are gone: {:?}", self.missing_blobs);
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

/// The registry's folder, read without the registry.
#[derive(Default)]
struct Registry {
    tenants: BTreeSet<String>,
    orphans: BTreeSet<String>,
    missing: BTreeSet<String>,
}

impl Registry {
    fn look(root: &Path, releases: &[(String, String)]) -> anyhow::Result<Self> {
        let mut found = Self::default();
        let mut kept = BTreeSet::new();
        for tenant in names_in(&root.join("tenants")) {
            let folder = root.join("tenants").join(&tenant);
            let mut needed = BTreeSet::new();
            for manifest in names_in(&folder.join("manifests")) {
                needed.extend(blobs_of(&folder.join("manifests").join(manifest))?);
            }
            for link in names_in(&folder.join("links")) {
                let used = fs::metadata(folder.join("links").join(&link)).and_then(|link| link.modified());
                let young = used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age < Duration::from_hours(24)));
                if young || needed.contains(&link) {
                    kept.insert(link);
                }
            }
            found.tenants.insert(tenant);
        }
        let blobs = names_in(&root.join("blobs"));
        found.orphans = blobs.difference(&kept).cloned().collect();
        for (tenant, digest) in releases {
            let folder = root.join("tenants").join(tenant);
            let manifest = folder.join("manifests").join(digest.trim_start_matches("sha256:"));
            if !manifest.exists() {
                found.missing.insert(digest.clone());
                continue;
            }
            let links = names_in(&folder.join("links"));
            let needed = blobs_of(&manifest)?;
            found.missing.extend(needed.into_iter().filter(|blob| !links.contains(blob) || !blobs.contains(blob)));
        }
        Ok(found)
    }
}

/// The hex digests of a manifest's blobs.
fn blobs_of(manifest: &Path) -> anyhow::Result<Vec<String>> {
    let text = fs::read(manifest).with_context(|| format!("reading {}", manifest.display()))?;
    let manifest = systemprompt_oci::Manifest::parse(&text)?;
    Ok(manifest.blobs().map(|blob| blob.digest.hex()).collect())
}

fn names_in(folder: &Path) -> BTreeSet<String> {
    let Ok(entries) = fs::read_dir(folder) else { return BTreeSet::new() };
    entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn app_folders(data: &Path) -> BTreeSet<String> {
    names_in(&data.join("compute/apps"))
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
            registry_tenants: BTreeSet::from([tenant.to_string()]),
            orphan_blobs: BTreeSet::new(),
            missing_blobs: BTreeSet::new(),
        }
    }

    #[test]
    fn one_thing_too_much_or_too_little_is_seen() {
        let tenant = TenantId::new();
        assert!(world(tenant).check(&[tenant], &[tenant]).is_ok());
        let spoiled: [fn(&mut World); 10] = [
            |world| world.instances.push(world.instances[0].clone()),
            |world| world.instances.clear(),
            |world| world.databases.extend(["sp_0123456789ab".to_owned()]),
            |world| drop(world.roles.pop_first()),
            |world| world.apps.extend(["sp-0123456789ab".to_owned()]),
            |world| world.open_operations.push("deploy_tenant stuck".to_owned()),
            |world| world.registry_tenants.extend([TenantId::new().to_string()]),
            |world| world.orphan_blobs.extend(["00".to_owned()]),
            |world| world.missing_blobs.extend(["00".to_owned()]),
            |world| world.tenants.push((TenantId::new().to_string(), "running".to_owned())),
        ];
        for spoil in spoiled {
            let mut world = world(tenant);
            spoil(&mut world);
            assert!(world.check(&[tenant], &[tenant]).is_err(), "{world:?}");
        }
    }

    #[test]
    fn the_registrys_folder_is_held_against_the_releases() {
        let root = tempfile::tempdir().unwrap();
        let tenant = TenantId::new().to_string();
        let folder = root.path().join("tenants").join(&tenant);
        for folder in [&root.path().join("blobs"), &folder.join("links"), &folder.join("manifests")] {
            fs::create_dir_all(folder).unwrap();
        }
        let blob = |text: &str| systemprompt_oci::Digest::of(text.as_bytes());
        let describe =
            |kind, text: &str| serde_json::json!({ "mediaType": kind, "digest": blob(text), "size": text.len() });
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "config": describe(systemprompt_oci::media_type::OCI_CONFIG, "config"),
            "layers": [describe(systemprompt_oci::media_type::OCI_LAYER, "layer")],
        });
        let digest = systemprompt_oci::Digest::of(manifest.to_string().as_bytes());
        let look = |releases: &[(String, String)]| Registry::look(root.path(), releases).unwrap();
        let release = [(tenant, digest.to_string())];
        assert_eq!(look(&release).missing, BTreeSet::from([digest.to_string()]));
        fs::write(folder.join("manifests").join(digest.hex()), manifest.to_string()).unwrap();
        for text in ["config", "layer", "left over"] {
            fs::write(root.path().join("blobs").join(blob(text).hex()), text).unwrap();
        }
        fs::write(folder.join("links").join(blob("config").hex()), "").unwrap();
        let found = look(&release);
        assert_eq!(found.missing, BTreeSet::from([blob("layer").hex()]), "without a link it is not the tenant's");
        assert_eq!(found.orphans, BTreeSet::from(["layer", "left over"].map(|text| blob(text).hex())));
        for text in ["layer", "left over"] {
            fs::write(folder.join("links").join(blob(text).hex()), "").unwrap();
        }
        assert!(look(&release).missing.is_empty() && look(&release).orphans.is_empty());
        let old = std::time::SystemTime::now() - Duration::from_hours(25);
        for link in fs::read_dir(folder.join("links")).unwrap().flatten() {
            fs::File::options().append(true).open(link.path()).unwrap().set_modified(old).unwrap();
        }
        assert_eq!(look(&release).orphans, BTreeSet::from([blob("left over").hex()]), "its push is long over");
    }
}
