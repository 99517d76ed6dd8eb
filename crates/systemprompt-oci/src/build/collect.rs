//! Walks the project and decides what goes in; reads no file but `.dockerignore`.

use super::{
    BuildError, BuildSpec,
    dockerignore::DockerIgnore,
    plan::{LayerDraft, LeftOut, LeftOutReason, PlannedEntry, Source},
};
use crate::{Digest, is_never_in_an_image};
use std::{
    fs::{self, DirEntry},
    io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// Deeper folders are a loop of mounts or an accident.
const MAX_DEPTH: usize = 64;
/// Credentials, tenants and other state of the project; of it only the profiles go in.
const STATE_DIR: &str = ".systemprompt";

/// The project while it is walked.
pub(crate) struct Project<'a> {
    root: PathBuf,
    spec: &'a BuildSpec,
    ignore: DockerIgnore,
    pub(crate) left_out: Vec<LeftOut>,
}

/// A file that goes in.
pub(crate) struct Found {
    /// Relative to the folder that was asked for.
    pub(crate) below: String,
    pub(crate) entry: PlannedEntry,
}

impl<'a> Project<'a> {
    pub(crate) fn open(spec: &'a BuildSpec) -> Result<Self, BuildError> {
        let root = fs::canonicalize(&spec.project_root)
            .map_err(|source| BuildError::Read { path: spec.project_root.clone(), source })?;
        let ignore_file = root.join(".dockerignore");
        let ignore = match fs::read_to_string(&ignore_file) {
            Ok(text) => DockerIgnore::parse(&text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => DockerIgnore::default(),
            Err(source) => return Err(BuildError::Read { path: ignore_file, source }),
        };
        Ok(Self { root, spec, ignore, left_out: Vec::new() })
    }

    pub(crate) fn has_folder(&self, folder: &str) -> bool {
        self.root.join(folder).is_dir()
    }

    /// All files below `folder` (relative to the project), to lie below `image_folder`. In the order of their paths.
    pub(crate) fn files(&mut self, folder: &str, image_folder: &str) -> Result<Vec<Found>, BuildError> {
        let mut found = Vec::new();
        let mut folders = vec![(self.real_folder(folder)?, PathBuf::from(folder), String::new(), 0)];
        while let Some((path, relative, below, depth)) = folders.pop() {
            for child in sorted_children(&path)? {
                let shown = relative.join(child.file_name());
                match self.judge(&child, &shown)? {
                    Judged::LeftOut(why) => self.left_out.push(LeftOut { path: shown, why }),
                    Judged::Folder(name) if depth < MAX_DEPTH => {
                        folders.push((child.path(), shown, join(&below, &name), depth + 1));
                    }
                    Judged::Folder(_) => return Err(BuildError::TooDeep { path: shown }),
                    Judged::File { name, path, size, mode } => {
                        let below = join(&below, &name);
                        let image_path = join(image_folder, &below);
                        let source = self.source(path, shown);
                        found.push(Found { below, entry: PlannedEntry { path: image_path, mode, size, source } });
                    }
                }
            }
        }
        found.sort_by(|a, b| a.below.cmp(&b.below));
        Ok(found)
    }

    /// Where the folder really lies, which a link on the way may decide: below the project, and not where nothing may
    /// be taken from.
    fn real_folder(&self, folder: &str) -> Result<PathBuf, BuildError> {
        let named = self.root.join(folder);
        let target = fs::canonicalize(&named).map_err(|source| BuildError::Read { path: named, source })?;
        let why = match target.strip_prefix(&self.root) {
            Ok(inside) if !inside.as_os_str().is_empty() => {
                refused_part(inside, Path::new(folder) == self.spec.profiles_dir)
            }
            _ => Some(LeftOutReason::LinkOutside),
        };
        match why {
            Some(why) => Err(BuildError::RefusedFolder { folder: folder.to_owned(), target, why }),
            None => Ok(target),
        }
    }

    /// A single file that must be there, from inside or outside of the project.
    pub(crate) fn program(&self, path: &Path, image_path: &str) -> Result<PlannedEntry, BuildError> {
        let (path, size) = regular_file(path)?;
        let shown = path.strip_prefix(&self.root).unwrap_or(&path).to_owned();
        let source = self.source(path, shown);
        Ok(PlannedEntry { path: image_path.to_owned(), mode: 0o755, size, source })
    }

    fn source(&self, path: PathBuf, shown: PathBuf) -> Source {
        let allowed = self.spec.allow_secret.iter().any(|allowed| {
            let allowed = allowed.strip_prefix(&self.spec.project_root).unwrap_or(allowed);
            shown.starts_with(allowed.strip_prefix(".").unwrap_or(allowed))
        });
        Source::Project { path, shown, scan: !allowed }
    }

    fn judge(&self, child: &DirEntry, shown: &Path) -> Result<Judged, BuildError> {
        let read = |source| BuildError::Read { path: child.path(), source };
        let kind = child.file_type().map_err(read)?;
        let Some(name) = child.file_name().to_str().map(str::to_owned) else {
            return Ok(Judged::LeftOut(LeftOutReason::NameNotUtf8));
        };
        if let Some(why) = refused_name(&name) {
            return Ok(Judged::LeftOut(why));
        }
        if let Some(line) = self.excluded_by(shown, &child.path())
            && !(kind.is_dir() && self.ignore.has_exceptions())
        {
            return Ok(Judged::LeftOut(LeftOutReason::Ignored { line }));
        }
        if kind.is_dir() {
            return Ok(Judged::Folder(name));
        }
        if kind.is_symlink() {
            return Ok(self.judge_link(child, shown, name));
        }
        if !kind.is_file() {
            return Ok(Judged::LeftOut(LeftOutReason::SpecialFile));
        }
        let metadata = child.metadata().map_err(read)?;
        Ok(Judged::File { name, path: child.path(), size: metadata.len(), mode: mode_of(&metadata) })
    }

    /// The line of `.dockerignore` that leaves a file out by the name it is known by or by where it really lies.
    fn excluded_by(&self, shown: &Path, real: &Path) -> Option<usize> {
        let inside = real.strip_prefix(&self.root).ok().filter(|inside| *inside != shown);
        [Some(shown), inside].into_iter().flatten().find_map(|path| self.ignore.excluded_by(path.to_str()?))
    }

    /// A link to a file inside the project becomes that file, unless the file itself must stay out.
    fn judge_link(&self, child: &DirEntry, shown: &Path, name: String) -> Judged {
        let target = fs::canonicalize(child.path()).and_then(|path| Ok((fs::metadata(&path)?, path)));
        let Ok((metadata, path)) = target else { return Judged::LeftOut(LeftOutReason::LinkOutside) };
        let Ok(inside) = path.strip_prefix(&self.root) else { return Judged::LeftOut(LeftOutReason::LinkOutside) };
        // Profiles may share one file; anything else of the state stays out, whatever a link calls it.
        let is_profile = inside.ends_with("profile.yaml") || inside.ends_with("profile.yml");
        if let Some(why) = refused_part(inside, is_profile && shown.starts_with(&self.spec.profiles_dir)) {
            return Judged::LeftOut(why);
        }
        if let Some(line) = self.excluded_by(shown, &path) {
            return Judged::LeftOut(LeftOutReason::Ignored { line });
        }
        if metadata.is_dir() {
            return Judged::LeftOut(LeftOutReason::LinkToDirectory);
        }
        if !metadata.is_file() {
            return Judged::LeftOut(LeftOutReason::SpecialFile);
        }
        Judged::File { name, size: metadata.len(), mode: mode_of(&metadata), path }
    }
}

enum Judged {
    LeftOut(LeftOutReason),
    Folder(String),
    File { name: String, path: PathBuf, size: u64, mode: u32 },
}

/// Why a path inside the project must stay out because of a name in it; profiles lie in the state and may go in.
fn refused_part(inside: &Path, of_profiles: bool) -> Option<LeftOutReason> {
    let checked = inside.strip_prefix(STATE_DIR).ok().filter(|_| of_profiles).unwrap_or(inside);
    checked.iter().find_map(|part| part.to_str().and_then(refused_name))
}

fn refused_name(name: &str) -> Option<LeftOutReason> {
    let lower = name.to_ascii_lowercase();
    if is_never_in_an_image(name.as_bytes()) {
        Some(LeftOutReason::Credentials)
    } else if lower == ".env" || lower == ".envrc" || lower.starts_with(".env.") {
        Some(LeftOutReason::EnvironmentFile)
    } else if lower == ".git" {
        Some(LeftOutReason::GitData)
    } else if lower == STATE_DIR {
        Some(LeftOutReason::State)
    } else if name.starts_with(".wh.") {
        Some(LeftOutReason::WhiteoutName)
    } else {
        None
    }
}

/// The canonical path and size of a regular file, links followed.
pub(crate) fn regular_file(path: &Path) -> Result<(PathBuf, u64), BuildError> {
    let read = |source| BuildError::Read { path: path.to_owned(), source };
    let canonical = fs::canonicalize(path).map_err(read)?;
    let metadata = fs::metadata(&canonical).map_err(read)?;
    if !metadata.is_file() {
        return Err(BuildError::NotAFile { path: path.to_owned() });
    }
    Ok((canonical, metadata.len()))
}

fn mode_of(metadata: &fs::Metadata) -> u32 {
    if metadata.permissions().mode() & 0o111 == 0 { 0o644 } else { 0o755 }
}

fn sorted_children(folder: &Path) -> Result<Vec<DirEntry>, BuildError> {
    let read = |source| BuildError::Read { path: folder.to_owned(), source };
    let mut children = fs::read_dir(folder).map_err(read)?.collect::<Result<Vec<_>, _>>().map_err(read)?;
    children.sort_by_key(DirEntry::file_name);
    Ok(children)
}

fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// Files of at least this size change rarely (images, fonts, videos) and lie apart from the small ones.
const LARGE: u64 = 512 << 10;
/// How many layers the web files of either size are spread over.
const BUCKETS: usize = 16;

/// Spreads web files over layers so that a change of one file rewrites one small layer: by the hash of the path, which
/// stays the same whatever other files come and go.
pub(crate) fn web_layers(files: Vec<Found>) -> impl Iterator<Item = (String, LayerDraft)> {
    let mut buckets: Vec<LayerDraft> = (0..2 * BUCKETS).map(|_| LayerDraft::default()).collect();
    for found in files {
        let within = usize::from(Digest::of(found.below.as_bytes()).as_bytes()[0]) % BUCKETS;
        // Large ones first: they change least.
        let bucket = if found.entry.size >= LARGE { within } else { BUCKETS + within };
        buckets[bucket].add(found.entry);
    }
    let named = buckets.into_iter().enumerate().map(|(index, draft)| {
        let kind = if index < BUCKETS { "web-large" } else { "web" };
        (format!("{kind}-{:02}", index % BUCKETS), draft)
    });
    named.filter(|(_, draft)| !draft.is_empty())
}
