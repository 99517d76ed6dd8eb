//! Which shared libraries a program needs, read from its headers (System V ABI, chapter 5), without running it and
//! without `ldd`, which runs it.
//!
//! All libraries go into the one folder in which the C library was found: it is compiled into the loader as a search
//! path, so neither `ld.so.cache` nor run paths are needed inside the image.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// What a program needs to start.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Closure {
    /// `amd64` or `arm64`.
    pub(crate) architecture: &'static str,
    /// Path in the image (no leading slash) to the file on this machine.
    pub(crate) files: BTreeMap<String, PathBuf>,
}

/// A program whose libraries cannot be told.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum ElfError {
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("expected a 64-bit Linux executable (ELF, x86-64 or AArch64), got {path}", path = path.display())]
    NotElf { path: PathBuf },
    #[error("{path} has headers that lead nowhere: {what}", path = path.display())]
    Malformed { path: PathBuf, what: &'static str },
    #[error("{needed_by} needs the shared library {name}, which this machine does not have; install it and build again", needed_by = needed_by.display())]
    MissingLibrary { name: String, needed_by: PathBuf },
}

/// The closure of `program`'s shared libraries, with the loader.
pub(crate) fn closure(program: &Path) -> Result<Closure, ElfError> {
    let object = Object::read(program)?;
    let architecture = object.machine;
    let mut closure = Closure { architecture: architecture.name(), files: BTreeMap::new() };
    let Some(interpreter) = &object.interpreter else {
        return Ok(closure); // static: it needs nothing
    };
    closure.files.insert(in_image(interpreter), PathBuf::from(interpreter));
    let loader = Path::new(interpreter).file_name().map(|name| name.to_string_lossy().into_owned());
    let search = SearchPath::of_this_machine(architecture);
    let mut libraries: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut queue = VecDeque::from([(program.to_owned(), object)]);
    while let Some((path, object)) = queue.pop_front() {
        for name in &object.needed {
            if libraries.contains_key(name) || loader.as_ref() == Some(name) {
                continue;
            }
            let (found, library) = search.find(name, &path, &object)?;
            libraries.insert(name.clone(), found.clone());
            queue.push_back((found, library));
        }
    }
    let folder = search.folder_of_c_library(&libraries);
    for (name, found) in libraries {
        closure.files.insert(format!("{}/{name}", in_image(&folder.to_string_lossy())), found);
    }
    Ok(closure)
}

fn in_image(path: &str) -> String {
    path.trim_start_matches('/').to_owned()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Machine {
    X86_64,
    AArch64,
}

impl Machine {
    fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "amd64",
            Self::AArch64 => "arm64",
        }
    }
    fn multiarch(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64-linux-gnu",
            Self::AArch64 => "aarch64-linux-gnu",
        }
    }
}

/// Where the loader of this machine looks: `ld.so.conf`, then the folders compiled into it.
struct SearchPath {
    machine: Machine,
    configured: Vec<PathBuf>,
    built_in: Vec<PathBuf>,
}

impl SearchPath {
    fn of_this_machine(machine: Machine) -> Self {
        let multiarch = machine.multiarch();
        let built_in = [format!("/lib/{multiarch}"), format!("/usr/lib/{multiarch}")]
            .into_iter()
            .chain(["/lib64", "/usr/lib64", "/lib", "/usr/lib"].map(str::to_owned))
            .map(PathBuf::from)
            .collect();
        Self { machine, configured: configured_folders(Path::new("/etc/ld.so.conf"), 0), built_in }
    }

