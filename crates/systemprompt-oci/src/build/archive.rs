//! Writes one layer: a tar whose bytes depend on names, modes and contents only, compressed by one fixed compressor.

use super::{
    BuildError,
    plan::{PlannedEntry, PlannedLayer, Source},
};
use crate::{Digest, Digester};
use flate2::{Compression, GzBuilder, write::GzEncoder};
use std::{
    collections::HashMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

/// Raised whenever the bytes of a layer would come out differently for the same entries (other header fields, another
/// compressor or level), so that cached layers of the older form are not mixed in.
pub(crate) const FORMAT_VERSION: u32 = 1;

/// Time stamp of every entry, 1980-01-01: the earliest one that every archive format can hold.
const MTIME: u64 = 315_532_800;
/// Measured on a 22 MB program: level 1 takes a third of the time of level 6 and comes out a tenth larger.
const LEVEL: u32 = 1;
const COPY_BUFFER: usize = 1 << 17;

/// Content digests of the files behind entries, by path on this machine.
pub(crate) type FileDigests = HashMap<PathBuf, Digest>;

/// A layer as it was written.
#[derive(Debug)]
pub(crate) struct WrittenLayer {
    pub(crate) digest: Digest,
    pub(crate) diff_id: Digest,
    pub(crate) size: u64,
}

/// Names the bytes that [`write_layer`] would write, without writing them.
pub(crate) fn layer_key(layer: &PlannedLayer, files: &FileDigests) -> Digest {
    let mut digester = Digester::new();
    let mut field = |bytes: &[u8]| {
        digester.update(&(bytes.len() as u64).to_le_bytes());
        digester.update(bytes);
    };
    field(&FORMAT_VERSION.to_le_bytes());
    for entry in &layer.entries {
        field(entry.path.as_bytes());
        field(&entry.mode.to_le_bytes());
        field(&entry.size.to_le_bytes());
        match &entry.source {
            Source::Directory => field(b"directory"),
            Source::Generated { content } => field(Digest::of(content).as_bytes()),
            Source::System(path) | Source::Project { path, .. } => {
                field(files.get(path).expect("every file of the plan was digested before").as_bytes());
            }
        }
    }
    digester.finish()
}

/// Writes the layer's compressed tar to `out`.
///
/// Every file's content is digested again while it is written and compared with `files`, under whose digests the layer
/// will be known: a file that changed in between is an error, never a layer under a wrong name.
pub(crate) fn write_layer(
    layer: &PlannedLayer,
    files: &FileDigests,
    out: impl Write,
) -> Result<WrittenLayer, BuildError> {
    let write = |source| BuildError::Cache { what: "writing a layer", source };
    let gzip = GzBuilder::new().mtime(0).operating_system(255).write(Tee::new(out), Compression::new(LEVEL));
    let mut tar = tar::Builder::new(Tee::new(gzip));
    for entry in &layer.entries {
        append(&mut tar, entry, files)?;
    }
    let (gzip, diff_id, _): (GzEncoder<_>, _, _) = tar.into_inner().map_err(write)?.finish();
    let (mut out, digest, size) = gzip.finish().map_err(write)?.finish();
    out.flush().map_err(write)?;
    Ok(WrittenLayer { digest, diff_id, size })
}

fn append<W: Write>(tar: &mut tar::Builder<W>, entry: &PlannedEntry, files: &FileDigests) -> Result<(), BuildError> {
    let write = |source| BuildError::Cache { what: "writing a layer", source };
    let mut header = tar::Header::new_gnu();
    header.set_mode(entry.mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(MTIME);
    header.set_size(entry.size);
    match &entry.source {
        Source::Directory => {
            header.set_entry_type(tar::EntryType::Directory);
            tar.append_data(&mut header, format!("{}/", entry.path), io::empty()).map_err(write)
        }
        Source::Generated { content } => {
            header.set_entry_type(tar::EntryType::Regular);
            tar.append_data(&mut header, &entry.path, &content[..]).map_err(write)
        }
        Source::System(path) | Source::Project { path, .. } => {
            header.set_entry_type(tar::EntryType::Regular);
            let mut content = FileContent::open(path, entry.size)?;
            // `append_data` copies what the reader gives, so the reader gives exactly the header's size or fails.
            match tar.append_data(&mut header, &entry.path, &mut content) {
                Err(_) if content.changed => Err(BuildError::Changed { path: path.clone() }),
                Err(source) => Err(write(source)),
                Ok(()) if files.get(path) == Some(&content.digester.finish()) => Ok(()),
                Ok(()) => Err(BuildError::Changed { path: path.clone() }),
            }
        }
    }
}

/// Exactly `left` bytes of a file, digested; anything else is an error.
struct FileContent {
    file: File,
    left: u64,
    digester: Digester,
    changed: bool,
}

impl FileContent {
    fn open(path: &Path, size: u64) -> Result<Self, BuildError> {
        let file = File::open(path).map_err(|source| BuildError::Read { path: path.to_owned(), source })?;
        Ok(Self { file, left: size, digester: Digester::new(), changed: false })
    }
}

impl Read for FileContent {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let want = buffer.len().min(COPY_BUFFER).min(usize::try_from(self.left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let count = self.file.read(&mut buffer[..want])?;
        if count == 0 {
            self.changed = true;
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.digester.update(&buffer[..count]);
        self.left -= count as u64;
        Ok(count)
    }
}

/// Passes bytes on while it digests and counts them.
struct Tee<W> {
    inner: W,
    digester: Digester,
    size: u64,
}

impl<W> Tee<W> {
    fn new(inner: W) -> Self {
        Self { inner, digester: Digester::new(), size: 0 }
    }
    fn finish(self) -> (W, Digest, u64) {
        (self.inner, self.digester.finish(), self.size)
    }
}

impl<W: Write> Write for Tee<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.digester.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::plan::{LayerDraft, directory, generated};
    use proptest::prelude::*;

    fn draft(files: &[(String, Vec<u8>)]) -> PlannedLayer {
        let mut draft = LayerDraft::default();
        draft.add(directory("tmp", 0o1777));
        for (path, content) in files {
            let mut entry = generated(path, "");
            entry.size = content.len() as u64;
            entry.source = Source::Generated { content: content.clone() };
            draft.add(entry);
        }
        draft.finish("test")
    }

    fn written(layer: &PlannedLayer) -> (Vec<u8>, Digest) {
        let mut blob = Vec::new();
        let written = write_layer(layer, &FileDigests::new(), &mut blob).expect("memory");
        assert_eq!((written.digest, written.size), (Digest::of(&blob), blob.len() as u64));
        (blob, written.diff_id)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_order_of_files_does_not_matter_and_all_come_out(
            mut files in proptest::collection::vec(("[a-z]{1,60}(/[a-z]{1,60}){1,4}", any::<Vec<u8>>()), 1..8)
        ) {
            files.sort_by(|a, b| a.0.cmp(&b.0));
            files.dedup_by(|a, b| a.0.starts_with(&b.0));
            let (blob, diff_id) = written(&draft(&files));
            files.reverse();
            prop_assert_eq!(&written(&draft(&files)), &(blob.clone(), diff_id));
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(&blob[..]).read_to_end(&mut tar).expect("own gzip");
            prop_assert_eq!(Digest::of(&tar), diff_id);
            let mut archive = tar::Archive::new(&tar[..]);
            let mut found = Vec::new();
            for entry in archive.entries().expect("own tar") {
                let mut entry = entry.expect("own tar");
                prop_assert_eq!(entry.header().mtime().expect("mtime"), MTIME);
                prop_assert_eq!((entry.header().uid().expect("uid"), entry.header().gid().expect("gid")), (0, 0));
                if entry.header().entry_type().is_file() {
                    let mut content = Vec::new();
                    entry.read_to_end(&mut content).expect("own tar");
                    found.push((entry.path().expect("path").to_string_lossy().into_owned(), content));
                }
            }
            files.sort();
            found.sort();
            prop_assert_eq!(found, files);
        }

        #[test]
        fn the_key_differs_when_the_bytes_do(name in "[a-z]{1,9}", content in any::<Vec<u8>>(), other in any::<Vec<u8>>()) {
            let one = draft(&[(name.clone(), content)]);
            let two = draft(&[(name, other)]);
            let none = FileDigests::new();
            prop_assert_eq!(layer_key(&one, &none) == layer_key(&two, &none), written(&one) == written(&two));
        }
    }

    #[test]
    fn a_file_that_changed_since_it_was_digested_is_an_error() {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("f");
        std::fs::write(&path, "four").expect("write");
        let entry = |size| PlannedEntry { path: "f".into(), mode: 0o644, size, source: Source::System(path.clone()) };
        let layer = |size| PlannedLayer { name: "x".into(), entries: vec![entry(size)] };
        let known = FileDigests::from([(path.clone(), Digest::of(b"four"))]);
        write_layer(&layer(4), &known, io::sink()).expect("unchanged");
        for content in ["fou", "fouR"] {
            std::fs::write(&path, content).expect("write");
            let error = write_layer(&layer(4), &known, io::sink()).expect_err("changed");
            assert!(matches!(error, BuildError::Changed { .. }), "{error}");
        }
    }
}
