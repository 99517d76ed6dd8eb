use crate::{
    Digest, Digester, StoredLayer, media_type,
    walk::{self, Forbidden, WalkError},
};
use flate2::bufread::MultiGzDecoder;
use std::{
    fs::File,
    io::{self, BufReader, Read},
};

/// Most bytes one layer may unpack to.
pub(crate) const MAX_UNPACKED: u64 = 8 << 30;
/// A layer may unpack to this many times its compressed size; real ones stay below 20.
const MAX_RATIO: u64 = 100;
/// What any layer may unpack to, whatever its compressed size: small files compress very well.
const RATIO_FLOOR: u64 = 64 << 20;
/// Window a zstd layer may ask for: 32 MiB, four times what encoders use by default.
const ZSTD_WINDOW_LOG: u32 = 25;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// By media type; `None` when it is no layer of ours.
    pub(crate) fn of(layer_type: &str) -> Option<Self> {
        match layer_type {
            media_type::OCI_LAYER | media_type::DOCKER_LAYER => Some(Self::None),
            media_type::OCI_LAYER_GZIP | media_type::DOCKER_LAYER_GZIP => Some(Self::Gzip),
            media_type::OCI_LAYER_ZSTD | media_type::DOCKER_LAYER_ZSTD => Some(Self::Zstd),
            _ => None,
        }
    }
}

/// The uncompressed tar of a layer.
///
/// Reading fails with [`io::ErrorKind::FileTooLarge`] once more comes out than a layer of its compressed size may
/// hold (100 times, at least 64 MiB, at most 8 GiB), so that a small blob cannot fill a disk.
pub struct LayerReader {
    inner: Box<dyn Read + Send>,
    left: u64,
    limit: u64,
}

/// Opens a layer for reading, decompressing it by its media type (plain, gzip or zstd).
///
/// # Errors
/// When the blob cannot be opened or its media type is not a layer's.
pub fn open_layer(layer: &StoredLayer) -> io::Result<LayerReader> {
    let compression = Compression::of(&layer.descriptor.media_type).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("expected a tar layer, got a blob of type {:?}", layer.descriptor.media_type),
        )
    })?;
    let file = BufReader::with_capacity(1 << 17, File::open(&layer.path)?);
    let inner: Box<dyn Read + Send> = match compression {
        Compression::None => Box::new(file),
        Compression::Gzip => Box::new(MultiGzDecoder::new(file)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(file)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            Box::new(decoder)
        }
    };
    let limit = unpacked_limit(layer.descriptor.size);
    Ok(LayerReader { inner, left: limit, limit })
}

fn unpacked_limit(compressed: u64) -> u64 {
    compressed.saturating_mul(MAX_RATIO).clamp(RATIO_FLOOR, MAX_UNPACKED)
}

impl Read for LayerReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let Some(left) = self.left.checked_sub(count as u64) else {
            self.left = 0;
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("expected at most {} bytes in a layer of this compressed size, got more", self.limit),
            ));
        };
        self.left = left;
        Ok(count)
    }
}

/// What reading a whole layer showed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerFacts {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Its size in bytes.
    pub unpacked_size: u64,
    /// How many entries it holds.
    pub entries: u64,
}

/// A layer that must not be stored or run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LayerError {
    #[error("the layer could not be read: {0}")]
    Read(#[source] io::Error),
    #[error("the layer holds {0:?}; files of this name carry credentials and must never be in an image")]
    CredentialsFile(String),
    #[error("the layer is no tar archive that can be read in one way only: {0}")]
    Malformed(String),
}

/// Reads a whole layer in one pass, in constant memory: its diff id, that it is well-formed, and that it holds no
/// file named like a credentials file (in any of the ways tar has to say a name).
///
/// # Errors
/// [`LayerError`]; also for entries whose size is stated twice and differently, which two readers would take apart
/// in two ways (CVE-2025-62518).
pub fn inspect_layer(layer: &StoredLayer) -> Result<LayerFacts, LayerError> {
    let mut reader =
        Hashing { inner: open_layer(layer).map_err(LayerError::Read)?, digester: Digester::new(), size: 0 };
    let entries = walk::walk(&mut reader)?;
    // What follows the end marker belongs to the diff id as well.
    io::copy(&mut reader, &mut io::sink()).map_err(LayerError::Read)?;
    Ok(LayerFacts { diff_id: reader.digester.finish(), unpacked_size: reader.size, entries })
}

