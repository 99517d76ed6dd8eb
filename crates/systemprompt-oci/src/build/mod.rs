//! Builds the image of a tenant from the files of a project: no daemon, no base image, no root.
//!
//! [`ImageBuilder::plan`] decides what goes in and reads nothing; [`ImageBuilder::check`] looks for secrets in it;
//! [`ImageBuilder::build`] reads, scans, packs and
//! compresses what the [`LayerCache`] does not have. The same files give the same digests on every machine with the
//! same libraries: entries are sorted, owners are root, times are fixed, modes are 0644 or 0755, and the compressor is
//! pinned.
//!
//! Layers, from least to most often changing:
//!
//! | layer | what |
//! |---|---|
//! | `base` | loader and shared libraries of the program, CA certificates, `passwd`, `group`, `hosts`, … |
//! | `binary` | `/app/bin/systemprompt` |
//! | `services` | `/app/services`, `/app/services/profiles/NAME/profile.yaml`, `/app/extensions/mcp` |
//! | `web-large-NN`, `web-NN` | `/app/web/dist`, spread by the hash of the path |

mod archive;
mod base;
mod cache;
mod collect;
mod dockerignore;
mod elf;
mod plan;
mod scan;

pub use cache::LayerCache;
pub use elf::ElfError;
pub use plan::{LeftOut, LeftOutReason, Plan, PlannedEntry, PlannedLayer, Source};
pub use scan::{SecretFinding, SecretKind};

use crate::{Descriptor, Digest, ImageConfig, Manifest, StoredLayer, media_type};
use archive::FileDigests;
use bytes::Bytes;
use collect::Project;
use plan::LayerDraft;
use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    path::PathBuf,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// What to build an image from.
#[derive(Debug, Clone)]
pub struct BuildSpec {
    /// The project: holds `web/dist` (or `core/web/dist`), `services` and usually the profiles.
    pub project_root: PathBuf,
    /// The `systemprompt` program that will run in the image; a Linux executable of the target's architecture.
    pub binary: PathBuf,
    /// Name of the profile the image runs with.
    pub profile: String,
    /// Folder of all profiles, relative to the project.
    pub profiles_dir: PathBuf,
    /// CA certificates as one PEM file; none: the machine's own bundle.
    pub ca_bundle: Option<PathBuf>,
    /// Files or folders, relative to the project, whose secrets are meant to be in the image.
    pub allow_secret: Vec<PathBuf>,
    /// Free text put into the image's configuration.
    pub labels: BTreeMap<String, String>,
}

impl BuildSpec {
    /// The usual layout: profiles in `.systemprompt/profiles`, the machine's CA bundle, no secret allowed.
    pub fn new(project_root: impl Into<PathBuf>, binary: impl Into<PathBuf>, profile: impl Into<String>) -> Self {
        Self {
            project_root: project_root.into(),
            binary: binary.into(),
            profile: profile.into(),
            profiles_dir: PathBuf::from(".systemprompt/profiles"),
            ca_bundle: None,
            allow_secret: Vec::new(),
            labels: BTreeMap::new(),
        }
    }
}

/// Why no image was built. Nothing is left behind but finished layers in the cache.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum BuildError {
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("expected a file at {path}, found something else", path = path.display())]
    NotAFile { path: PathBuf },
    #[error("{path}: folders are nested too deeply; is it a loop of mounts?", path = path.display())]
    TooDeep { path: PathBuf },
    #[error("expected the folder {folder} in the project {project}; {hint}", project = project.display())]
    MissingFolder { folder: &'static str, project: PathBuf, hint: &'static str },
    #[error("expected the folder {folder} to lie in the project, it leads to {target} ({why}); put its files there",
        target = target.display())]
    RefusedFolder { folder: String, target: PathBuf, why: LeftOutReason },
    #[error("expected the profile {name:?} as {expected}{why}", expected = expected.display())]
    MissingProfile { name: String, expected: PathBuf, why: String },
    #[error("expected a profile name of letters, digits, `-`, `_` and `.`, got {0:?}")]
    ProfileName(String),
    #[error("no CA certificates found on this machine; install `ca-certificates`, or name a PEM file")]
    NoCaBundle,
    #[error(transparent)]
    Program(#[from] ElfError),
    #[error("{path} changed while the image was built; build again", path = path.display())]
    Changed { path: PathBuf },
    #[error("secrets must not be in an image: {}; remove them, or allow a file by name", listed(.0))]
    Secrets(Vec<SecretFinding>),
    #[error("expected at most {max} layers, the plan has {0}", max = Manifest::MAX_LAYERS)]
    TooManyLayers(usize),
    #[error("the layer cache {path} cannot be used: {why}", path = path.display())]
    CacheFolder { path: PathBuf, why: String },
    #[error("{what}: {source}")]
    Cache { what: &'static str, source: io::Error },
}

fn listed(findings: &[SecretFinding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let separator = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{separator}{finding}");
    }
    text
}

/// A finished image: its manifest and configuration in memory, its layers in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    /// Digest of the manifest.
    pub digest: Digest,
    /// The manifest, exactly as it must be pushed.
    pub manifest: Bytes,
    /// The configuration, exactly as it must be pushed.
    pub config: Bytes,
    /// Points at the configuration.
    pub config_descriptor: Descriptor,
    /// Lowest first.
    pub layers: Vec<StoredLayer>,
}

