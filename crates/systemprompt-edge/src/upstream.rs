//! Connections to upstreams: opened here, for forwarding and for probes alike.
//!
//! hyper's client connection is a future that somebody must poll. Usually that is a task of its own, and
//! each request then costs several hops between it and the task of the client's connection. Here whoever
//! uses a [`Link`] polls it, so that the socket wakes the client's task directly. Only exchanges that go
//! on in both directions at once (a request body, a tunnel) get a task: see [`Link::detach`].

use crate::{
    body::{Progress, RequestBody},
    config::Upstream,
    input::Reader,
};
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::{Request, Response};
use http_body::{Body, Frame};
use hyper::{
    body::Incoming,
    client::conn::{
        TrySendError,
        http1::{self, Connection, SendRequest},
    },
};
use hyper_util::rt::TokioIo;
use std::{
    future::poll_fn,
    io,
    pin::{Pin, pin},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{
            AtomicBool, AtomicU8, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
    },
    task::{Context, Poll, Wake, Waker},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    task::AbortHandle,
};

/// Largest read buffer on either leg: hyper's default grows to 400 KiB, which costs page faults and
/// memory for nothing.
pub(crate) const BUFFER_BYTES: usize = 64 * 1024;

/// A connection that can carry one request at a time. Dropping it closes the connection, unless it became a tunnel.
pub(crate) struct Link {
    sender: SendRequest<RequestBody>,
    driver: Driver,
    line: Arc<Line>,
    /// Of a connection that was detached.
    task: Option<AbortHandle>,
}

/// What a connection's socket and whoever uses the connection tell each other.
#[derive(Debug, Default)]
struct Line {
    /// Set by the first byte that comes back; cleared before each request.
    answered: AtomicBool,
    /// It carries no HTTP any more.
    tunnel: AtomicBool,
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Link {
    /// Gives the connection a task of its own, for as long as it lasts. To be called before a request
    /// that has a body or asks for an upgrade is sent.
    pub(crate) fn detach(&mut self) {
        if let Some(connection) = self.driver.connection.take() {
            let task = tokio::spawn(async move {
                if let Err(error) = connection.with_upgrades().await {
                    tracing::debug!(%error, "upstream connection ended");
                }
            });
            self.task = Some(task.abort_handle());
        }
    }

    /// Leaves the connection to the tunnel that it became.
    pub(crate) fn leave(mut self) {
        self.line.tunnel.store(true, Relaxed);
        self.task = None;
    }

    /// Sends a request and waits for the head of its answer. The patience with the upstream begins anew
    /// while the body moves on, by `progress`: a long upload is no late answer.
    pub(crate) async fn send(
        &mut self,
        request: Request<RequestBody>,
        progress: Option<&Progress>,
    ) -> Result<Response<Incoming>, SendError> {
        self.line.answered.store(false, Relaxed);
        self.driver.relay.begin_waiting();
        self.driver.begin();
        let mut answer = pin!(self.sender.try_send_request(request));
        let answer = poll_fn(|cx| match self.driver.poll_with(cx, |cx| answer.as_mut().poll(cx)) {
            Poll::Pending if self.driver.relay.is_late() => {
                if progress.is_some_and(Progress::has_moved) {
                    self.driver.relay.begin_waiting();
                    return Poll::Pending;
                }
                Poll::Ready(Err(SendError::Late))
            }
            answer => answer.map_err(|error| SendError::Http(Box::new(error))),
        })
        .await;
        self.driver.relay.end_waiting();
        answer
    }

    /// Whether anything came back since the last request.
    pub(crate) fn is_answered(&self) -> bool {
        self.line.answered.load(Relaxed)
    }

    /// The next part of an answer's body.
    pub(crate) fn poll_body(
        &mut self,
        cx: &mut Context<'_>,
        body: &mut Incoming,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.driver.poll_with(cx, |cx| Pin::new(&mut *body).poll_frame(cx))
    }

    /// Waits until the connection can take a request; false when it was closed.
    pub(crate) async fn is_ready(&mut self) -> bool {
        let sender = &mut self.sender;
        sender.is_ready() || poll_fn(|cx| self.driver.poll_with(cx, |cx| sender.poll_ready(cx))).await.is_ok()
    }

    /// Whether an idle connection was closed.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.driver.drive(&mut Context::from_waker(Waker::noop()));
        self.sender.is_closed()
    }
}