impl From<WalkError> for LayerError {
    fn from(error: WalkError) -> Self {
        match error {
            WalkError::Read(error) => Self::Read(error),
            WalkError::Forbidden(Forbidden(path)) => Self::CredentialsFile(path),
            WalkError::Malformed(what) => Self::Malformed(what),
        }
    }
}

struct Hashing<R> {
    inner: R,
    digester: Digester,
    size: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.digester.update(&buffer[..count]);
        self.size += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Descriptor;
    use std::{io::Write, path::Path};

    fn stored(dir: &Path, layer_type: &str, blob: &[u8]) -> StoredLayer {
        let path = dir.join("blob");
        std::fs::write(&path, blob).expect("write");
        let digest = Digest::of(blob);
        StoredLayer { descriptor: Descriptor::new(layer_type, digest, blob.len() as u64), diff_id: digest, path }
    }

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).expect("memory");
        encoder.finish().expect("memory")
    }

    fn tar_of(names: &[&str]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for name in names {
            let mut header = tar::Header::new_gnu();
            header.set_size(3);
            header.set_mode(0o644);
            builder.append_data(&mut header, name, &b"abc"[..]).expect("memory");
        }
        builder.into_inner().expect("memory")
    }

    #[test]
    fn every_compression_gives_the_same_tar() {
        let dir = tempfile::tempdir().expect("dir");
        let tar = tar_of(&["a", &"long/".repeat(40)]);
        let mut two_members = gzip(&tar[..700]);
        two_members.extend(gzip(&tar[700..]));
        for (layer_type, blob) in [
            (media_type::OCI_LAYER, tar.clone()),
            (media_type::OCI_LAYER_GZIP, gzip(&tar)),
            (media_type::DOCKER_LAYER_GZIP, two_members),
            (media_type::OCI_LAYER_ZSTD, zstd::encode_all(&tar[..], 3).expect("memory")),
        ] {
            let facts = inspect_layer(&stored(dir.path(), layer_type, &blob)).expect(layer_type);
            let expected = LayerFacts { diff_id: Digest::of(&tar), unpacked_size: tar.len() as u64, entries: 2 };
            assert_eq!(facts, expected, "{layer_type}");
        }
    }

    #[test]
    fn a_bomb_stops_at_the_limit() {
        let dir = tempfile::tempdir().expect("dir");
        let zeros = vec![0; 80 << 20];
        let mut reader =
            open_layer(&stored(dir.path(), media_type::OCI_LAYER_ZSTD, &zstd::encode_all(&zeros[..], 1).expect("ok")))
                .expect("open");
        let mut read = 0;
        let mut buffer = vec![0; 1 << 20];
        let error = loop {
            match reader.read(&mut buffer) {
                Ok(0) => panic!("the end was reached"),
                Ok(count) => read += count as u64,
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        assert!(read <= RATIO_FLOOR, "{read}");
    }

    #[test]
    fn credentials_are_found_by_name() {
        let dir = tempfile::tempdir().expect("dir");
        let long = format!("{}Secrets.JSON", "d/".repeat(90));
        for name in ["secrets.json", "app/x/credentials.json", "tenants.json", &long] {
            let layer = stored(dir.path(), media_type::OCI_LAYER, &tar_of(&["a", name]));
            assert!(matches!(inspect_layer(&layer), Err(LayerError::CredentialsFile(_))), "{name}");
        }
        let layer = stored(dir.path(), media_type::OCI_LAYER, &tar_of(&["secrets.json.md", "my-secrets.json"]));
        assert_eq!(inspect_layer(&layer).expect("harmless names").entries, 2);
    }

    #[test]
    fn a_cut_layer_is_an_error() {
        let dir = tempfile::tempdir().expect("dir");
        let blob = gzip(&tar_of(&["a"]));
        let layer = stored(dir.path(), media_type::OCI_LAYER_GZIP, &blob[..blob.len() / 2]);
        assert!(matches!(inspect_layer(&layer), Err(LayerError::Read(_))));
    }
}
