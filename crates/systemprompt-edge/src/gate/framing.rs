//! How HTTP/1.1 messages follow each other on a connection, read strictly (RFC 9112).
//!
//! [`Framing`] sees every byte before hyper does, finds where each request head begins and ends, and
//! refuses whatever two parsers could read in two ways. It changes nothing: hyper parses the same bytes
//! again, so both must come to the same end of each message, which a property test checks.
//!
//! | state | leaves it by |
//! |---|---|
//! | `Head` | a complete head: to the body it announces, to `Waiting` when it asks for an upgrade |
//! | `Length`, `Chunked` | the last byte of the body: to `Head` |
//! | `Waiting` | the answer: [`Framing::resume`] to `Head`, [`Framing::tunnel`] to `Tunnel` |
//! | `Tunnel` | never |
//! | `Refused` | never |
//!
//! A head that comes in pieces is kept here until it is whole, so that nothing of a refused one goes on.

use std::mem::MaybeUninit;

/// Bytes of extensions one chunk may have.
const EXTENSION_BYTES: usize = 256;
/// Bytes of trailers a body may have.
const TRAILER_BYTES: usize = 8 * 1024;
/// Empty lines tolerated before a request line (RFC 9112, 2.2).
const EMPTY_LINES: u8 = 2;
/// Fields one head may have; hyper has room for as many, so that it never refuses what was accepted here.
pub(crate) const FIELD_SLOTS: usize = 100;

/// What to do with the bytes just seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// All of them may go on, but for [`Framing::withheld`] at their end.
    Pass,
    /// The bytes before this index may go on; what follows waits for the answer to an upgrade.
    Hold(usize),
    /// The bytes before this index may go on; the message that continues there is refused.
    Refuse(usize, Refusal),
}

/// Which part of a message was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The head: nothing of the message went on.
    Head,
    /// The body: its head went on, and maybe the beginning of the body.
    Body,
}

/// Why a message is refused. All are answered 400, [`Refusal::TooLarge`] 431; the connection closes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// LF without CR, or CR without LF.
    LineEnd,
    /// Not an HTTP/1 head: bad characters, folded lines, white space before a colon, other versions.
    Head,
    /// Head or trailers beyond the limit.
    TooLarge,
    /// Neither a path, nor an absolute http(s) URI, nor `*` for OPTIONS; or a fragment; or CONNECT.
    Target,
    /// None or several on HTTP/1.1, or another one than the target's authority.
    Host,
    /// Several, or not plain digits.
    ContentLength,
    /// Not exactly one `chunked`, on HTTP/1.0, or beside a Content-Length.
    TransferEncoding,
    /// A framing field spelt with an underscore, which some parsers take for the real one.
    Underscore,
    /// A chunk whose size or end is malformed, or whose extension is too long.
    Chunk,
}

impl Refusal {
    /// A sentence for whoever sent the message.
    pub(crate) fn message(self) -> &'static str {
        match self {
            Self::LineEnd => "A line of the request does not end with CRLF.",
            Self::Head => "The head of the request is not HTTP/1.1.",
            Self::TooLarge => "The head of the request is too large.",
            Self::Target => "The request target is not one this server takes.",
            Self::Host => "Expected exactly one Host, the same as in the target.",
            Self::ContentLength => "Expected at most one Content-Length of digits.",
            Self::TransferEncoding => {
                "Expected Transfer-Encoding to be `chunked`, alone, on HTTP/1.1, without Content-Length."
            }
            Self::Underscore => "A framing field is spelt with an underscore.",
            Self::Chunk => "The body of the request is not well chunked.",
        }
    }
}

/// The reader of one connection's framing.
#[derive(Debug)]
pub struct Framing {
    state: State,
    head_bytes: usize,
    /// The head so far, when it did not come in one piece.
    partial: Vec<u8>,
    /// What was kept of a head that is whole now.
    released: Vec<u8>,
    scan: Scan,
    heads: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head,
    Length(u64),
    Chunked(Chunk),
    Waiting,
    Tunnel,
    Refused(Refused),
}

/// Where in a chunked body the next byte falls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size { digits: u8, value: u64 },
    Extension { length: usize, value: u64 },
    SizeLf { value: u64 },
    Data(u64),
    DataCr,
    DataLf,
    TrailerStart { length: usize },
    Trailer { length: usize },
    TrailerLf { length: usize },
    EndLf,
}

