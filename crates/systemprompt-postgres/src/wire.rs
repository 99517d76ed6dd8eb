//! As much of PostgreSQL's protocol (version 3.0) as it takes to know that a server answers.

use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

const PROTOCOL: i32 = 3 << 16;
const TIMEOUT: Duration = Duration::from_secs(5);
/// Nothing a server says at its door is longer.
const LONGEST_MESSAGE: usize = 1 << 20;

/// Why a conversation failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// No connection, or it broke.
    #[error("the socket does not answer: {0}")]
    Io(#[from] io::Error),
    /// The server's own words.
    #[error("{message} ({code})")]
    Refused {
        /// SQLSTATE.
        code: String,
        /// One sentence.
        message: String,
    },
    /// It wants a password: `pg_hba.conf` is not the one we wrote.
    #[error("the server asked for authentication {0}, expected none beyond the peer's uid")]
    Authentication(i32),
    /// It is no PostgreSQL server.
    #[error("the server sent a message of {0} bytes")]
    TooLong(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Door,
    #[cfg(any(test, feature = "testing"))]
    Inside,
}

/// A connection that has passed authentication.
pub(crate) struct Session(UnixStream);

impl Session {
    /// Connects by peer authentication and waits until the server is ready for queries.
    pub(crate) fn open(socket: &Path, user: &str, database: &str) -> Result<Self, WireError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut session = Self(stream);
        let mut body = PROTOCOL.to_be_bytes().to_vec();
        for text in ["user", user, "database", database, ""] {
            body.extend_from_slice(text.as_bytes());
            body.push(0);
        }
        session.0.write_all(&frame(None, &body))?;
        session.until_ready(Stage::Door)?;
        Ok(session)
    }

    /// Runs statements and waits for their end; rows are thrown away.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn execute(&mut self, sql: &str) -> Result<(), WireError> {
        self.0.set_read_timeout(Some(Duration::from_mins(1)))?;
        let mut body = sql.as_bytes().to_vec();
        body.push(0);
        self.0.write_all(&frame(Some(b'Q'), &body))?;
        self.until_ready(Stage::Inside)
    }

    fn until_ready(&mut self, stage: Stage) -> Result<(), WireError> {
        let mut refused = None;
        loop {
            let (kind, body) = self.read()?;
            match kind {
                b'R' => match body.first_chunk().map_or(-1, |code| i32::from_be_bytes(*code)) {
                    0 => {}
                    other => return Err(WireError::Authentication(other)),
                },
                // At the door an error is the last word; inside, the server still says when it is ready again.
                b'E' if stage == Stage::Door => return Err(refusal(&body)),
                b'E' => {
                    refused.get_or_insert_with(|| refusal(&body));
                }
                b'Z' => return refused.map_or(Ok(()), Err),
                _ => {}
            }
        }
    }

    fn read(&mut self) -> Result<(u8, Vec<u8>), WireError> {
        let mut head = [0; 5];
        self.0.read_exact(&mut head)?;
        let [kind, length @ ..] = head;
        let length = usize::try_from(i32::from_be_bytes(length)).unwrap_or(0).saturating_sub(4);
        if length > LONGEST_MESSAGE {
            return Err(WireError::TooLong(length));
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((kind, body))
    }
}

fn frame(kind: Option<u8>, body: &[u8]) -> Vec<u8> {
    let length = i32::try_from(body.len() + 4).expect("our own messages are short");
    kind.into_iter().chain(length.to_be_bytes()).chain(body.iter().copied()).collect()
}

/// Fields of an `ErrorResponse`: a letter and a text each, ended by a zero.
fn refusal(body: &[u8]) -> WireError {
    let field = |letter: u8| {
        let found = body.split(|byte| *byte == 0).find(|field| field.first() == Some(&letter));
        found.map(|field| String::from_utf8_lossy(&field[1..]).into_owned()).unwrap_or_default()
    };
    WireError::Refused { code: field(b'C'), message: field(b'M') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_read_field_by_field() {
        let error = refusal(b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0Fpostmaster.c\0\0");
        assert_eq!(error.to_string(), "the database system is starting up (57P03)");
        assert_eq!(refusal(b"").to_string(), " ()");
    }
}