/// Why a request got no answer.
pub(crate) enum SendError {
    /// The patience with the upstream is at its end.
    Late,
    /// The connection failed; the request is in here if it never began to go out.
    Http(Box<TrySendError<Request<RequestBody>>>),
}

/// Polls a connection on behalf of whoever waits for something that only the connection brings forward.
struct Driver {
    /// `None`: a task drives the connection, or it is closed.
    connection: Option<Box<Connection<TokioIo<Watched>, RequestBody>>>,
    relay: Arc<Relay>,
    waker: Waker,
}

impl Driver {
    fn new(connection: Connection<TokioIo<Watched>, RequestBody>, relay: Arc<Relay>) -> Self {
        Self { connection: Some(Box::new(connection)), waker: Waker::from(Arc::clone(&relay)), relay }
    }

    /// From now on the connection's wishes to be polled are only noted.
    fn begin(&self) {
        self.relay.state.store(POLLING, SeqCst);
    }

    fn poll_with<T>(&mut self, cx: &mut Context<'_>, mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
        self.relay.task.register(cx.waker());
        if self.connection.is_none() {
            return poll(cx);
        }
        let waker = self.waker.clone();
        let mut cx = Context::from_waker(&waker);
        loop {
            self.begin();
            if let Poll::Ready(done) = poll(&mut cx) {
                return self.rest(Poll::Ready(done));
            }
            self.drive(&mut cx);
            if let Poll::Ready(done) = poll(&mut cx) {
                return self.rest(Poll::Ready(done));
            }
            if self.relay.state.compare_exchange(POLLING, RESTING, SeqCst, SeqCst).is_ok() {
                return Poll::Pending;
            }
        }
    }

    /// Whoever got what he waited for polls again when he wants more, so no wish is lost.
    fn rest<T>(&self, done: Poll<T>) -> Poll<T> {
        self.relay.state.store(RESTING, SeqCst);
        done
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection
            && let Poll::Ready(ended) = Pin::new(&mut **connection).poll(cx)
        {
            if let Err(error) = ended {
                tracing::debug!(%error, "upstream connection ended");
            }
            self.connection = None;
        }
    }
}

/// Wakes the task that waits for a connection, but not while that task polls it: the channels inside
/// hyper would wake it for what it is just doing, and each such wake costs a whole poll.
struct Relay {
    state: AtomicU8,
    task: AtomicWaker,
    clock: Arc<Clock>,
    /// The tick of the clock at which the wait for an answer began, [`NOT_WAITING`], or [`LATE`].
    since: AtomicU64,
}

const NOT_WAITING: u64 = u64::MAX;
const LATE: u64 = u64::MAX - 1;

impl Relay {
    fn begin_waiting(&self) {
        self.since.store(self.clock.ticks.load(Relaxed), Relaxed);
    }

    fn end_waiting(&self) {
        self.since.store(NOT_WAITING, Relaxed);
    }

    fn is_late(&self) -> bool {
        self.since.load(Relaxed) == LATE
    }
}

/// Keeps an eye on all connections that wait for an answer, so that no request needs a timer.
#[derive(Default)]
pub(crate) struct Clock {
    ticks: AtomicU64,
    relays: Mutex<Vec<Weak<Relay>>>,
}

impl Clock {
    /// Another tick has gone by: requests that have waited for more than `patience` ticks are given up.
    pub(crate) fn tick(&self, patience: u64) {
        let now = self.ticks.fetch_add(1, Relaxed) + 1;
        // A panic in here leaves the list whole.
        self.relays.lock().unwrap_or_else(PoisonError::into_inner).retain(|relay| {
            let Some(relay) = relay.upgrade() else { return false };
            let since = relay.since.load(Relaxed);
            if since < LATE && now - since > patience {
                relay.since.store(LATE, Relaxed);
                relay.task.wake();
            }
            true
        });
    }