/// Progress of the search for the end of a head.
#[derive(Debug, Clone, Copy, Default)]
struct Scan {
    seen: usize,
    line: usize,
    empty_lines: u8,
    request_line: bool,
}

/// What a head says about what follows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Nothing,
    Length(u64),
    Chunked,
    Upgrade,
}

impl Framing {
    /// A reader at the start of a connection that accepts heads of up to `head_bytes`.
    pub fn new(head_bytes: usize) -> Self {
        Self {
            state: State::Head,
            head_bytes,
            partial: Vec::new(),
            released: Vec::new(),
            scan: Scan::default(),
            heads: 0,
        }
    }

    /// How many heads were accepted.
    pub fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether a head has begun and not ended. Empty lines before it are none of it.
    pub fn inside_head(&self) -> bool {
        self.state == State::Head && self.partial.len() > if self.scan.request_line { 0 } else { self.scan.line }
    }

    /// Whether the last message is complete and no other has begun.
    pub fn is_between_messages(&self) -> bool {
        self.state == State::Head && self.partial.is_empty()
    }

    /// Whether an upgrade waits for its answer.
    pub fn is_waiting(&self) -> bool {
        self.state == State::Waiting
    }

    /// Whether the connection was refused.
    pub fn is_refused(&self) -> bool {
        self.refused().is_some()
    }

    /// Which part was refused, if one was.
    pub fn refused(&self) -> Option<Refused> {
        match self.state {
            State::Refused(part) => Some(part),
            _ => None,
        }
    }

    /// How many of the last bytes belong to a head that is not whole yet; they may not go on.
    pub fn withheld(&self) -> usize {
        if self.state == State::Head { self.partial.len() } else { 0 }
    }

    /// What was withheld of a head that became whole with the last bytes: it goes on before them.
    pub(crate) fn take_released(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.released)
    }

    /// The upgrade was not accepted: HTTP goes on.
    pub fn resume(&mut self) {
        if self.state == State::Waiting {
            self.state = State::Head;
        }
    }

    /// The upgrade was accepted: what follows is not HTTP.
    pub fn tunnel(&mut self) {
        if self.state == State::Waiting {
            self.state = State::Tunnel;
        }
    }

    /// Reads the next bytes of the connection. After [`Step::Hold`] and [`Step::Refuse`] the bytes from
    /// the index on count as not read.
    pub fn feed(&mut self, bytes: &[u8]) -> Step {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            let result = match self.state {
                State::Head => self.head(rest),
                State::Length(left) => Ok(self.skip(rest, left)),
                State::Chunked(chunk) => self.chunked(rest, chunk),
                State::Waiting => return Step::Hold(at),
                State::Tunnel => return Step::Pass,
                State::Refused(_) => return Step::Refuse(at, Refusal::Head),
            };
            match result {
                Ok(read) => at += read,
                Err(refusal) => {
                    self.state = State::Refused(if self.state == State::Head { Refused::Head } else { Refused::Body });
                    self.partial = Vec::new();
                    return Step::Refuse(at, refusal);
                }
            }
        }
        Step::Pass
    }

    fn skip(&mut self, bytes: &[u8], left: u64) -> usize {
        let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
        self.state = after_length(left - here as u64);
        here
    }

    fn head(&mut self, bytes: &[u8]) -> Result<usize, Refusal> {
        if self.partial.is_empty() {
            // The usual case: the whole head is in one read and nothing is copied.
            let mut scan = Scan::default();
            if let Some(end) = scan.end_of_head(bytes)? {
                self.accept(&bytes[..end])?;
                return Ok(end);
            }
            self.scan = scan;
            self.grow(bytes)?;
            return Ok(bytes.len());
        }
        let before = self.partial.len();
        self.partial.extend_from_slice(bytes);
        match self.scan.end_of_head(&self.partial)? {
            Some(end) => {
                let mut head = std::mem::take(&mut self.partial);
                self.accept(&head[..end])?;
                head.truncate(before);
                self.released = head;
                Ok(end - before)
            }
            None if self.partial.len() > self.head_bytes => Err(Refusal::TooLarge),
            None => Ok(bytes.len()),
        }
    }

    fn grow(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        if bytes.len() > self.head_bytes {
            return Err(Refusal::TooLarge);
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn accept(&mut self, head: &[u8]) -> Result<(), Refusal> {
        if head.len() > self.head_bytes {
            return Err(Refusal::TooLarge);
        }
        self.state = match judge(head)? {
            Next::Nothing => State::Head,
            Next::Length(length) => after_length(length),
            Next::Chunked => State::Chunked(Chunk::Size { digits: 0, value: 0 }),
            Next::Upgrade => State::Waiting,
        };
        self.heads += 1;
        Ok(())
    }

    fn chunked(&mut self, bytes: &[u8], mut chunk: Chunk) -> Result<usize, Refusal> {
        let mut at = 0;
        while at < bytes.len() {
            if let Chunk::Data(left) = chunk {
                let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len() - at);
                at += here;
                let left = left - here as u64;
                chunk = if left == 0 { Chunk::DataCr } else { Chunk::Data(left) };
                continue;
            }
            let next = chunk.step(bytes[at])?;
            at += 1;
            let Some(next) = next else {
                self.state = State::Head;
                return Ok(at);
            };
            chunk = next;
        }
        self.state = State::Chunked(chunk);
        Ok(at)
    }
}

