use super::frames::FrameStream;
use crate::error::CloudError;
use serde::de::DeserializeOwned;
use sse_stream::Sse;
use std::fmt;
use systemprompt_contract::{Event, EventId, LogLine};

/// Events of a tenant or a checkout: complete, in order, each once, over any number of broken connections.
pub struct EventStream {
    frames: FrameStream,
    last: EventId,
}

impl EventStream {
    pub(super) fn new(frames: FrameStream) -> Self {
        Self { frames, last: EventId(0) }
    }

    /// The next event; never ends by itself. May be cancelled and called again without losing one.
    ///
    /// # Errors
    /// [`CloudError`] when the server refuses the stream, or cannot be reached for five minutes.
    pub async fn next(&mut self) -> Result<(EventId, Event), CloudError> {
        loop {
            let frame = self.frames.next().await?;
            let id = frame.id.as_deref().and_then(|id| id.parse().ok()).map(EventId);
            // A server may repeat the frame that was seen last.
            let Some(id) = id.filter(|id| *id > self.last) else { continue };
            self.last = id;
            if let Some(event) = read_event(&frame) {
                return Ok((id, event));
            }
        }
    }
}

/// An instance's lines as they come.
pub struct LogFollower {
    frames: FrameStream,
}

impl LogFollower {
    pub(super) fn new(frames: FrameStream) -> Self {
        Self { frames }
    }

    /// The next line; never ends by itself. May be cancelled and called again without losing one.
    ///
    /// # Errors
    /// [`CloudError`] when the server refuses the stream, or cannot be reached for five minutes.
    pub async fn next(&mut self) -> Result<LogLine, CloudError> {
        loop {
            let frame = self.frames.next().await?;
            if frame.event.as_deref() == Some("log")
                && let Some(line) = read_data(&frame)
            {
                return Ok(line);
            }
        }
    }
}

/// None for a name or a shape this client does not know: a newer server may say more.
fn read_event(frame: &Sse) -> Option<Event> {
    match frame.event.as_deref()? {
        "provisioning" => read_data(frame).map(Event::Provisioning),
        "deployment" => read_data(frame).map(Event::Deployment),
        _ => None,
    }
}

fn read_data<T: DeserializeOwned>(frame: &Sse) -> Option<T> {
    let data = frame.data.as_deref()?;
    serde_json::from_str(data).inspect_err(|error| tracing::debug!(%error, data, "a frame was not understood")).ok()
}

impl fmt::Debug for EventStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventStream").field("last", &self.last).finish_non_exhaustive()
    }
}

impl fmt::Debug for LogFollower {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogFollower").finish_non_exhaustive()
    }
}
