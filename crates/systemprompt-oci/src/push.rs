//! Pushes a built image to a registry (OCI distribution specification 1.1), sending only what is missing there.

use crate::{BuiltImage, Descriptor, Digest, Manifest};
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use reqwest::{
    Method, RequestBuilder, Response, StatusCode,
    header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderName, LOCATION, RANGE, RETRY_AFTER},
};
use std::{
    fmt, io,
    path::PathBuf,
    pin::pin,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use systemprompt_contract::Secret;
use tokio::{io::AsyncSeekExt, sync::mpsc};
use tokio_util::io::ReaderStream;
use url::Url;

/// Most blobs asked about or sent at the same time.
const PARALLEL: usize = 6;
/// How often a request is tried before it is given up.
const ATTEMPTS: u32 = 5;
/// Wait before the second attempt; doubles with each further one.
const FIRST_BACKOFF: Duration = Duration::from_millis(200);
/// No wait is longer, whatever the registry asks for.
const LONGEST_BACKOFF: Duration = Duration::from_secs(10);
/// For questions about an upload that was cut off. The registry may still wait for the rest of it on a connection that
/// died without a word; to begin again is faster then.
const RESUME_TIMEOUT: Duration = Duration::from_secs(10);
/// For everything but uploads, which last as long as they last.
const REQUEST_TIMEOUT: Duration = Duration::from_mins(1);

/// A client of one registry, with the credentials for one push.
#[derive(Clone)]
pub struct RegistryClient {
    http: reqwest::Client,
    base: Url,
    username: String,
    password: Secret,
}

impl fmt::Debug for RegistryClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RegistryClient").field("base", &self.base.as_str()).finish_non_exhaustive()
    }
}

/// How far a push has come. Each digest is reported as [`PushEvent::Exists`], or as [`PushEvent::Uploading`], perhaps
/// several [`PushEvent::Progress`], and [`PushEvent::Uploaded`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PushEvent {
    /// The registry has the blob already.
    Exists {
        /// Which blob.
        digest: Digest,
        /// In bytes.
        size: u64,
    },
    /// A blob begins to be sent, or goes on after a failure: [`PushEvent::Progress`] then counts from zero again, first
    /// with what the registry has.
    Uploading {
        /// Which blob.
        digest: Digest,
        /// In bytes.
        size: u64,
    },
    /// Bytes of a blob were handed to the network, or found to be there.
    Progress {
        /// Which blob.
        digest: Digest,
        /// How many more than at the last event.
        bytes: u64,
    },
    /// The registry has stored the blob.
    Uploaded {
        /// Which blob.
        digest: Digest,
    },
    /// The registry has stored the manifest: the push is complete.
    Manifest {
        /// Of the manifest.
        digest: Digest,
    },
}

/// What a push did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushReport {
    /// Digest of the manifest that was pushed.
    pub digest: Digest,
    /// Blobs that were sent.
    pub uploaded_blobs: usize,
    /// Their bytes.
    pub uploaded_bytes: u64,
    /// Blobs the registry had.
    pub existing_blobs: usize,
}

/// Why a push failed. Nothing is half-pushed: a tag moves only once everything below it is stored.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum PushError {
    #[error("the registry at {registry} did not answer: {source}")]
    Transport { registry: String, source: reqwest::Error },
    #[error("the registry refused the push token (401); ask for a new one, they last ten minutes")]
    Unauthorized,
    #[error("the push token does not allow this (403): {0}")]
    Forbidden(String),
    #[error("the registry knows no such repository or tag for this token (404): {0}")]
    NotFound(String),
    #[error("the image is larger than allowed (413): {0}")]
    TooLarge(String),
    #[error("the registry's disk is full (507); nothing was lost, tell the operator: {0}")]
    RegistryFull(String),
    #[error("the registry answered {status}: {message}")]
    Refused { status: u16, message: String },
    #[error("expected {expected} from the registry, got {got}")]
    Protocol { expected: &'static str, got: String },
    #[error("{path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
}

