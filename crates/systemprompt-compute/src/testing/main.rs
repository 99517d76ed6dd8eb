//! Launcher, tenant's application and control plane of the tests, in one program.

use std::process::ExitCode;
use systemprompt_compute::{
    process::launcher_main,
    testing::{app_main, control_main},
};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next().as_deref().and_then(std::ffi::OsStr::to_str) {
        Some("launch-instance") => launcher_main(arguments),
        Some("app") => app_main(),
        Some("control-plane") => control_main(arguments),
        _ => ExitCode::from(64),
    }
}
