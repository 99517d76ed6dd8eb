//! Passwords: argon2id, off the async threads, two at a time.

use argon2::{
    Argon2, Params,
    password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash},
};
use std::{str::FromStr, sync::LazyLock};
use systemprompt_contract::Secret;
use tokio::sync::Semaphore;

/// A password that is long enough to be set. For signing in, any text is tried.
#[derive(Clone)]
pub(crate) struct Password(Secret);

/// A password that cannot be set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidPassword {
    #[error("expected a password of at least {MIN_CHARACTERS} characters, got {0}")]
    TooShort(usize),
    #[error("expected a password of at most {MAX_BYTES} bytes, got {0}")]
    TooLong(usize),
}

/// Hashing failed; never because of the password itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HashingError {
    #[error("argon2 refused its parameters or input: {0}")]
    Argon2(argon2::password_hash::Error),
    #[error("the hashing thread ended early")]
    Thread(#[source] tokio::task::JoinError),
}

impl FromStr for Password {
    type Err = InvalidPassword;
    fn from_str(text: &str) -> Result<Self, InvalidPassword> {
        let characters = text.chars().count();
        if characters < MIN_CHARACTERS {
            return Err(InvalidPassword::TooShort(characters));
        }
        if text.len() > MAX_BYTES {
            return Err(InvalidPassword::TooLong(text.len()));
        }
        Ok(Self(Secret::new(text)))
    }
}

/// Hashes `password` into a PHC string with a new salt.
pub(crate) async fn hash(password: Password) -> Result<String, HashingError> {
    hashing(move || {
        let hash: PasswordHash = hasher().hash_password(password.0.expose().as_bytes())?;
        Ok(hash.to_string())
    })
    .await
}

/// Whether `password` is the one behind `stored`.
///
/// Without a stored hash, that is for an account that does not exist, the same work is done and the answer is no.
pub(crate) async fn verify(password: Secret, stored: Option<String>) -> Result<bool, HashingError> {
    hashing(move || {
        if password.expose().len() > MAX_BYTES {
            return Ok(false);
        }
        let known = stored.is_some();
        let stored = stored.unwrap_or_else(|| NOBODY.clone());
        let matches = hasher().verify_password(password.expose().as_bytes(), &PasswordHash::new(&stored)?).is_ok();
        Ok(known && matches)
    })
    .await
}

async fn hashing<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, argon2::password_hash::Error> + Send + 'static,
) -> Result<T, HashingError> {
    let _turn = TURNS.acquire().await.expect("the semaphore is never closed");
    tokio::task::spawn_blocking(work).await.map_err(HashingError::Thread)?.map_err(HashingError::Argon2)
}

/// Argon2id with 19 MiB, two passes, one lane (OWASP's first choice); cheap in tests, which run unoptimised code.
fn hasher() -> Argon2<'static> {
    let params = if cfg!(test) { Params::new(64, 1, 1, None) } else { Ok(Params::default()) };
    Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params.expect("the parameters are within bounds"))
}

/// Each takes 19 MiB while it runs; the process must not be made to swap by sign-ins.
static TURNS: Semaphore = Semaphore::const_new(2);

/// The hash of a password that nobody knows, for work equal to that of a known account.
static NOBODY: LazyLock<String> = LazyLock::new(|| {
    let hash: PasswordHash = hasher()
        .hash_password(systemprompt_contract::token::random_text().as_bytes())
        .expect("the parameters are within bounds and the salt is random");
    hash.to_string()
});

const MIN_CHARACTERS: usize = 12;
const MAX_BYTES: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_right_password_of_a_known_account_passes() {
        let stored = hash("correct horse battery".parse().unwrap()).await.unwrap();
        assert!(stored.starts_with("$argon2id$v=19$"), "{stored}");
        assert!(verify(Secret::new("correct horse battery"), Some(stored.clone())).await.unwrap());
        assert!(!verify(Secret::new("correct horse batterx"), Some(stored.clone())).await.unwrap());
        assert!(!verify(Secret::new(""), Some(stored)).await.unwrap());
        assert!(!verify(Secret::new("correct horse battery"), None).await.unwrap());
    }

    #[test]
    fn twelve_characters_are_counted_as_people_count() {
        assert_eq!("äöüäöüäöüäö".parse::<Password>().err(), Some(InvalidPassword::TooShort(11)));
        assert!("äöüäöüäöüäöü".parse::<Password>().is_ok());
        assert!(matches!("x".repeat(1025).parse::<Password>(), Err(InvalidPassword::TooLong(1025))));
    }

    #[test]
    fn real_parameters_are_the_recommended_ones() {
        let params = Params::default();
        assert_eq!((params.m_cost(), params.t_cost(), params.p_cost()), (19 * 1024, 2, 1));
    }
}
