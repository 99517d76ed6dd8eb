//! What lies between an instance's stdout and its output file: a small process of its own.
//!
//! An instance that had the file could cut it off or stretch it. It gets a pipe, which it can only write to, and the
//! writer behind it outlives the control plane as the instance does: it ends when nobody has the pipe open any more.
//! It is in the instance's control groups, so that it goes wherever the instance goes, and is never the one that is
//! killed for want of memory. For its life it holds the lock of the output file.

use super::times::Marker;
use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
    process::setsid,
};
use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, ExitCode},
    time::Instant,
};

/// First argument of the launcher when it is to be a writer.
pub(crate) const WRITER: &str = "write-output";
/// How much a pipe holds.
const CHUNK: usize = 64 << 10;

/// Starts a writer that appends to `file`, and to `times` when that was, and returns the pipe's end to write to. The
/// launcher's last `own_arguments` are its own and not its caller's.
pub(crate) fn start_writer(file: File, times: File, own_arguments: usize) -> io::Result<OwnedFd> {
    let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
    let mut prefix: Vec<_> = std::env::args_os().collect();
    prefix.truncate(prefix.len().saturating_sub(own_arguments));
    let mut prefix = prefix.into_iter();
    // The program that runs, whatever lies under its name by now.
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = prefix.next() {
        command.arg0(name);
    }
    command.args(prefix).arg(WRITER).env_clear().stdin(from).stdout(file).stderr(times).spawn()?;
    Ok(to)
}

/// The writer's `main`: stdin is the pipe, stdout the file, stderr the file of its times.
pub(crate) fn write() -> ExitCode {
    std::panic::set_hook(Box::new(|_| {}));
    let owned = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(File::from);
    let (Ok(mut to), Ok(times)) = (owned(io::stdout().as_fd()), owned(io::stderr().as_fd())) else {
        return ExitCode::FAILURE;
    };
    let mut marker = Marker::new(times);
    // Not with the terminal of whoever runs the control plane.
    let _ = setsid();
    // Only root may; without root, no control group kills for want of memory either.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let mut from = io::stdin().lock();
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return ExitCode::SUCCESS,
            // On a full disk the rest is lost; without a reader, the application would be.
            Ok(count) => {
                let _ = marker.note(&to);
                let _ = to.write_all(&buffer[..count]);
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// Waits until all output of an instance that has ended is in its file, or until the deadline.
pub(crate) fn wait_until_written(output: &Path, deadline: Instant) -> io::Result<()> {
    let file = match File::open(output) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    loop {
        match flock(&file, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(super::instance::GLANCE);
            }
            Ok(()) | Err(Errno::WOULDBLOCK | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
