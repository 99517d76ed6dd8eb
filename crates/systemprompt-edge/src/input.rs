//! Reading a socket no more often than it has something.
//!
//! hyper asks for input several times a request, and each question would go down through gate, TLS and the
//! runtime to learn that nothing came. [`Input`] knows it: the socket had nothing, and has not stirred since.

use futures_util::task::AtomicWaker;
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
};
use tokio::io::{AsyncRead, ReadBuf};

/// What is known about the input of one socket. Its [`Reader`] keeps it up to date.
#[derive(Debug, Default)]
pub(crate) struct Input {
    quiet: AtomicBool,
    task: AtomicWaker,
}

impl Input {
    /// Whether reading would get nowhere. Then the task is woken as soon as it may.
    pub(crate) fn is_quiet(&self, cx: &Context<'_>) -> bool {
        if !self.quiet.load(SeqCst) {
            return false;
        }
        self.task.register(cx.waker());
        // It may have stirred in between, and woken nobody.
        self.quiet.load(SeqCst)
    }

    /// There may be more to read above the socket: what TLS has deciphered and nobody took.
    pub(crate) fn stir(&self) {
        self.quiet.store(false, SeqCst);
    }
}

impl Wake for Input {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.stir();
        self.task.wake();
    }
}

/// Reads one socket, and lets it wake only its [`Input`].
pub(crate) struct Reader {
    input: Arc<Input>,
    waker: Waker,
}

impl Reader {
    pub(crate) fn new(input: Arc<Input>) -> Self {
        Self { waker: Waker::from(Arc::clone(&input)), input }
    }

    pub(crate) fn poll(
        &self,
        socket: Pin<&mut impl AsyncRead>,
        cx: &Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.input.is_quiet(cx) {
            return Poll::Pending;
        }
        // Before the socket is asked: it may stir while it answers.
        self.input.quiet.store(true, SeqCst);
        let read = socket.poll_read(&mut Context::from_waker(&self.waker), buf);
        if read.is_ready() {
            self.input.stir();
        } else if !self.input.is_quiet(cx) {
            cx.waker().wake_by_ref();
        }
        read
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncWriteExt as _;

    /// Counts the questions that reach it.
    struct Counted<S>(S, usize);

    impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            self.1 += 1;
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    #[derive(Default)]
    struct Woken(AtomicBool);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, SeqCst);
        }
    }

    #[tokio::test]
    async fn a_quiet_socket_is_asked_once_and_wakes_who_asked_last() {
        let (mut far, near) = tokio::io::duplex(64);
        let mut socket = Counted(near, 0);
        let reader = Reader::new(Arc::default());
        let mut room = [0; 8];
        let mut read = |waker: &Waker, socket: &mut Counted<_>| {
            let mut buf = ReadBuf::new(&mut room);
            reader.poll(Pin::new(socket), &Context::from_waker(waker), &mut buf).map(|_| buf.filled().to_vec())
        };
        let [first, last] = [Arc::new(Woken::default()), Arc::new(Woken::default())];
        let [one, other] = [&first, &last].map(|woken| Waker::from(Arc::clone(woken)));
        assert!(read(&one, &mut socket).is_pending() && read(&one, &mut socket).is_pending());
        assert!(read(&other, &mut socket).is_pending());
        assert_eq!(socket.1, 1);

        far.write_all(b"abc").await.expect("room");
        assert_eq!([&first, &last].map(|woken| woken.0.load(SeqCst)), [false, true]);
        assert_eq!(read(&other, &mut socket), Poll::Ready(b"abc".to_vec()));
        assert!(read(&other, &mut socket).is_pending());
        assert_eq!(socket.1, 3);
    }
}
