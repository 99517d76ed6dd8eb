/// Dies here, as if the power went, when the environment says so; does nothing in release builds.
///
/// With `SYSTEMPROMPT_CRASH_POINT=name` the process SIGKILLs itself the first time it comes to `name`, with
/// `name@3` the third time. The engine calls it at `{workflow}.{step}.{before_intent|after_intent|after_act|
/// after_commit}` and, while unwinding, at `{workflow}.{step}.undo_{…}`; steps may add points of their own.
///
/// # Panics
/// The system does not let the process kill itself: a crash test must not go on as if nothing were.
#[cfg(debug_assertions)]
pub fn crash_point(name: &str) {
    use std::sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    };
    static TARGET: OnceLock<Option<(String, u32)>> = OnceLock::new();
    static HITS: AtomicU32 = AtomicU32::new(0);

    let target = TARGET.get_or_init(|| std::env::var("SYSTEMPROMPT_CRASH_POINT").ok().map(|text| parse(&text)));
    let Some((wanted, nth)) = target else { return };
    if wanted == name && HITS.fetch_add(1, Ordering::SeqCst) + 1 == *nth {
        tracing::warn!(crash.point = name, "dying on purpose");
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)
            .expect("a process may kill itself");
    }
}

/// Compiled away in release builds.
#[cfg(not(debug_assertions))]
pub const fn crash_point(_name: &str) {}

#[cfg(debug_assertions)]
fn parse(text: &str) -> (String, u32) {
    match text.rsplit_once('@').map(|(name, nth)| (name, nth.parse())) {
        Some((name, Ok(nth))) => (name.to_owned(), nth),
        _ => (text.to_owned(), 1),
    }
}

/// Whether the environment asks for a broken workflow, so that a test can show that its look at the world sees one:
/// with `SYSTEMPROMPT_SKIP=workflow.step` that act does nothing and counts as done, with `….undo` that undo.
#[cfg(debug_assertions)]
pub(crate) fn is_skipped(workflow: &str, step: &str, side: &str) -> bool {
    std::env::var("SYSTEMPROMPT_SKIP").is_ok_and(|skipped| skipped == format!("{workflow}.{step}{side}"))
}

/// Compiled away in release builds.
#[cfg(not(debug_assertions))]
pub(crate) const fn is_skipped(_workflow: &str, _step: &str, _side: &str) -> bool {
    false
}

#[cfg(all(test, debug_assertions))]
mod tests {
    #[test]
    fn a_point_may_name_its_hit() {
        assert_eq!(super::parse("deploy.launch.after_act"), ("deploy.launch.after_act".to_owned(), 1));
        assert_eq!(super::parse("deploy.launch.after_act@3"), ("deploy.launch.after_act".to_owned(), 3));
    }
}
