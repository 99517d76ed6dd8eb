//! The static site: files below `WEB_DIR/dist` and nothing else.
//!
//! A path is first brought into one spelling (decoded once, no empty, dot or hidden part), then opened by the kernel
//! with `RESOLVE_BENEATH`: no path and no link can lead out of the directory, whoever changes it meanwhile.
//! Entity tags are content hashes, since files of an image all bear the same time stamp.

use crate::answer;
use axum::{
    body::Body,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, openat2},
    io::Errno,
};
use sha2::{Digest as _, Sha256};
use std::{
    collections::HashMap,
    fs::File,
    io::{Read as _, Seek as _},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};
use tokio_util::io::ReaderStream;

/// Files up to this size are answered from one buffer; larger ones are streamed.
const WHOLE_UP_TO: u64 = 256 * 1024;
const CHUNK: usize = 64 * 1024;
/// Entity tags that are remembered; beyond it they are computed again.
const MAX_TAGS: usize = 4096;
const NOT_FOUND_FILE: &str = "404.html";
/// Shared caches may keep a page but must ask; a redeploy shows at once.
const CACHE_CONTROL: HeaderValue = HeaderValue::from_static("public, max-age=0, must-revalidate");

/// A directory of files, served.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    root: PathBuf,
    tags: Arc<Mutex<HashMap<FileIdentity, HeaderValue>>>,
}

/// What changes when a file's content does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

enum Found {
    File(OpenFile),
    /// A directory asked for without the slash at its end.
    Directory,
    Nothing,
}

struct OpenFile {
    file: File,
    size: u64,
    tag: HeaderValue,
    content_type: &'static str,
    /// The whole content of a small file.
    content: Option<Bytes>,
}

impl Site {
    pub(crate) fn new(root: PathBuf) -> Self {
        Self { root, tags: Arc::default() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Answers GET and HEAD of `path`, which is the request's path as it came.
    pub(crate) async fn answer(&self, method: &Method, path: &str, headers: &HeaderMap) -> Response {
        if method != Method::GET && method != Method::HEAD {
            return answer::method_not_allowed();
        }
        let Some(clean) = CleanPath::parse(path) else { return self.not_found(method).await };
        match self.find(clean.file()).await {
            Ok(Found::File(file)) => file.answer(StatusCode::OK, method, headers),
            Ok(Found::Directory) if !clean.is_directory => clean.redirect(),
            Ok(Found::Directory | Found::Nothing) => self.not_found(method).await,
            Err(error) => {
                tracing::warn!(error = %error, path, "a file of the site cannot be read");
                answer::unreadable_page()
            }
        }
    }

    async fn not_found(&self, method: &Method) -> Response {
        match self.find(NOT_FOUND_FILE.to_owned()).await {
            Ok(Found::File(file)) => file.answer(StatusCode::NOT_FOUND, method, &HeaderMap::new()),
            _ => answer::not_found_page(),
        }
    }

    async fn find(&self, relative: String) -> Result<Found, Errno> {
        let site = self.clone();
        tokio::task::spawn_blocking(move || site.open(&relative)).await.unwrap_or(Err(Errno::IO))
    }

    fn open(&self, relative: &str) -> Result<Found, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        let root = match openat2(CWD, &self.root, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::empty())
        {
            Err(Errno::NOENT) => return Ok(Found::Nothing),
            opened => opened?,
        };
        let file = match openat2(&root, relative, flags, Mode::empty(), beneath) {
            // XDEV is the kernel's answer to a path or link that leads out of the directory.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP | Errno::NAMETOOLONG | Errno::NXIO) => {
                return Ok(Found::Nothing);
            }
            opened => opened?,
        };
        let stat = rustix::fs::fstat(&file)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.opened(file, &stat, relative).map(Found::File),
            FileType::Directory => Ok(Found::Directory),
            _ => Ok(Found::Nothing),
        }
    }

    fn opened(&self, file: OwnedFd, stat: &Stat, relative: &str) -> Result<OpenFile, Errno> {
        let identity = FileIdentity::of(stat);
        let mut file = File::from(file);
        let content = (identity.size <= WHOLE_UP_TO)
            .then(|| read_whole(&mut file))
            .transpose()
            .map_err(|error| as_errno(&error))?;
        let known = self.lock_tags().get(&identity).cloned();
        let tag = match known {
            Some(tag) => tag,
            None => self.remember(identity, hash(&mut file, content.as_deref()).map_err(|error| as_errno(&error))?),
        };
        // A file that grew since `fstat` must not contradict the length that is announced.
        let size = content.as_ref().map_or(identity.size, |content| content.len() as u64);
        Ok(OpenFile { file, size, tag, content_type: content_type(relative), content })
    }

    fn remember(&self, identity: FileIdentity, tag: HeaderValue) -> HeaderValue {
        let mut tags = self.lock_tags();
        if tags.len() >= MAX_TAGS {
            tags.clear();
        }
        tags.insert(identity, tag.clone());
        tag
    }

    fn lock_tags(&self) -> std::sync::MutexGuard<'_, HashMap<FileIdentity, HeaderValue>> {
        // A panic while holding it leaves a map that is still whole.
        self.tags.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FileIdentity {
    fn of(stat: &Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            modified: (stat.st_mtime, i64::try_from(stat.st_mtime_nsec).unwrap_or(0)),
            changed: (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(0)),
        }
    }
}