    fn find(&self, name: &str, needed_by: &Path, object: &Object) -> Result<(PathBuf, Object), ElfError> {
        let missing = || ElfError::MissingLibrary { name: name.to_owned(), needed_by: needed_by.to_owned() };
        if name.contains('/') {
            return Err(missing()); // a library by path would have to lie at the same path in the image
        }
        let origin = needed_by.parent().unwrap_or(Path::new("/"));
        let own = object.run_path.iter().map(|folder| {
            PathBuf::from(folder.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", &origin.to_string_lossy()))
        });
        let folders = own.chain(self.configured.iter().cloned()).chain(self.built_in.iter().cloned());
        for candidate in folders.map(|folder| folder.join(name)) {
            // A library of another architecture under the same name is passed over, as the loader does.
            if let Ok(library) = Object::read(&candidate)
                && library.machine == self.machine
            {
                return Ok((candidate, library));
            }
        }
        Err(missing())
    }

    fn folder_of_c_library(&self, libraries: &BTreeMap<String, PathBuf>) -> PathBuf {
        let built_in = |folder: &Path| self.built_in.iter().any(|known| known == folder);
        let parent = |name: &str| libraries.get(name).and_then(|path| path.parent()).filter(|folder| built_in(folder));
        // `/etc/ld.so.conf.d` may name the built-in folders too, so that they are found there first; same folders.
        parent("libc.so.6")
            .or_else(|| libraries.values().filter_map(|path| path.parent()).find(|folder| built_in(folder)))
            .map_or_else(|| self.built_in[0].clone(), Path::to_owned)
    }
}

/// The folders of `ld.so.conf` and the files it includes (ldconfig(8)); what cannot be read names none.
fn configured_folders(file: &Path, depth: u8) -> Vec<PathBuf> {
    let Ok(text) = std::fs::read_to_string(file) else { return Vec::new() };
    let mut folders = Vec::new();
    for line in text.lines().map(|line| line.split('#').next().unwrap_or_default().trim()) {
        if let Some(pattern) = line.strip_prefix("include ") {
            if depth < 4 {
                for file in included_files(Path::new(pattern.trim())) {
                    folders.extend(configured_folders(&file, depth + 1));
                }
            }
        } else if line.starts_with('/') {
            folders.push(PathBuf::from(line));
        }
    }
    folders
}

/// `DIR/*.conf`, the only form in use.
fn included_files(pattern: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (pattern.parent(), pattern.file_name().and_then(|name| name.to_str())) else {
        return Vec::new();
    };
    let Some(suffix) = name.strip_prefix('*') else { return vec![pattern.to_owned()] };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.to_string_lossy().ends_with(suffix))
        .collect();
    files.sort();
    files
}

/// What the headers of one program or library say.
#[derive(Debug)]
struct Object {
    machine: Machine,
    interpreter: Option<String>,
    needed: Vec<String>,
    run_path: Vec<String>,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const DT_NEEDED: u64 = 1;
const DT_STRTAB: u64 = 5;
const DT_RPATH: u64 = 15;
const DT_RUNPATH: u64 = 29;
const PROGRAM_HEADER: usize = 56;
const MAX_PROGRAM_HEADERS: u16 = 1024;
const MAX_DYNAMIC: u64 = 1 << 20;
const MAX_STRING: usize = 4096;

impl Object {
    fn read(path: &Path) -> Result<Self, ElfError> {
        let read = |source| ElfError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let not_elf = || ElfError::NotElf { path: path.to_owned() };
        let mut head = [0; 64];
        file.read_exact_at(&mut head, 0).map_err(|_| not_elf())?;
        let machine = match (&head[..6], u16_at(&head, 18)) {
            (b"\x7fELF\x02\x01", 62) => Machine::X86_64,
            (b"\x7fELF\x02\x01", 183) => Machine::AArch64,
            _ => return Err(not_elf()),
        };
        Reader { file, path }.object(machine, &head)
    }
}

struct Reader<'a> {
    file: File,
    path: &'a Path,
}

struct Segment {
    kind: u32,
    offset: u64,
    address: u64,
    size: u64,
}