/// How far a build has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BuildEvent {
    /// All files are read and free of secrets.
    Scanned {
        /// How many.
        files: usize,
    },
    /// A layer is complete.
    Layer {
        /// Its name in the plan.
        name: String,
        /// Compressed size in bytes.
        size: u64,
        /// It was in the cache.
        cached: bool,
    },
}

/// Builds one image.
#[derive(Debug, Clone)]
pub struct ImageBuilder {
    spec: BuildSpec,
}

impl ImageBuilder {
    /// A builder of what `spec` says.
    pub fn new(spec: BuildSpec) -> Self {
        Self { spec }
    }

    /// Decides what goes into the image. Reads the headers of the program and its libraries and the names and sizes of
    /// the project's files, and changes nothing.
    ///
    /// # Errors
    /// [`BuildError`] when something needed is missing or cannot be read.
    pub fn plan(&self) -> Result<Plan, BuildError> {
        let spec = &self.spec;
        check_profile_name(&spec.profile)?;
        let mut project = Project::open(spec)?;
        let (base, architecture) = base::layer(&spec.binary, spec.ca_bundle.as_deref())?;
        let mut binary = LayerDraft::default();
        binary.add(project.program(&spec.binary, "app/bin/systemprompt")?);
        let (services, profile_path) = self.services(&mut project)?;
        let web = self.web(&mut project)?;
        let mut layers = vec![base, binary.finish("binary"), services.finish("services")];
        layers.extend(collect::web_layers(web).map(|(name, draft)| draft.finish(name)));
        if layers.len() > Manifest::MAX_LAYERS {
            return Err(BuildError::TooManyLayers(layers.len()));
        }
        let mut left_out = project.left_out;
        left_out.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(Plan { layers, left_out, config: self.config(architecture, &profile_path) })
    }

    /// Reads, scans, packs and compresses what the plan says, taking from the cache what did not change.
    ///
    /// Runs on all cores and blocks; call it from a blocking thread. `progress` is called from several threads.
    ///
    /// # Errors
    /// [`BuildError::Secrets`] listing every file that holds one; [`BuildError::Changed`] when a file changed since the
    /// plan; others when reading or writing fails.
    pub fn build(
        &self,
        plan: &Plan,
        cache: &LayerCache,
        progress: &(dyn Fn(BuildEvent) + Sync),
    ) -> Result<BuiltImage, BuildError> {
        let files = digest_files(plan, cache)?;
        progress(BuildEvent::Scanned { files: files.len() });
        let layers = in_parallel(&plan.layers, |layer| {
            let (stored, cached) = cache.layer(layer, &files)?;
            progress(BuildEvent::Layer { name: layer.name.clone(), size: stored.descriptor.size, cached });
            Ok(stored)
        });
        cache.save();
        Ok(assemble(plan, layers?))
    }

    /// Reads and scans what the plan says, as [`Self::build`] does first, and packs nothing. Blocks.
    ///
    /// # Errors
    /// As [`Self::build`].
    pub fn check(&self, plan: &Plan, cache: &LayerCache) -> Result<(), BuildError> {
        digest_files(plan, cache)?;
        cache.save();
        Ok(())
    }

    fn services(&self, project: &mut Project<'_>) -> Result<(LayerDraft, String), BuildError> {
        let spec = &self.spec;
        let mut draft = LayerDraft::default();
        if !project.has_folder("services") {
            return Err(self.missing_folder("services", "is this the project's root?"));
        }
        for found in project.files("services", "app/services")? {
            draft.add(found.entry);
        }
        if project.has_folder("extensions/mcp") {
            for found in project.files("extensions/mcp", "app/extensions/mcp")? {
                draft.add(found.entry);
            }
        }
        let profile = self.profiles(project, &mut draft)?.ok_or_else(|| {
            let expected = spec.profiles_dir.join(&spec.profile).join("profile.yaml");
            let left_out = project.left_out.iter().find(|left| left.path == expected);
            let why = left_out.map_or_else(String::new, |left| format!("; it was left out: {}", left.why));
            BuildError::MissingProfile { name: spec.profile.clone(), expected, why }
        })?;
        Ok((draft, profile))
    }

