//! What an edge keeps on disk: the routes it serves, for the day the database is gone.

use crate::{
    config::Layout,
    seal::{Sealer, private_file},
};
use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use std::{
    convert::Infallible,
    fs::File,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use systemprompt_contract::{Hostname, Secret};
use systemprompt_edge::{Route, RouteTable};
use tokio::sync::watch;
use uuid::Uuid;

const SNAPSHOT_CONTEXT: &str = "edge_snapshot";
/// Between tries to write the snapshot, when the disk is full or gone.
const RETRY: Duration = Duration::from_millis(500);

/// What an edge needs to serve without anybody, beside its certificates: sealed, mode 0600.
#[derive(Serialize, Deserialize)]
pub(crate) struct Snapshot {
    pub(super) generation: u64,
    pub(super) routes: Vec<(Hostname, Route)>,
    /// Where API, registry and pages answer.
    pub(crate) platform: PathBuf,
    /// Where the route rows are; peer authentication, so no secret is in it.
    pub(crate) database_url: String,
}

impl Snapshot {
    pub(crate) fn table(&self) -> RouteTable {
        table_of(self.generation, self.routes.iter().cloned())
    }
}

pub(super) fn table_of(generation: u64, routes: impl IntoIterator<Item = (Hostname, Route)>) -> RouteTable {
    RouteTable::new().apply(generation, routes.into_iter().map(|(host, route)| (host, Some(route))))
}

/// The edge's own directory. One edge an installation, so its files have one writer.
pub(crate) struct EdgeDirectory {
    directory: PathBuf,
    seal: Arc<Sealer>,
    _lock: File,
}

impl EdgeDirectory {
    /// Takes the directory for this process and clears away what a killed one left half written.
    ///
    /// # Errors
    /// When another edge has it.
    pub(crate) fn claim(layout: &Layout, seal: Arc<Sealer>) -> anyhow::Result<Self> {
        let directory = layout.edge();
        private_file::create_directory(&directory)?;
        let path = directory.join("lock");
        let lock = File::create(&path).with_context(|| format!("opening {}", path.display()))?;
        lock.try_lock().map_err(|error| match error {
            std::fs::TryLockError::WouldBlock => anyhow::anyhow!(
                "another edge serves {}; stop it, or run `management-api serve --without-edge` beside it",
                layout.root().display()
            ),
            std::fs::TryLockError::Error(error) => {
                anyhow::Error::new(error).context(format!("locking {}", path.display()))
            }
        })?;
        private_file::remove_temporary(&directory)?;
        Ok(Self { directory, seal, _lock: lock })
    }

    /// Under which this edge stands in the database: the same after a restart, which so takes over what was noted of
    /// the process before.
    pub(super) fn edge_id(&self) -> Uuid {
        let key = self.seal.derive("edge-id");
        uuid::Builder::from_random_bytes(std::array::from_fn(|index| key[index])).into_uuid()
    }

    pub(crate) fn snapshot_file(&self) -> PathBuf {
        self.directory.join("snapshot.sealed")
    }

    /// Reads and opens the snapshot; none when there never was one.
    ///
    /// # Errors
    /// When others can read it, or it was sealed by another key.
    pub(crate) fn load(&self) -> anyhow::Result<Option<Snapshot>> {
        let path = self.snapshot_file();
        let Some(sealed) = private_file::read(&path)? else { return Ok(None) };
        let plain = self.seal.open(SNAPSHOT_CONTEXT, &sealed);
        let plain = plain.with_context(|| format!("opening {}; was keys/seal.key replaced?", path.display()))?;
        Ok(Some(serde_json::from_slice(&plain).with_context(|| format!("parsing {}", path.display()))?))
    }

    fn write(&self, snapshot: &Snapshot) -> anyhow::Result<()> {
        let plain = Secret::new(serde_json::to_string(snapshot)?);
        let sealed = self.seal.seal(SNAPSHOT_CONTEXT, plain.expose().as_bytes());
        Ok(private_file::write(&self.snapshot_file(), &sealed)?)
    }

    /// Writes every table that comes to disk, off the runtime's threads, and notes its generation in `kept`. Of those
    /// that come while one is written only the last is; one that cannot be written is tried again.
    pub(super) async fn keep(
        self: Arc<Self>,
        mut tables: watch::Receiver<Arc<RouteTable>>,
        kept: watch::Sender<u64>,
        platform: &Path,
        database_url: &str,
    ) -> Infallible {
        loop {
            if tables.changed().await.is_err() {
                // The sender lives as long as whoever polls this.
                return std::future::pending().await;
            }
            let table = tables.borrow_and_update().clone();
            let (directory, generation) = (self.clone(), table.generation());
            let (platform, database_url) = (platform.to_owned(), database_url.to_owned());
            let written = tokio::task::spawn_blocking(move || {
                let routes = table.iter().map(|(host, route)| (host.clone(), route.clone())).collect();
                directory.write(&Snapshot { generation, routes, platform, database_url })
            });
            match written.await.map_err(anyhow::Error::new).flatten() {
                Ok(()) => drop(kept.send_replace(generation)),
                Err(error) => {
                    tracing::error!(
                        error = format!("{error:#}"),
                        "the edge's snapshot could not be kept, so no route is acknowledged; trying again"
                    );
                    tables.mark_changed();
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    fn claim(data: &Path) -> anyhow::Result<EdgeDirectory> {
        let seal = Sealer::load_or_create(&Layout::new(data).seal_key())?;
        EdgeDirectory::claim(&Layout::new(data), Arc::new(seal))
    }

    #[test]
    fn one_edge_has_the_directory_and_finds_it_tidy() {
        let data = tempfile::tempdir().unwrap();
        let first = claim(data.path()).unwrap();
        let error = claim(data.path()).err().expect("taken").to_string();
        assert!(error.contains("--without-edge"), "{error}");
        let id = first.edge_id();
        drop(first);
        fs::write(data.path().join("edge/.tmpAbCdEf"), "half a fi").unwrap();
        assert_eq!(claim(data.path()).unwrap().edge_id(), id, "the same edge after a restart");
        assert!(!data.path().join("edge/.tmpAbCdEf").exists());
    }

    #[tokio::test]
    async fn a_table_counts_as_kept_only_once_it_is_on_disk() {
        let data = tempfile::tempdir().unwrap();
        let directory = Arc::new(claim(data.path()).unwrap());
        // A directory in its place: the snapshot cannot be written.
        fs::create_dir(directory.snapshot_file()).unwrap();
        let tables = watch::Sender::new(Arc::new(RouteTable::new()));
        let kept = watch::Sender::new(0);
        let mut seen = kept.subscribe();
        let keeping = directory.clone().keep(tables.subscribe(), kept, Path::new("/p"), "postgres://");
        let until_kept = async {
            tables.send_replace(Arc::new(table_of(7, [])));
            tokio::time::timeout(RETRY * 2, seen.changed()).await.expect_err("it cannot have been written");
            fs::remove_dir(directory.snapshot_file()).unwrap();
            tokio::time::timeout(Duration::from_secs(30), seen.changed()).await.unwrap().unwrap();
        };
        tokio::select! {
            () = until_kept => {}
            never = keeping => match never {},
        }
        assert_eq!(*seen.borrow(), 7);
        assert_eq!(directory.load().unwrap().unwrap().generation, 7);

        fs::set_permissions(directory.snapshot_file(), fs::Permissions::from_mode(0o644)).unwrap();
        let error = directory.load().err().expect("refused").to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }
}
