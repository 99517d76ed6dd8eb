//! Ctrl-C and SIGTERM: remembered, passed on to the child that runs now, and told to whoever waits.
//!
//! Without this an interrupted task would die before it could put the machine back as it was.

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};
use std::{
    fmt,
    os::fd::{AsFd, OwnedFd},
    process::Child,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// The error of a task that a person stopped; the process exits with 130.
#[derive(Debug)]
pub(crate) struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

/// The process's signals. Cheap to clone; all clones are one.
#[derive(Clone, Default)]
pub(crate) struct Interrupts(Arc<State>);

#[derive(Default)]
struct State {
    interrupted: AtomicBool,
    foreground: Mutex<Vec<(u32, OwnedFd)>>,
    listeners: Mutex<Vec<Box<dyn Fn() + Send>>>,
}

impl Interrupts {
    /// Takes over SIGINT, SIGTERM and SIGHUP for the rest of the process.
    pub(crate) fn install() -> std::io::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let interrupts = Self(Arc::default());
        let state = Arc::clone(&interrupts.0);
        thread::spawn(move || signals.forever().for_each(|_| state.interrupt()));
        Ok(interrupts)
    }

    /// Fails once a signal has come, so that no further step begins.
    pub(crate) fn check(&self) -> Result<(), Interrupted> {
        if self.0.interrupted.load(Ordering::SeqCst) { Err(Interrupted) } else { Ok(()) }
    }

    /// Waits until `file` can be read or is at its end, and a process behind a handle has ended: `false` when that takes
    /// longer than `within`.
    pub(crate) fn wait_readable(&self, file: impl AsFd, within: Option<Duration>) -> Result<bool, Interrupted> {
        let begin = Instant::now();
        let step = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        // A signal that ends the poll is no answer yet.
        while poll(&mut [PollFd::new(&file, PollFlags::IN)], Some(&step)).unwrap_or(0) == 0 {
            self.check()?;
            if within.is_some_and(|within| begin.elapsed() > within) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Calls `listener` at every signal from now on.
    pub(crate) fn listen(&self, listener: impl Fn() + Send + 'static) {
        self.0.listeners.lock().unwrap_or_else(PoisonError::into_inner).push(Box::new(listener));
    }

    /// As if a signal had come.
    #[cfg(test)]
    pub(crate) fn raise(&self) {
        self.0.interrupt();
    }

    /// Passes signals on to `child` until the answer is dropped. A terminal signals the whole process group by
    /// itself; `kill` and a service manager do not.
    pub(crate) fn foreground(&self, child: &Child) -> std::io::Result<Foreground<'_>> {
        let pidfd = pidfd(child)?;
        self.0.foreground.lock().unwrap_or_else(PoisonError::into_inner).push((child.id(), pidfd));
        Ok(Foreground { state: &self.0, id: child.id() })
    }
}

impl State {
    fn interrupt(&self) {
        self.interrupted.store(true, Ordering::SeqCst);
        for (_, child) in &*self.foreground.lock().unwrap_or_else(PoisonError::into_inner) {
            // It may have ended by itself in this moment: then there is nothing left to tell it.
            let _ = pidfd_send_signal(child, Signal::TERM);
        }
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(|listener| listener());
    }
}

/// While it lives, signals are passed on to the child it was made for.
pub(crate) struct Foreground<'a> {
    state: &'a State,
    id: u32,
}

impl Drop for Foreground<'_> {
    fn drop(&mut self) {
        self.state.foreground.lock().unwrap_or_else(PoisonError::into_inner).retain(|(id, _)| *id != self.id);
    }
}

/// A handle that means this child and never a later process of the same number.
pub(crate) fn pidfd(child: &Child) -> std::io::Result<OwnedFd> {
    Ok(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::unix::process::ExitStatusExt as _, process::Command};

    #[test]
    fn an_interrupt_is_remembered_and_passed_on_to_the_child_of_the_moment() {
        let interrupts = Interrupts::default();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let foreground = interrupts.foreground(&child).unwrap();
        assert!(interrupts.check().is_ok());
        interrupts.raise();
        assert!(interrupts.check().is_err());
        assert_eq!(child.wait().unwrap().signal(), Some(SIGTERM));
        drop(foreground);
    }

    #[test]
    fn every_listener_is_told() {
        let interrupts = Interrupts::default();
        let (sender, told) = std::sync::mpsc::channel();
        for name in ["a", "b"] {
            let sender = sender.clone();
            interrupts.listen(move || sender.send(name).unwrap());
        }
        interrupts.raise();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), ["a", "b"]);
    }
}