    fn relay(self: &Arc<Self>) -> Arc<Relay> {
        let relay = Arc::new(Relay {
            state: AtomicU8::new(RESTING),
            task: AtomicWaker::new(),
            clock: Arc::clone(self),
            since: AtomicU64::new(NOT_WAITING),
        });
        self.relays.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&relay));
        relay
    }
}

/// Nobody polls: a wake goes to the task.
const RESTING: u8 = 0;
/// The task polls: a wake is noted.
const POLLING: u8 = 1;
/// A wake was noted: the task polls once more before it rests.
const NOTED: u8 = 2;

impl Wake for Relay {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if self.state.compare_exchange(POLLING, NOTED, SeqCst, SeqCst) == Err(RESTING) {
            self.task.wake();
        }
    }
}

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum ConnectError {
    Io(io::Error),
    Http(hyper::Error),
}

/// Opens a connection, whose requests wait by `clock`.
pub(crate) async fn connect(upstream: &Upstream, clock: &Arc<Clock>) -> Result<Link, ConnectError> {
    let line = Arc::<Line>::default();
    let io = match upstream {
        Upstream::Tcp(address) => {
            let stream = TcpStream::connect(address).await.map_err(ConnectError::Io)?;
            stream.set_nodelay(true).map_err(ConnectError::Io)?;
            Socket::Tcp(stream)
        }
        Upstream::Unix(path) => Socket::Unix(UnixStream::connect(path).await.map_err(ConnectError::Io)?),
    };
    let io = TokioIo::new(Watched { io, reader: Reader::new(Arc::default()), line: Arc::clone(&line), reset: false });
    let (sender, connection) =
        http1::Builder::new().max_buf_size(BUFFER_BYTES).handshake(io).await.map_err(ConnectError::Http)?;
    Ok(Link { sender, driver: Driver::new(connection, clock.relay()), line, task: None })
}

enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

struct Watched {
    io: Socket,
    reader: Reader,
    line: Arc<Line>,
    /// A write was told that the upstream broke off: the end of what can be read is not the end of an answer.
    reset: bool,
}

impl Watched {
    /// An upstream that closed takes no more, but may have answered before: hyper would give up at the failed write
    /// and never read that. So what is written goes nowhere, and reading tells how the exchange ends. A tunnel ends.
    fn taken(&mut self, written: Poll<io::Result<usize>>, all: usize) -> Poll<io::Result<usize>> {
        match written {
            Poll::Ready(Err(error)) if !self.line.tunnel.load(Relaxed) => match error.kind() {
                io::ErrorKind::BrokenPipe => Poll::Ready(Ok(all)),
                io::ErrorKind::ConnectionReset => {
                    self.reset = true;
                    Poll::Ready(Ok(all))
                }
                _ => Poll::Ready(Err(error)),
            },
            written => written,
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let result = match &mut this.io {
            Socket::Tcp(stream) => this.reader.poll(Pin::new(stream), cx, buf),
            Socket::Unix(stream) => this.reader.poll(Pin::new(stream), cx, buf),
        };
        if buf.filled().len() > before {
            this.line.answered.store(true, Relaxed);
        } else if this.reset && matches!(result, Poll::Ready(Ok(()))) {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        result
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = match &mut this.io {
            Socket::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Socket::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        };
        this.taken(written, buf.len())
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        // Most requests are one slice, and `send` is cheaper than `writev`.
        if let [one] = bufs {
            return self.poll_write(cx, one);
        }
        let this = self.get_mut();
        let written = match &mut this.io {
            Socket::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Socket::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        };
        this.taken(written, bufs.iter().map(|buf| buf.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Sockets have no buffer of ours.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().io {
            Socket::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Socket::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
