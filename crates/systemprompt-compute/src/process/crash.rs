//! Places where a test makes the process die, as `kill -9` would at the worst moment.

/// In the order in which a launch passes them. Those of the launcher end the launcher, which is a process of its own,
/// and not the driver.
#[cfg(any(feature = "testing", debug_assertions))]
pub(crate) const OF_A_LAUNCH: [&str; 14] = [
    "compute.launch.locked",
    "compute.launch.recorded",
    "compute.launch.firewall",
    "compute.launch.namespace",
    "compute.launch.network",
    "compute.launch.unpacking",
    "compute.launch.image",
    "compute.launch.cgroup",
    "compute.launch.spawned",
    "compute.launch.ordered",
    "compute.launcher.locked",
    "compute.launcher.header",
    "compute.launcher.cgroup",
    "compute.launcher.limited",
];

/// The others.
#[cfg(debug_assertions)]
const ELSEWHERE: [&str; 5] = [
    "compute.app.directory",
    "compute.app.storage",
    "compute.stop.told",
    "compute.stop.killed",
    "compute.destroy.discarded",
];

/// Aborts when `SYSTEMPROMPT_CRASH_POINT` names this point. Exists in debug builds only.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    debug_assert!(OF_A_LAUNCH.contains(&name) || ELSEWHERE.contains(&name), "{name} is in no list");
    if std::env::var("SYSTEMPROMPT_CRASH_POINT").is_ok_and(|wanted| wanted == name) {
        std::process::abort();
    }
}

/// Nothing, in release builds.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &str) {}