fn after_length(left: u64) -> State {
    if left == 0 { State::Head } else { State::Length(left) }
}

impl Chunk {
    /// The place after a byte; `None` after the last byte of the body.
    fn step(self, byte: u8) -> Result<Option<Self>, Refusal> {
        let next = match (self, byte) {
            (Self::Size { digits, value }, b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F') if digits < 15 => {
                Self::Size { digits: digits + 1, value: value * 16 + hex(byte) }
            }
            (Self::Size { digits: 1.., value }, b';') => Self::Extension { length: 0, value },
            (Self::Size { digits: 1.., value } | Self::Extension { value, .. }, b'\r') => Self::SizeLf { value },
            (Self::Extension { length, value }, b'\t' | b' '..=b'~') if length < EXTENSION_BYTES => {
                Self::Extension { length: length + 1, value }
            }
            (Self::SizeLf { value: 0 }, b'\n') => Self::TrailerStart { length: 0 },
            (Self::SizeLf { value }, b'\n') => Self::Data(value),
            (Self::DataCr, b'\r') => Self::DataLf,
            (Self::DataLf, b'\n') => Self::Size { digits: 0, value: 0 },
            (Self::TrailerStart { .. }, b'\r') => Self::EndLf,
            (Self::EndLf, b'\n') => return Ok(None),
            // A folded line would be a second reading of the field before it.
            (Self::TrailerStart { .. }, b' ' | b'\t') => return Err(Refusal::Head),
            (Self::Trailer { length }, b'\r') => Self::TrailerLf { length },
            (Self::TrailerLf { length }, b'\n') => Self::TrailerStart { length },
            (Self::TrailerStart { .. } | Self::Trailer { .. }, b'\n') | (Self::TrailerLf { .. }, _) => {
                return Err(Refusal::LineEnd);
            }
            (Self::TrailerStart { length } | Self::Trailer { length }, _) if length < TRAILER_BYTES => {
                Self::Trailer { length: length + 1 }
            }
            (Self::TrailerStart { .. } | Self::Trailer { .. }, _) => return Err(Refusal::TooLarge),
            _ => return Err(Refusal::Chunk),
        };
        Ok(Some(next))
    }
}

fn hex(byte: u8) -> u64 {
    u64::from(match byte {
        b'0'..=b'9' => byte - b'0',
        b'a'..=b'f' => byte - b'a' + 10,
        _ => byte - b'A' + 10,
    })
}

impl Scan {
    /// The index after the empty line that ends a head, if it is there; looks at new bytes only.
    fn end_of_head(&mut self, bytes: &[u8]) -> Result<Option<usize>, Refusal> {
        for offset in memchr::memchr_iter(b'\n', &bytes[self.seen..]) {
            let lf = self.seen + offset;
            if lf == self.line || bytes[lf - 1] != b'\r' {
                return Err(Refusal::LineEnd);
            }
            let empty = lf - self.line == 1;
            self.line = lf + 1;
            match (empty, self.request_line) {
                (true, true) => return Ok(Some(lf + 1)),
                (true, false) if self.empty_lines == EMPTY_LINES => return Err(Refusal::Head),
                (true, false) => self.empty_lines += 1,
                (false, _) => self.request_line = true,
            }
        }
        self.seen = bytes.len();
        Ok(None)
    }
}