impl OpenFile {
    fn answer(self, status: StatusCode, method: &Method, headers: &HeaderMap) -> Response {
        let fresh = status == StatusCode::OK && is_fresh(headers, &self.tag);
        let mut answer = if fresh {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            (status, self.body_for(method)).into_response()
        };
        let out = answer.headers_mut();
        out.insert(header::ETAG, self.tag);
        out.insert(header::CACHE_CONTROL, CACHE_CONTROL);
        out.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        out.remove(header::CONTENT_TYPE);
        if !fresh {
            out.insert(header::CONTENT_TYPE, HeaderValue::from_static(self.content_type));
            out.insert(header::CONTENT_LENGTH, HeaderValue::from(self.size));
        }
        answer
    }

    fn body_for(&self, method: &Method) -> Body {
        match (&self.content, self.file.try_clone()) {
            _ if method == Method::HEAD => Body::empty(),
            (Some(content), _) => Body::from(content.clone()),
            (None, Ok(file)) => {
                let reader = tokio::io::AsyncReadExt::take(tokio::fs::File::from_std(file), self.size);
                Body::from_stream(ReaderStream::with_capacity(reader, CHUNK).map_err(std::io::Error::other))
            }
            (None, Err(error)) => Body::from_stream(futures_util::stream::once(async { Err::<Bytes, _>(error) })),
        }
    }
}

/// A request path in its one spelling.
#[derive(Debug, PartialEq, Eq)]
struct CleanPath {
    /// `a/b`, empty for the root.
    relative: String,
    is_directory: bool,
}

impl CleanPath {
    /// None for whatever can have no file: bad escapes, NUL, backslashes, empty, dot and hidden parts.
    fn parse(path: &str) -> Option<Self> {
        let decoded = percent_decoded(path.strip_prefix('/')?)?;
        let is_directory = decoded.is_empty() || decoded.ends_with('/');
        let relative = decoded.strip_suffix('/').unwrap_or(&decoded);
        let forbidden = |part: &str| part.is_empty() || part.starts_with('.') || part.contains(['\0', '\\']);
        // `.well-known` (RFC 8615) is the one hidden name that a site is asked for.
        let bad = !relative.is_empty() && relative.split('/').any(|part| part != ".well-known" && forbidden(part));
        (!bad && decoded != "/").then(|| Self { relative: relative.to_owned(), is_directory })
    }

    fn file(&self) -> String {
        match (self.is_directory, self.relative.is_empty()) {
            (false, _) => self.relative.clone(),
            (true, true) => "index.html".to_owned(),
            (true, false) => format!("{}/index.html", self.relative),
        }
    }

    fn redirect(&self) -> Response {
        let location: String = self.relative.split('/').fold(String::new(), |mut path, part| {
            path.push('/');
            path.extend(url_escaped(part));
            path
        });
        match HeaderValue::try_from(location + "/") {
            Ok(location) => (StatusCode::PERMANENT_REDIRECT, [(header::LOCATION, location)]).into_response(),
            Err(_) => answer::not_found_page(),
        }
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(tail.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok().filter(|_| !digits.starts_with('+'))?);
            rest = &tail[2..];
        } else {
            bytes.push(first);
            rest = tail;
        }
    }
    String::from_utf8(bytes).ok()
}

