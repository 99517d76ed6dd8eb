//! Sealing of secrets at rest, under one master key that lives in a file and never in the database.
//!
//! What is sealed is bound to its place: the context (`tenant_secret/{tenant}/{name}`) goes into the
//! authenticated data, so that a sealed value cut from one row and pasted into another does not open.

pub(crate) mod private_file;

use chacha20poly1305::{
    KeyInit as _, XChaCha20Poly1305, XNonce,
    aead::{Aead as _, Payload},
};
use hmac::{Hmac, Mac as _};
use private_file::PrivateFileError;
use sha2::Sha256;
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// The master key cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MasterKeyError {
    #[error("the master key")]
    File(#[from] PrivateFileError),
    #[error("there is no master key at {0}: put the file back; nothing sealed can be opened without it")]
    Missing(PathBuf),
    #[error(
        "{path} must hold exactly {KEY_LEN} bytes, it holds {length}: put the right file back; nothing sealed can be opened without it"
    )]
    Length { path: PathBuf, length: usize },
}

/// A sealed value that does not open.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SealError {
    #[error("{context}: sealed with format {version}, this program knows format {FORMAT}: use the newer program")]
    Format { context: String, version: u8 },
    #[error(
        "{context}: does not open: it was changed, belongs to another place, or was sealed with another master key"
    )]
    Refused { context: String },
}

/// Seals and opens values, and derives keys, from the master key.
pub(crate) struct Sealer {
    master: Zeroizing<[u8; KEY_LEN]>,
    cipher: XChaCha20Poly1305,
}

impl Sealer {
    /// Reads the master key at `path`, or makes a new one there (32 random bytes, mode 0600, in one step).
    ///
    /// # Errors
    /// When others can read the file, or it is not a key: it is never replaced, since whatever was sealed with the
    /// right one would be lost.
    pub(crate) fn load_or_create(path: &Path) -> Result<Self, MasterKeyError> {
        if private_file::read(path)?.is_none() {
            // Another process may create it in between: then its key is the key.
            private_file::create(path, random_key().as_slice())?;
        }
        Self::load(path)
    }

    /// Reads the master key at `path`, for processes that have no business making one.
    ///
    /// # Errors
    /// When it is not there, can be read by others, or is not a key.
    pub(crate) fn load(path: &Path) -> Result<Self, MasterKeyError> {
        let stored = private_file::read(path)?.ok_or_else(|| MasterKeyError::Missing(path.to_owned()))?;
        let key = stored
            .as_slice()
            .try_into()
            .map_err(|_| MasterKeyError::Length { path: path.to_owned(), length: stored.len() })?;
        Ok(Self::from_key(Zeroizing::new(key)))
    }

    /// A sealer of a key that is nowhere stored.
    #[cfg(test)]
    pub(crate) fn ephemeral() -> Self {
        Self::from_key(random_key())
    }

    fn from_key(master: Zeroizing<[u8; KEY_LEN]>) -> Self {
        let sealing = Zeroizing::new(derive(&master, "seal/xchacha20-poly1305"));
        Self { cipher: XChaCha20Poly1305::new((&*sealing).into()), master }
    }

    /// Seals `plaintext` for the place that `context` names. Two calls never give the same bytes.
    pub(crate) fn seal(&self, context: &str, plaintext: &[u8]) -> Vec<u8> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).expect("the operating system's random source answers");
        let message = Payload { msg: plaintext, aad: &associated_data(context) };
        let sealed = self
            .cipher
            .encrypt(&XNonce::from(nonce), message)
            .expect("a secret is shorter than the 256 GiB that the cipher can take");
        [&[FORMAT], nonce.as_slice(), &sealed].concat()
    }

    /// Opens what [`Sealer::seal`] made for the same `context`.
    ///
    /// # Errors
    /// When a byte or the context differs, or another master key sealed it.
    pub(crate) fn open(&self, context: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SealError> {
        let refused = || SealError::Refused { context: context.to_owned() };
        let (&version, rest) = sealed.split_first().ok_or_else(refused)?;
        if version != FORMAT {
            return Err(SealError::Format { context: context.to_owned(), version });
        }
        let (nonce, ciphertext) = rest.split_first_chunk::<NONCE_LEN>().ok_or_else(refused)?;
        let message = Payload { msg: ciphertext, aad: &associated_data(context) };
        self.cipher.decrypt(&XNonce::from(*nonce), message).map(Zeroizing::new).map_err(|_| refused())
    }

    /// A key for another purpose, e.g. signing registry tokens; the same for the same label as long as the master
    /// key stays, and telling nothing about it.
    pub(crate) fn derive(&self, label: &str) -> [u8; KEY_LEN] {
        derive(&self.master, &format!("derive/{label}"))
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(«redacted»)")
    }
}