/// Decides about a complete head.
fn judge(head: &[u8]) -> Result<Next, Refusal> {
    let mut slots = [const { MaybeUninit::uninit() }; FIELD_SLOTS];
    let mut request = httparse::Request::new(&mut []);
    match request.parse_with_uninit_headers(head, &mut slots) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::TooLarge),
        Ok(_) | Err(_) => return Err(Refusal::Head),
    }
    let (Some(method), Some(target), Some(minor)) = (request.method, request.path, request.version) else {
        return Err(Refusal::Head);
    };
    let fields = Fields::collect(request.headers)?;
    check_target(method, target, fields.host)?;
    if minor == 1 && fields.host.is_none() {
        return Err(Refusal::Host);
    }
    match (fields.length, fields.chunked) {
        (None, true) if minor == 1 => Ok(Next::Chunked),
        (_, true) => Err(Refusal::TransferEncoding),
        (Some(length), false) if length > 0 => Ok(Next::Length(length)),
        _ if minor == 1
            && method == "GET"
            && fields.websockets == 1
            && fields.upgrades == 1
            && fields.connection_upgrade =>
        {
            Ok(Next::Upgrade)
        }
        _ => Ok(Next::Nothing),
    }
}

/// The fields that frame a message.
#[derive(Default)]
struct Fields<'a> {
    host: Option<&'a [u8]>,
    length: Option<u64>,
    chunked: bool,
    upgrades: usize,
    websockets: usize,
    connection_upgrade: bool,
}

impl<'a> Fields<'a> {
    fn collect(headers: &[httparse::Header<'a>]) -> Result<Self, Refusal> {
        let mut fields = Self::default();
        for header in headers {
            let name = header.name.as_bytes();
            match name.len() {
                4 if name.eq_ignore_ascii_case(b"host") => {
                    let before = fields.host.replace(header.value);
                    before.map_or(Ok(()), |_| Err(Refusal::Host))?;
                }
                7 if name.eq_ignore_ascii_case(b"upgrade") => {
                    fields.upgrades += 1;
                    fields.websockets += usize::from(header.value.eq_ignore_ascii_case(b"websocket"));
                }
                10 if name.eq_ignore_ascii_case(b"connection") => {
                    fields.connection_upgrade |= lists_upgrade(header.value);
                }
                14 if name.eq_ignore_ascii_case(b"content-length") => {
                    let length = digits(header.value).ok_or(Refusal::ContentLength)?;
                    if fields.length.replace(length).is_some() {
                        return Err(Refusal::ContentLength);
                    }
                }
                17 if name.eq_ignore_ascii_case(b"transfer-encoding") => {
                    if fields.chunked || !header.value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Refusal::TransferEncoding);
                    }
                    fields.chunked = true;
                }
                14 if name.eq_ignore_ascii_case(b"content_length") => return Err(Refusal::Underscore),
                17 if name.eq_ignore_ascii_case(b"transfer_encoding") => return Err(Refusal::Underscore),
                _ => {}
            }
        }
        Ok(fields)
    }
}

fn lists_upgrade(value: &[u8]) -> bool {
    value.split(|byte| *byte == b',').any(|token| token.trim_ascii().eq_ignore_ascii_case(b"upgrade"))
}

/// A number of one to eighteen digits, which fits.
fn digits(value: &[u8]) -> Option<u64> {
    let plain = (1..=18).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    plain.then(|| value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

fn check_target(method: &str, target: &str, host: Option<&[u8]>) -> Result<(), Refusal> {
    // hyper would drop a fragment silently, and the app see another target than the client sent.
    if method == "CONNECT" || memchr::memchr(b'#', target.as_bytes()).is_some() {
        return Err(Refusal::Target);
    }
    if target.starts_with('/') || (target == "*" && method == "OPTIONS") {
        return Ok(());
    }
    let rest = strip_scheme(target).ok_or(Refusal::Target)?;
    let authority = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    match host {
        Some(host) if host.eq_ignore_ascii_case(authority.as_bytes()) => Ok(()),
        _ => Err(Refusal::Host),
    }
}

fn strip_scheme(target: &str) -> Option<&str> {
    let (scheme, rest) = target.split_once("://")?;
    (scheme.eq_ignore_ascii_case("https") || scheme.eq_ignore_ascii_case("http")).then_some(rest)
}