    /// Adds `profile.yaml` of every profile; gives the image path of the one in force.
    fn profiles(&self, project: &mut Project<'_>, draft: &mut LayerDraft) -> Result<Option<String>, BuildError> {
        let folder = self.spec.profiles_dir.to_string_lossy().into_owned();
        if !project.has_folder(&folder) {
            return Ok(None);
        }
        let mut in_force: Option<String> = None;
        for found in project.files(&folder, "app/services/profiles")? {
            let Some((name, "profile.yaml" | "profile.yml")) = found.below.split_once('/') else {
                let path = self.spec.profiles_dir.join(&found.below);
                project.left_out.push(LeftOut { path, why: LeftOutReason::NotOfProfile });
                continue;
            };
            // `.yaml` comes first in the order of paths and wins.
            if name == self.spec.profile && in_force.is_none() {
                in_force = Some(format!("/{}", found.entry.path));
            }
            draft.add(found.entry);
        }
        Ok(in_force)
    }

    fn web(&self, project: &mut Project<'_>) -> Result<Vec<collect::Found>, BuildError> {
        let folder = ["web/dist", "core/web/dist"]
            .into_iter()
            .find(|folder| project.has_folder(folder))
            .ok_or_else(|| self.missing_folder("web/dist", "build the front end first"))?;
        project.files(folder, "app/web/dist")
    }

    fn missing_folder(&self, folder: &'static str, hint: &'static str) -> BuildError {
        BuildError::MissingFolder { folder, project: self.spec.project_root.clone(), hint }
    }

    fn config(&self, architecture: &str, profile_path: &str) -> ImageConfig {
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
        let mut env = owned(&[
            "PATH=/app/bin:/usr/local/bin:/usr/bin:/bin",
            "HOST=0.0.0.0",
            "PORT=8080",
            "RUST_LOG=info",
            "SYSTEMPROMPT_SERVICES_PATH=/app/services",
            "WEB_DIR=/app/web",
        ]);
        env.push(format!("SYSTEMPROMPT_PROFILE={profile_path}"));
        ImageConfig {
            entrypoint: owned(&["/app/bin/systemprompt", "infra", "services", "serve", "--foreground"]),
            cmd: Vec::new(),
            env,
            working_dir: "/app".to_owned(),
            user: base::USER.to_owned(),
            architecture: architecture.to_owned(),
            os: "linux".to_owned(),
            diff_ids: Vec::new(),
            labels: self.spec.labels.clone(),
        }
    }
}

/// A profile's name becomes part of paths in the image.
fn check_profile_name(name: &str) -> Result<(), BuildError> {
    let is_valid = !name.is_empty()
        && name.len() <= 100
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    if is_valid { Ok(()) } else { Err(BuildError::ProfileName(name.chars().take(100).collect())) }
}

fn digest_files(plan: &Plan, cache: &LayerCache) -> Result<FileDigests, BuildError> {
    let files: Vec<_> = plan
        .layers
        .iter()
        .flat_map(|layer| &layer.entries)
        .filter_map(|entry| Some((entry.source.file()?, entry)))
        .collect();
    let facts = in_parallel(&files, |(path, entry)| cache.file(path, entry.size, entry.source.is_scanned()))?;
    let mut digests = FileDigests::with_capacity(files.len());
    let mut findings = Vec::new();
    for ((path, entry), facts) in files.into_iter().zip(facts) {
        digests.insert(path.to_owned(), facts.digest);
        if let Source::Project { shown, .. } = &entry.source {
            let found = facts.secrets.into_iter();
            findings.extend(found.map(|(line, kind)| SecretFinding { path: shown.clone(), line, kind }));
        }
    }
    if findings.is_empty() { Ok(digests) } else { Err(BuildError::Secrets(findings)) }
}

fn assemble(plan: &Plan, layers: Vec<StoredLayer>) -> BuiltImage {
    let config = ImageConfig { diff_ids: layers.iter().map(|layer| layer.diff_id).collect(), ..plan.config.clone() };
    let config = Bytes::from(config.to_bytes());
    let config_descriptor = Descriptor::new(media_type::OCI_CONFIG, Digest::of(&config), config.len() as u64);
    let manifest = Manifest {
        media_type: media_type::OCI_MANIFEST.to_owned(),
        config: config_descriptor.clone(),
        layers: layers.iter().map(|layer| layer.descriptor.clone()).collect(),
    };
    let manifest = Bytes::from(manifest.to_bytes());
    BuiltImage { digest: Digest::of(&manifest), manifest, config, config_descriptor, layers }
}

/// Runs `work` on every item, on as many threads as there are cores, and keeps the order. After an error no further
/// item is begun; the error of the first item that failed is returned.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, BuildError> + Sync,
) -> Result<Vec<R>, BuildError> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(items.len());
    let next = AtomicUsize::new(0);
    let results: Mutex<BTreeMap<usize, Result<R, BuildError>>> = Mutex::new(BTreeMap::new());
    let worker = || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(index) else { break };
            let result = work(item);
            if result.is_err() {
                next.store(items.len(), Ordering::Relaxed);
            }
            results.lock().unwrap_or_else(PoisonError::into_inner).insert(index, result);
        }
    };
    thread::scope(|scope| {
        (1..threads).for_each(|_| drop(scope.spawn(worker)));
        worker();
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}