impl PushError {
    /// Whether the same request may well succeed a moment later.
    fn is_transient(&self) -> bool {
        match self {
            Self::Transport { source, .. } => !source.is_builder(),
            Self::Refused { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

impl RegistryClient {
    /// A client of the registry at `base` (`https://host[:port]`); the path of `base` is ignored.
    pub fn new(http: reqwest::Client, base: Url, username: impl Into<String>, password: Secret) -> Self {
        Self { http, base, username: username.into(), password }
    }

    /// Pushes the image as `repository:tag`: asks for all blobs at once, sends the missing ones from disk, then the
    /// manifest. Idempotent. Transport errors and 5xx answers are retried with growing waits; a blob then goes on where
    /// it stands in the registry. Dropping the future stops the push; what was stored stays and will not be sent again.
    ///
    /// # Errors
    /// [`PushError`]
    pub async fn push(
        &self,
        image: &BuiltImage,
        repository: &str,
        tag: &str,
        progress: &(dyn Fn(PushEvent) + Send + Sync),
    ) -> Result<PushReport, PushError> {
        let push = Push { client: self, repository, progress };
        let blobs = blobs_of(image);
        let count = blobs.len();
        let sent: Vec<u64> = stream::iter(blobs)
            .map(|blob| push.ensure(blob))
            .buffer_unordered(PARALLEL)
            .try_filter_map(|sent| std::future::ready(Ok(sent)))
            .try_collect()
            .await?;
        push.manifest(image, tag).await?;
        Ok(PushReport {
            digest: image.digest,
            uploaded_blobs: sent.len(),
            uploaded_bytes: sent.iter().sum(),
            existing_blobs: count - sent.len(),
        })
    }

    fn url(&self, path: &str) -> Url {
        let mut url = self.base.clone();
        url.set_path(path);
        url.set_query(None);
        url
    }

    /// Only the registry itself gets the credentials, wherever it says an upload goes on.
    fn request(&self, method: Method, url: Url) -> RequestBuilder {
        let is_own = url.origin() == self.base.origin();
        let request = self.http.request(method, url);
        if is_own { request.basic_auth(&self.username, Some(self.password.expose())) } else { request }
    }
}

/// A blob and where its bytes are.
#[derive(Debug, Clone)]
struct Blob {
    digest: Digest,
    size: u64,
    content: Content,
}

#[derive(Debug, Clone)]
enum Content {
    Memory(Bytes),
    File(PathBuf),
}

fn blobs_of(image: &BuiltImage) -> Vec<Blob> {
    let blob = |descriptor: &Descriptor, content| Blob { digest: descriptor.digest, size: descriptor.size, content };
    let layers = image.layers.iter().map(|layer| blob(&layer.descriptor, Content::File(layer.path.clone())));
    let config = blob(&image.config_descriptor, Content::Memory(image.config.clone()));
    // Largest first, so that the longest upload does not begin last.
    let mut blobs: Vec<Blob> = layers.chain([config]).collect();
    blobs.sort_by_key(|blob| (std::cmp::Reverse(blob.size), blob.digest));
    blobs.dedup_by_key(|blob| blob.digest);
    blobs
}

struct Push<'a> {
    client: &'a RegistryClient,
    repository: &'a str,
    progress: &'a (dyn Fn(PushEvent) + Send + Sync),
}

impl Push<'_> {
    /// Sends the blob unless the registry has it; its size if it was sent.
    async fn ensure(&self, blob: Blob) -> Result<Option<u64>, PushError> {
        if retrying(|| self.exists(&blob)).await? {
            (self.progress)(PushEvent::Exists { digest: blob.digest, size: blob.size });
            return Ok(None);
        }
        let session = Mutex::new(None);
        retrying(|| self.upload(&blob, &session)).await?;
        (self.progress)(PushEvent::Uploaded { digest: blob.digest });
        Ok(Some(blob.size))
    }

    async fn exists(&self, blob: &Blob) -> Result<bool, Failure> {
        let url = self.client.url(&format!("/v2/{}/blobs/{}", self.repository, blob.digest));
        let response = self.send(self.client.request(Method::HEAD, url).timeout(REQUEST_TIMEOUT)).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            // One of another length is damaged there: it is sent again.
            status if status.is_success() => {
                Ok(number_in(&response, &CONTENT_LENGTH).is_none_or(|size| size == blob.size))
            }
            _ => Err(refusal(response).await),
        }
    }

    /// POST for a session, then one PUT with everything: two requests that every registry understands. A session that an
    /// earlier attempt left in `kept` goes on where it stands, or makes way for a new one.
    async fn upload(&self, blob: &Blob, kept: &Mutex<Option<Url>>) -> Result<(), Failure> {
        let earlier = kept.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (session, offset) = match earlier {
            None => (self.begin().await?, 0),
            Some(earlier) => match self.stands_at(&earlier, blob.size).await? {
                Some(stands) => stands,
                // Perhaps only the answer was lost.
                None if self.exists(blob).await? => return Ok(()),
                None => (self.begin().await?, 0),
            },
        };
        *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        self.finish(blob, session, offset).await
    }

    async fn begin(&self) -> Result<Url, Failure> {
        let url = self.client.url(&format!("/v2/{}/blobs/uploads/", self.repository));
        let request = self.client.request(Method::POST, url.clone()).header(CONTENT_LENGTH, 0);
        let response = accepted(self.send(request.timeout(REQUEST_TIMEOUT)).await?, StatusCode::ACCEPTED).await?;
        Ok(upload_location(&url, &response)?)
    }

    /// Where an upload goes on, and behind how many bytes; none when it cannot, which the registry is then told.
    async fn stands_at(&self, session: &Url, size: u64) -> Result<Option<(Url, u64)>, PushError> {
        let ask = |method| self.send(self.client.request(method, session.clone()).timeout(RESUME_TIMEOUT));
        match ask(Method::GET).await {
            Ok(response) if response.status() == StatusCode::NOT_FOUND => return Ok(None),
            Ok(response) if response.status().is_success() => {
                if let Some(offset) = offset_in(&response).filter(|&offset| offset <= size) {
                    let session = upload_location(session, &response).unwrap_or_else(|_| session.clone());
                    return Ok(Some((session, offset)));
                }
            }
            // The registry itself is away: the session may well be there when it is back.
            Err(PushError::Transport { registry, source }) if source.is_connect() => {
                return Err(PushError::Transport { registry, source });
            }
            Ok(_) | Err(_) => {}
        }
        let _ = ask(Method::DELETE).await; // else it ends by itself
        Ok(None)
    }

    /// One PUT with all from `offset` on.
    async fn finish(&self, blob: &Blob, mut session: Url, offset: u64) -> Result<(), Failure> {
        session.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let (report, mut reports) = mpsc::unbounded_channel();
        let mut request = self
            .client
            .request(Method::PUT, session)
            .header(CONTENT_TYPE, "application/octet-stream")
            .header(CONTENT_LENGTH, blob.size - offset);
        (self.progress)(PushEvent::Uploading { digest: blob.digest, size: blob.size });
        if offset > 0 {
            (self.progress)(PushEvent::Progress { digest: blob.digest, bytes: offset });
            // A range of nothing cannot be said.
            if offset < blob.size {
                request = request.header(CONTENT_RANGE, format!("{offset}-{}", blob.size - 1));
            }
        }
        let mut exchange = pin!(self.send(request.body(body_of(blob, offset, report).await?)));
        let response = loop {
            tokio::select! {
                response = &mut exchange => break response?,
                Some(bytes) = reports.recv() => (self.progress)(PushEvent::Progress { digest: blob.digest, bytes }),
            }
        };
        accepted(response, StatusCode::CREATED).await.map(drop)
    }

    async fn manifest(&self, image: &BuiltImage, tag: &str) -> Result<(), PushError> {
        let manifest = Manifest::parse(&image.manifest)
            .map_err(|error| PushError::Protocol { expected: "a manifest of ours to push", got: error.to_string() })?;
        retrying(|| self.put_manifest(image, tag, &manifest.media_type)).await?;
        (self.progress)(PushEvent::Manifest { digest: image.digest });
        Ok(())
    }

    async fn put_manifest(&self, image: &BuiltImage, tag: &str, media_type: &str) -> Result<(), Failure> {
        let url = self.client.url(&format!("/v2/{}/manifests/{tag}", self.repository));
        let request = self
            .client
            .request(Method::PUT, url)
            .header(CONTENT_TYPE, media_type)
            .timeout(REQUEST_TIMEOUT)
            .body(image.manifest.clone());
        let response = accepted(self.send(request).await?, StatusCode::CREATED).await?;
        match response.headers().get(CONTENT_DIGEST).map(|value| String::from_utf8_lossy(value.as_bytes())) {
            Some(stored) if stored != image.digest.to_string() => {
                Err(PushError::Protocol { expected: "the manifest's own digest", got: stored.into_owned() }.into())
            }
            _ => Ok(()),
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, PushError> {
        request.send().await.map_err(|source| PushError::Transport {
            registry: self.client.base.authority().to_owned(),
            source: source.without_url(),
        })
    }
}

/// The blob's bytes from `offset` on, read from disk as the network takes them; reports how many were taken.
async fn body_of(blob: &Blob, offset: u64, report: mpsc::UnboundedSender<u64>) -> Result<reqwest::Body, PushError> {
    match &blob.content {
        Content::Memory(bytes) => {
            Ok(bytes.slice(usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len())..).into())
        }
        Content::File(path) => {
            let read = |source| PushError::Read { path: path.clone(), source };
            let mut file = tokio::fs::File::open(path).await.map_err(read)?;
            file.seek(io::SeekFrom::Start(offset)).await.map_err(read)?;
            let stream = ReaderStream::with_capacity(file, READ_BUFFER).inspect_ok(move |chunk| {
                let _ = report.send(chunk.len() as u64); // nobody listens any more: the push was dropped
            });
            Ok(reqwest::Body::wrap_stream(stream))
        }
    }
}

/// An error with what the registry said about trying again.
struct Failure {
    error: PushError,
    retry_after: Option<Duration>,
}

impl From<PushError> for Failure {
    fn from(error: PushError) -> Self {
        Self { error, retry_after: None }
    }
}

async fn retrying<T, F: Future<Output = Result<T, Failure>>>(attempt: impl Fn() -> F) -> Result<T, PushError> {
    let mut backoff = FIRST_BACKOFF;
    for _ in 1..ATTEMPTS {
        match attempt().await {
            Err(failure) if failure.error.is_transient() => {
                let wait = failure.retry_after.unwrap_or(backoff).min(LONGEST_BACKOFF);
                tracing::debug!(error = %failure.error, ?wait, "a registry request failed and will be repeated");
                tokio::time::sleep(wait).await;
                backoff *= 2;
            }
            other => return other.map_err(|failure| failure.error),
        }
    }
    attempt().await.map_err(|failure| failure.error)
}

async fn accepted(response: Response, expected: StatusCode) -> Result<Response, Failure> {
    match response.status() {
        status if status == expected => Ok(response),
        status if status.is_success() || status.is_redirection() => {
            let expected = "201 Created or 202 Accepted";
            Err(PushError::Protocol { expected, got: status.to_string() }.into())
        }
        _ => Err(refusal(response).await),
    }
}

async fn refusal(response: Response) -> Failure {
    let status = response.status();
    let retry_after = number_in(&response, &RETRY_AFTER).map(Duration::from_secs);
    let message = error_message(response).await;
    let error = match status {
        StatusCode::UNAUTHORIZED => PushError::Unauthorized,
        StatusCode::FORBIDDEN => PushError::Forbidden(message),
        StatusCode::NOT_FOUND => PushError::NotFound(message),
        StatusCode::PAYLOAD_TOO_LARGE => PushError::TooLarge(message),
        StatusCode::INSUFFICIENT_STORAGE => PushError::RegistryFull(message),
        _ => PushError::Refused { status: status.as_u16(), message },
    };
    Failure { error, retry_after }
}

/// What the registry says in its error document, or the start of whatever it sent instead.
async fn error_message(mut response: Response) -> String {
    #[derive(serde::Deserialize)]
    struct Errors {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        code: String,
        #[serde(default)]
        message: String,
    }
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > MAX_ERROR_BODY {
            break;
        }
    }
    match serde_json::from_slice::<Errors>(&body) {
        Ok(Errors { errors }) if !errors.is_empty() => {
            let lines: Vec<_> = errors.iter().map(|entry| format!("{} ({})", entry.message, entry.code)).collect();
            lines.join("; ")
        }
        _ => String::from_utf8_lossy(&body).chars().take(300).collect(),
    }
}

fn number_in(response: &Response, header: &HeaderName) -> Option<u64> {
    response.headers().get(header)?.to_str().ok()?.parse().ok()
}

/// Behind `Range: 0-LAST`. `0-0` may mean one byte or none, so it says nothing.
fn offset_in(response: &Response) -> Option<u64> {
    let range = response.headers().get(RANGE)?.to_str().ok()?;
    let last: u64 = range.trim_start_matches("bytes=").strip_prefix("0-")?.parse().ok()?;
    (last > 0).then_some(last + 1)
}

fn upload_location(asked: &Url, response: &Response) -> Result<Url, PushError> {
    let header = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
    header
        .and_then(|location| asked.join(location).ok())
        .filter(|url| matches!(url.scheme(), "http" | "https"))
        .ok_or_else(|| PushError::Protocol {
            expected: "the address of an upload in `Location`",
            got: header.unwrap_or("none").chars().take(200).collect(),
        })
}

const CONTENT_DIGEST: &str = "docker-content-digest";
const READ_BUFFER: usize = 1 << 17;
const MAX_ERROR_BODY: usize = 64 << 10;