/// HMAC-SHA256 as a key derivation function of one block (NIST SP 800-108): the master key is uniformly random.
fn derive(master: &[u8; KEY_LEN], label: &str) -> [u8; KEY_LEN] {
    let mut mac = Hmac::<Sha256>::new_from_slice(master).expect("HMAC takes a key of any length");
    mac.update(label.as_bytes());
    mac.finalize().into_bytes().into()
}

fn associated_data(context: &str) -> Vec<u8> {
    [&[FORMAT], context.as_bytes()].concat()
}

fn random_key() -> Zeroizing<[u8; KEY_LEN]> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    getrandom::fill(key.as_mut_slice()).expect("the operating system's random source answers");
    key
}

const KEY_LEN: usize = 32;
/// 192 bits: random nonces cannot meet within any number of secrets we could store.
const NONCE_LEN: usize = 24;
/// First byte of everything sealed; another cipher or layout gets another one.
const FORMAT: u8 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::PermissionsExt as _};

    #[test]
    fn opens_only_where_it_was_sealed_for() {
        let sealer = Sealer::ephemeral();
        let sealed = sealer.seal("tenant_secret/a/JWT_SECRET", b"value");
        assert_eq!(sealer.open("tenant_secret/a/JWT_SECRET", &sealed).unwrap().as_slice(), b"value");
        for other in ["tenant_secret/b/JWT_SECRET", "tenant_secret/a/SYNC_TOKEN", ""] {
            assert_eq!(
                sealer.open(other, &sealed).unwrap_err(),
                SealError::Refused { context: other.to_owned() },
                "cut and pasted"
            );
        }
    }

    #[test]
    fn any_changed_or_missing_byte_is_refused() {
        let sealer = Sealer::ephemeral();
        let sealed = sealer.seal("here", b"value");
        for position in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[position] ^= 1;
            assert!(sealer.open("here", &changed).is_err(), "byte {position}");
            assert!(sealer.open("here", &sealed[..position]).is_err(), "cut at {position}");
        }
        assert!(matches!(
            sealer.open("here", &[&[9], &sealed[1..]].concat()),
            Err(SealError::Format { version: 9, .. })
        ));
    }

    #[test]
    fn two_seals_differ_and_another_key_opens_nothing() {
        let sealer = Sealer::ephemeral();
        let (one, two) = (sealer.seal("here", b"value"), sealer.seal("here", b"value"));
        assert_ne!(one, two);
        assert!(Sealer::ephemeral().open("here", &one).is_err());
    }

    #[test]
    fn the_key_file_is_made_once_private_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("master.key");
        let first = Sealer::load_or_create(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let sealed = first.seal("here", b"value");
        let again = Sealer::load_or_create(&path).unwrap();
        assert_eq!(again.open("here", &sealed).unwrap().as_slice(), b"value");
        assert_eq!(first.derive("registry"), again.derive("registry"));
        assert_ne!(first.derive("registry"), first.derive("inbox"));

        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(
            Sealer::load_or_create(&path),
            Err(MasterKeyError::File(PrivateFileError::Exposed { mode: 0o644, .. }))
        ));
    }

    #[test]
    fn a_cut_key_file_is_refused_and_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("master.key");
        private_file::write(&path, &[7; 31]).unwrap();
        assert!(matches!(Sealer::load_or_create(&path), Err(MasterKeyError::Length { length: 31, .. })));
        assert_eq!(fs::read(&path).unwrap(), [7; 31]);
    }

    #[test]
    fn prints_nothing_of_the_key() {
        assert_eq!(format!("{:?}", Sealer::ephemeral()), "Sealer(«redacted»)");
    }
}