fn url_escaped(part: &str) -> impl Iterator<Item = char> {
    part.bytes().flat_map(|byte| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => vec![char::from(byte)],
        _ => format!("%{byte:02X}").chars().collect(),
    })
}

/// `If-None-Match` by weak comparison (RFC 9110, 13.1.2).
fn is_fresh(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let Ok(tag) = tag.to_str() else { return false };
    let given = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    given
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
}

fn read_whole(file: &mut File) -> std::io::Result<Bytes> {
    let mut content = Vec::new();
    file.take(WHOLE_UP_TO + 1).read_to_end(&mut content)?;
    Ok(Bytes::from(content))
}

fn hash(file: &mut File, content: Option<&[u8]>) -> std::io::Result<HeaderValue> {
    let mut hasher = Sha256::new();
    if let Some(content) = content {
        hasher.update(content);
    } else {
        let mut buffer = vec![0; CHUNK];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                count => hasher.update(&buffer[..count]),
            }
        }
        file.rewind()?;
    }
    let digest = hasher.finalize();
    let tag = digest.iter().take(16).fold(String::from("\""), |tag, byte| format!("{tag}{byte:02x}")) + "\"";
    HeaderValue::try_from(tag).map_err(std::io::Error::other)
}

fn as_errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

fn content_type(path: &str) -> &'static str {
    let extension =
        path.rsplit('/').next().and_then(|name| name.rsplit_once('.')).map_or("", |(_, extension)| extension);
    match extension.to_ascii_lowercase().as_str() {
        "html" | "htm" => "text/html; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "xml" => "application/xml",
        "txt" => "text/plain; charset=utf-8",
        "md" => "text/markdown; charset=utf-8",
        "csv" => "text/csv; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "webp" => "image/webp",
        "avif" => "image/avif",
        "ico" => "image/x-icon",
        "woff" => "font/woff",
        "woff2" => "font/woff2",
        "ttf" => "font/ttf",
        "otf" => "font/otf",
        "mp4" => "video/mp4",
        "webm" => "video/webm",
        "mp3" => "audio/mpeg",
        "ogg" => "audio/ogg",
        "wav" => "audio/wav",
        "pdf" => "application/pdf",
        "wasm" => "application/wasm",
        "zip" => "application/zip",
        "gz" => "application/gzip",
        _ => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(path: &str) -> Option<String> {
        CleanPath::parse(path).map(|path| path.file())
    }

    #[test]
    fn one_path_one_spelling() {
        assert_eq!(clean("/").as_deref(), Some("index.html"));
        assert_eq!(clean("/a/b.css").as_deref(), Some("a/b.css"));
        assert_eq!(clean("/docs/").as_deref(), Some("docs/index.html"));
        assert_eq!(clean("/a%20b.txt").as_deref(), Some("a b.txt"));
        assert_eq!(clean("/.well-known/security.txt").as_deref(), Some(".well-known/security.txt"));
        for bad in [
            "",
            "a",
            "//",
            "//a",
            "/a//b",
            "/..",
            "/../a",
            "/a/../b",
            "/%2e%2e/a",
            "/%2E%2e%2fa",
            "/a/./b",
            "/.git/config",
            "/.env",
            "/a\\b",
            "/%5c..",
            "/%00",
            "/a%0",
            "/%zz",
            "/%+1",
            "/%ff",
            "/a/..%2f..%2fetc/passwd",
        ] {
            assert_eq!(clean(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_redirect_stays_on_this_host() {
        let clean = CleanPath::parse("/%0d%0aa:/%C3%A9").expect("a name");
        assert_eq!(clean.redirect().headers()[header::LOCATION], "/%0D%0Aa%3A/%C3%A9/");
    }

    #[test]
    fn if_none_match_compares_weakly() {
        let tag = HeaderValue::from_static("\"x\"");
        let fresh = |value: &'static str| {
            let headers = HeaderMap::from_iter([(header::IF_NONE_MATCH, HeaderValue::from_static(value))]);
            is_fresh(&headers, &tag)
        };
        assert!(fresh("\"x\"") && fresh("W/\"x\"") && fresh("\"y\", \"x\"") && fresh("*"));
        assert!(!fresh("\"y\"") && !fresh("x") && !is_fresh(&HeaderMap::new(), &tag));
    }
}
