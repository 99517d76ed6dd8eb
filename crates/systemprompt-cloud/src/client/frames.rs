//! Server-sent events that survive the connection: after a break the stream is asked for again with the last id seen
//! (`Last-Event-ID`, HTML standard 9.2), with growing pauses, until the server refuses or stays away too long.

use super::CloudApiClient;
use crate::error::{CloudError, TransportFailure};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _, stream, stream::BoxStream};
use reqwest::{Method, header};
use sse_stream::{Sse, SseStream};
use std::time::Duration;
use tokio::time::Instant;

/// Four keep-alives of the server: whoever sends not even a comment for longer is gone.
const SILENCE: Duration = Duration::from_mins(1);
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long a server may stay away.
const GIVE_UP_AFTER: Duration = Duration::from_mins(5);
/// A connection that lived this long was a good one, also when nothing happened on it.
const GOOD_AFTER: Duration = Duration::from_secs(10);

type Frames = BoxStream<'static, Result<Sse, sse_stream::Error>>;

pub(super) struct FrameStream {
    client: CloudApiClient,
    path: String,
    last_id: Option<String>,
    state: State,
    pauses: Pauses,
}

enum State {
    Apart,
    Connected { frames: Frames, since: Instant },
}

#[derive(Debug, thiserror::Error)]
enum StreamBroken {
    #[error("{0}")]
    Transport(reqwest::Error),
    #[error("the event stream fell silent")]
    Silent,
}

/// When to try again, and when to stop trying. Pure but for the clock it is given.
#[derive(Debug, Clone)]
struct Pauses {
    pause: Duration,
    apart_since: Option<Instant>,
}

impl Pauses {
    const fn new() -> Self {
        Self { pause: FIRST_PAUSE, apart_since: None }
    }

    /// How long to wait after a failure at `now`; none when it is time to give up.
    fn after_failure(&mut self, now: Instant) -> Option<Duration> {
        let since = *self.apart_since.get_or_insert(now);
        if now.duration_since(since) >= GIVE_UP_AFTER {
            return None;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Some(pause)
    }
}

impl FrameStream {
    pub(super) fn new(client: CloudApiClient, path: String) -> Self {
        Self { client, path, last_id: None, state: State::Apart, pauses: Pauses::new() }
    }

    /// The next frame with data. Dropping the future loses nothing: the next call goes on where it stopped.
    pub(super) async fn next(&mut self) -> Result<Sse, CloudError> {
        loop {
            let broken = match &mut self.state {
                State::Apart => match self.connect().await {
                    Ok(frames) => {
                        self.state = State::Connected { frames, since: Instant::now() };
                        continue;
                    }
                    Err(error) if !error.is_transient() => return Err(error),
                    Err(error) => error,
                },
                State::Connected { frames, since } => {
                    let since = *since;
                    match frames.next().await {
                        Some(Ok(frame)) => {
                            self.pauses = Pauses::new();
                            self.last_id = frame.id.clone().or(self.last_id.take());
                            if frame.data.is_some() {
                                return Ok(frame);
                            }
                            continue;
                        }
                        ended => {
                            if since.elapsed() >= GOOD_AFTER {
                                self.pauses = Pauses::new();
                            }
                            let reason = ended.and_then(Result::err).map(|error| error.to_string());
                            self.broken(reason.as_deref().unwrap_or("the event stream ended"))
                        }
                    }
                }
            };
            self.state = State::Apart;
            tracing::debug!(error = %broken, path = self.path, "the event stream broke; asking again");
            let Some(pause) = self.pauses.after_failure(Instant::now()) else { return Err(broken) };
            tokio::time::sleep(pause).await;
        }
    }

    async fn connect(&self) -> Result<Frames, CloudError> {
        let mut request = self.client.request(Method::GET, &self.path).header(header::ACCEPT, "text/event-stream");
        if let Some(id) = &self.last_id {
            request = request.header("last-event-id", id);
        }
        // The head must come soon; the body lasts as long as it lasts.
        let Ok(sent) = tokio::time::timeout(SILENCE, self.client.send(request)).await else {
            return Err(self.broken("no answer"));
        };
        let answer = sent?;
        let content_type = answer.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !content_type.is_some_and(|value| value.starts_with("text/event-stream")) {
            let found = content_type.unwrap_or("no content type").to_owned();
            return Err(self.client.unexpected(answer.status().as_u16(), &found));
        }
        Ok(SseStream::from_bytes_stream(until_silent(answer.bytes_stream())).boxed())
    }

    fn broken(&self, reason: &str) -> CloudError {
        CloudError::Unreachable {
            api_url: self.client.api_url.clone(),
            reason: reason.to_owned(),
            kind: TransportFailure::Broken,
        }
    }
}

fn until_silent(
    bytes: impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + 'static,
) -> BoxStream<'static, Result<Bytes, StreamBroken>> {
    let each = async |mut bytes: BoxStream<'static, Result<Bytes, reqwest::Error>>| {
        let next = match tokio::time::timeout(SILENCE, bytes.next()).await {
            Ok(next) => next?.map_err(StreamBroken::Transport),
            Err(_) => Err(StreamBroken::Silent),
        };
        Some((next, bytes))
    };
    stream::unfold(bytes.boxed(), each).boxed()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_and_end() {
        let mut pauses = Pauses::new();
        let start = Instant::now();
        let first: Vec<_> = (0..6).map_while(|_| pauses.after_failure(start)).map(|pause| pause.as_millis()).collect();
        assert_eq!(first, [200, 400, 800, 1600, 3200, 5000]);
        assert!(pauses.after_failure(start + Duration::from_secs(299)).is_some());
        assert!(pauses.after_failure(start + Duration::from_mins(5)).is_none());
    }
}