impl Reader<'_> {
    fn object(&self, machine: Machine, head: &[u8; 64]) -> Result<Object, ElfError> {
        let segments = self.segments(head)?;
        let mut object = Object { machine, interpreter: None, needed: Vec::new(), run_path: Vec::new() };
        if let Some(segment) = segments.iter().find(|segment| segment.kind == PT_INTERP) {
            object.interpreter = Some(self.string(segment.offset)?);
        }
        let Some(dynamic) = segments.iter().find(|segment| segment.kind == PT_DYNAMIC) else {
            return Ok(object);
        };
        if dynamic.size > MAX_DYNAMIC {
            return Err(self.malformed("a dynamic section beyond 1 MiB"));
        }
        let table = self.bytes(dynamic.offset, usize::try_from(dynamic.size).expect("at most 1 MiB"))?;
        let entries: Vec<(u64, u64)> = table
            .chunks_exact(16)
            .map(|entry| (u64_at(entry, 0), u64_at(entry, 8)))
            .take_while(|&(tag, _)| tag != 0)
            .collect();
        let Some(strings) = entries.iter().find(|&&(tag, _)| tag == DT_STRTAB) else { return Ok(object) };
        let strings = self.offset_of(strings.1, &segments)?;
        for (tag, value) in entries {
            match tag {
                DT_NEEDED => object.needed.push(self.string(strings.saturating_add(value))?),
                DT_RPATH | DT_RUNPATH => {
                    let folders = self.string(strings.saturating_add(value))?;
                    object.run_path.extend(folders.split(':').filter(|part| !part.is_empty()).map(str::to_owned));
                }
                _ => {}
            }
        }
        Ok(object)
    }

    fn segments(&self, head: &[u8; 64]) -> Result<Vec<Segment>, ElfError> {
        let (offset, count) = (u64_at(head, 32), u16_at(head, 56));
        if usize::from(u16_at(head, 54)) != PROGRAM_HEADER || count > MAX_PROGRAM_HEADERS {
            return Err(self.malformed("the program header table"));
        }
        let table = self.bytes(offset, usize::from(count) * PROGRAM_HEADER)?;
        Ok(table
            .chunks_exact(PROGRAM_HEADER)
            .map(|entry| Segment {
                kind: u32_at(entry, 0),
                offset: u64_at(entry, 8),
                address: u64_at(entry, 16),
                size: u64_at(entry, 32),
            })
            .collect())
    }

    fn offset_of(&self, address: u64, segments: &[Segment]) -> Result<u64, ElfError> {
        segments
            .iter()
            .filter(|segment| segment.kind == PT_LOAD)
            .find_map(|segment| {
                let within = address.checked_sub(segment.address)?;
                (within < segment.size).then(|| segment.offset.saturating_add(within))
            })
            .ok_or_else(|| self.malformed("the string table"))
    }

    fn string(&self, offset: u64) -> Result<String, ElfError> {
        let mut buffer = vec![0; MAX_STRING];
        let count = self.file.read_at(&mut buffer, offset).map_err(|source| self.unreadable(source))?;
        let end =
            buffer[..count].iter().position(|&byte| byte == 0).ok_or_else(|| self.malformed("a string without end"))?;
        buffer.truncate(end);
        String::from_utf8(buffer).map_err(|_| self.malformed("a string that is not UTF-8"))
    }

    fn bytes(&self, offset: u64, count: usize) -> Result<Vec<u8>, ElfError> {
        let mut buffer = vec![0; count];
        self.file.read_exact_at(&mut buffer, offset).map_err(|_| self.malformed("a table beyond the end"))?;
        Ok(buffer)
    }

    fn malformed(&self, what: &'static str) -> ElfError {
        ElfError::Malformed { path: self.path.to_owned(), what }
    }

    fn unreadable(&self, source: io::Error) -> ElfError {
        ElfError::Read { path: self.path.to_owned(), source }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the caller's slice has the size of the structure")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_dynamic_program_brings_its_loader_and_c_library() {
        let program = std::env::current_exe().expect("this test");
        let closure = closure(&program).expect("this test was linked here");
        let names: Vec<&str> = closure.files.keys().filter_map(|path| path.rsplit('/').next()).collect();
        assert!(names.contains(&"libc.so.6"), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("ld-linux")), "{names:?}");
        let folders: std::collections::BTreeSet<_> = closure
            .files
            .keys()
            .filter(|path| !path.contains("ld-linux"))
            .filter_map(|path| path.rsplit_once('/'))
            .map(|(folder, _)| folder)
            .collect();
        assert_eq!(folders.len(), 1, "one folder for all: {folders:?}");
    }

    #[test]
    fn what_is_no_program_says_so() {
        let dir = tempfile::tempdir().expect("dir");
        let script = dir.path().join("script");
        for content in
            [&b"#!/bin/sh\n"[..], b"", b"\x7fELF\x01\x01 32 bits and then some, to fill up the sixty-four bytes"]
        {
            std::fs::write(&script, content).expect("write");
            assert!(matches!(closure(&script), Err(ElfError::NotElf { .. })));
        }
        assert!(matches!(closure(&dir.path().join("absent")), Err(ElfError::Read { .. })));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damaged_headers_are_answered_without_a_panic(at in 0usize..4096, value in any::<u8>()) {
            let mut program = std::fs::read("/proc/self/exe").expect("this test");
            program.truncate(1 << 16);
            program[at] = value;
            let mut file = tempfile::NamedTempFile::new().expect("file");
            io::Write::write_all(&mut file, &program).expect("write");
            let _ = closure(file.path());
        }
    }
}
