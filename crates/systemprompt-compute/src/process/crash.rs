//! Places where a test makes the process die, as `kill -9` would at the worst moment.

/// Aborts when `SYSTEMPROMPT_CRASH_POINT` names this point. Exists in debug builds only.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    if std::env::var("SYSTEMPROMPT_CRASH_POINT").is_ok_and(|wanted| wanted == name) {
        std::process::abort();
    }
}

/// Nothing, in release builds.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &str) {}
