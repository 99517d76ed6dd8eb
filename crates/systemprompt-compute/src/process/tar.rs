//! Entries of a tar archive made by a stranger, in constant memory and in one reading only.
//!
//! The `tar` crate finds the headers; names and sizes that stand in records of their own (GNU `L` and `K`, PAX) are
//! put together here, bounded, and an entry whose size is stated twice and differently is refused: two readers
//! would take such an archive apart in two ways (CVE-2025-62518).

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::PathBuf,
};
use tar::{Archive, EntryType, PaxExtensions};

/// Names and PAX records longer than this are an attack on memory.
const MAX_RECORD: u64 = 1 << 20;

/// Why an archive was not read to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the layer could not be read: {0}")]
    Read(#[source] io::Error),
    #[error("the layer is no tar archive that can be read in one way only: {0}")]
    Malformed(&'static str),
}

/// Whether an error of reading a layer is the layer's fault and not that of the disk it lies on. What decompressors
/// and the bounds of a layer report has these kinds; the operating system's own errors have others.
pub(crate) fn is_archive_error(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, InvalidData, InvalidInput, Other, UnexpectedEof};
    error.raw_os_error().is_none()
        && matches!(error.kind(), FileTooLarge | InvalidData | InvalidInput | Other | UnexpectedEof)
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryKind {
    File {
        executable: bool,
    },
    Directory,
    Symlink,
    HardLink,
    /// Devices, pipes, sparse files and whatever else there may be.
    Other,
}

/// One entry; its content is read by [`Entry::copy_to`].
pub(crate) struct Entry<'a> {
    pub(crate) path: PathBuf,
    pub(crate) link: PathBuf,
    pub(crate) kind: EntryKind,
    pub(crate) size: u64,
    content: &'a mut dyn Read,
}

impl Entry<'_> {
    /// Writes the content to a file.
    ///
    /// # Errors
    /// When reading or writing fails, and when the archive ends before the content does.
    pub(crate) fn copy_to(&mut self, file: &mut File) -> io::Result<()> {
        let written = io::copy(&mut self.content, file)?;
        if written == self.size {
            Ok(())
        } else {
            Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the layer ends within a file"))
        }
    }
}

/// Calls `each` for every entry up to the end of the archive.
pub(crate) fn walk<E: From<TarError>>(
    reader: impl Read,
    mut each: impl FnMut(&mut Entry<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let mut archive = Archive::new(reader);
    let mut pending = Records::default();
    for entry in archive.entries().map_err(TarError::Read)?.raw(true) {
        let mut entry = entry.map_err(TarError::Read)?;
        let size = entry.header().entry_size().map_err(TarError::Read)?;
        let entry_type = entry.header().entry_type();
        match entry_type {
            EntryType::GNULongName => pending.path = Some(until_nul(&record(&mut entry, size)?).to_vec()),
            EntryType::GNULongLink => pending.link = Some(until_nul(&record(&mut entry, size)?).to_vec()),
            EntryType::XHeader => pending.pax(&record(&mut entry, size)?)?,
            // Holds for all entries; what it may say (times, owners, a comment) is not taken over. Some readers take
            // more from it and some less.
            EntryType::XGlobalHeader => {
                let mut all = Records::default();
                all.pax(&record(&mut entry, size)?)?;
                if all.says_something() {
                    return Err(TarError::Malformed("a global record names a path, a link or a size").into());
                }
            }
            _ => {
                let records = std::mem::take(&mut pending);
                if records.size.is_some_and(|stated| stated != size) {
                    return Err(TarError::Malformed("a size is stated twice and differently").into());
                }
                let kind = kind(entry_type, entry.header().mode().map_err(TarError::Read)?);
                if size > 0 && !matches!(kind, EntryKind::File { .. } | EntryKind::Other) {
                    return Err(TarError::Malformed("an entry without content has a size").into());
                }
                let path = path(&records.path.unwrap_or_else(|| entry.path_bytes().into_owned()));
                let link = records.link.or_else(|| entry.link_name_bytes().map(std::borrow::Cow::into_owned));
                let link = self::path(&link.unwrap_or_default());
                each(&mut Entry { path, link, kind, size, content: &mut entry })?;
            }
        }
    }
    if pending.says_something() {
        return Err(TarError::Malformed("it ends after a record that belongs to an entry").into());
    }
    Ok(())
}

/// What records before an entry say about it.
#[derive(Default)]
struct Records {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
}

impl Records {
    fn says_something(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some()
    }

    fn pax(&mut self, record: &[u8]) -> Result<(), TarError> {
        for pair in PaxExtensions::new(record) {
            let pair = pair.map_err(|_| TarError::Malformed("a PAX record is not well-formed"))?;
            match pair.key_bytes() {
                b"path" => self.path = Some(pair.value_bytes().to_vec()),
                b"linkpath" => self.link = Some(pair.value_bytes().to_vec()),
                b"size" => {
                    let size = pair.value().ok().and_then(|value| value.parse().ok());
                    self.size = Some(size.ok_or(TarError::Malformed("a PAX size is no number"))?);
                }
                key if key.starts_with(b"GNU.sparse") => return Err(TarError::Malformed("it holds a sparse file")),
                _ => {}
            }
        }
        Ok(())
    }
}

fn kind(entry_type: EntryType, mode: u32) -> EntryKind {
    match entry_type {
        EntryType::Regular | EntryType::Continuous => EntryKind::File { executable: mode & 0o111 != 0 },
        EntryType::Directory => EntryKind::Directory,
        EntryType::Symlink => EntryKind::Symlink,
        EntryType::Link => EntryKind::HardLink,
        _ => EntryKind::Other,
    }
}

fn record(content: &mut impl Read, size: u64) -> Result<Vec<u8>, TarError> {
    if size > MAX_RECORD {
        return Err(TarError::Malformed("a name or attribute is longer than 1 MiB"));
    }
    let mut bytes = Vec::new();
    content.read_to_end(&mut bytes).map_err(TarError::Read)?;
    Ok(bytes)
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_global_record_names_nothing() {
        let check = |record: &str| {
            let mut tar = tar::Builder::new(Vec::new());
            for (kind, name, content) in [(EntryType::XGlobalHeader, "pax", record), (EntryType::Regular, "a", "x")] {
                let mut header = tar::Header::new_ustar();
                header.set_path(name).expect("name");
                header.set_mode(0o644);
                header.set_entry_type(kind);
                header.set_size(content.len() as u64);
                header.set_cksum();
                tar.append(&header, content.as_bytes()).expect("entry");
            }
            let mut names = Vec::new();
            walk(&*tar.into_inner().expect("tar"), |entry| {
                names.push(entry.path.display().to_string());
                Ok::<(), TarError>(())
            })
            .map(|()| names)
        };
        assert_eq!(check("17 comment=hello\n").expect("harmless"), ["a"]);
        for record in ["10 path=b\n", "14 linkpath=b\n", "10 size=1\n"] {
            assert!(matches!(check(record), Err(TarError::Malformed(_))), "{record}");
        }
    }
}
