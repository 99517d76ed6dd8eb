//! Reading an instance's output file, and giving its old part back to the disk.
//!
//! The file only grows; what is old is punched out of it, so that offsets, and with them cursors, stay what they
//! are. A reader whose cursor lies in the hole goes on at the first whole line after it.

use super::times::{self, Times};
use crate::{DriverError, LogEntry, LogStart};
use futures_util::{StreamExt, stream, stream::BoxStream};
use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// Longest piece of a line that is given at once.
const MAX_LINE: usize = 64 << 10;
/// How much is read at a time.
const CHUNK: usize = 256 << 10;
/// Pause between two looks at the end of the file.
const FOLLOW: Duration = Duration::from_millis(50);
/// A line without line feed is given after this time all the same: it may be a prompt, or a program's last word.
const PARTIAL: Duration = Duration::from_secs(1);
/// Holes start and end at these; a multiple of every usual block size.
const HOLE_ALIGNMENT: u64 = 64 << 10;

/// The stream behind [`ComputeDriver::logs`](crate::ComputeDriver::logs).
pub(crate) fn stream(
    output: Result<PathBuf, DriverError>,
    from: LogStart,
    follow: bool,
) -> BoxStream<'static, Result<LogEntry, DriverError>> {
    let state = Some(State::Opening { output, from, follow });
    stream::unfold(state, |state| async move { next(state?).await }).flat_map(stream::iter).boxed()
}

type Batch = Vec<Result<LogEntry, DriverError>>;

enum State {
    Opening { output: Result<PathBuf, DriverError>, from: LogStart, follow: bool },
    Reading { reader: Reader, follow: bool },
}

/// The next entries and what comes after them.
async fn next(mut state: State) -> Option<(Batch, Option<State>)> {
    loop {
        let result = super::blocking(move || step(state)).await;
        match result {
            Err(error) => return Some((vec![Err(error)], None)),
            Ok((batch, after)) if !batch.is_empty() => return Some((batch, after)),
            Ok((_, None)) => return None,
            Ok((_, Some(after))) => {
                state = after;
                tokio::time::sleep(FOLLOW).await;
            }
        }
    }
}

/// One look at the file. An empty batch with a state means: nothing new yet.
fn step(state: State) -> Result<(Batch, Option<State>), DriverError> {
    let (mut reader, follow) = match state {
        State::Reading { reader, follow } => (reader, follow),
        State::Opening { output, from, follow } => {
            let path = output.clone()?;
            match File::open(&path) {
                // Not started yet: there is a directory without output.
                Err(error) if error.kind() == ErrorKind::NotFound && path.parent().is_some_and(Path::exists) => {
                    let state = follow.then_some(State::Opening { output, from, follow });
                    return Ok((Vec::new(), state));
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    return Err(DriverError::NotFound("the instance has no output: it was removed".to_owned()));
                }
                file => (Reader::new(file?, Times::open(&times::beside(&path)).ok(), from)?, follow),
            }
        }
    };
    let mut entries = reader.lines()?;
    if entries.is_empty() {
        if !follow {
            return Ok((reader.rest().into_iter().map(Ok).collect(), None));
        }
        if reader.is_removed()? {
            return Ok((Vec::new(), None));
        }
        if reader.last_growth.elapsed() >= PARTIAL {
            entries.extend(reader.rest());
        }
    }
    Ok((entries.into_iter().map(Ok).collect(), Some(State::Reading { reader, follow })))
}

/// Reads lines from a growing file.
struct Reader {
    file: File,
    times: Option<Times>,
    /// Offset of the first byte of `pending`.
    at: u64,
    /// Read and not yet a line.
    pending: VecDeque<u8>,
    last_growth: Instant,
}

impl Reader {
    fn new(file: File, times: Option<Times>, from: LogStart) -> io::Result<Self> {
        let at = match from {
            LogStart::Beginning => 0,
            LogStart::After(cursor) => cursor,
            LogStart::Tail(lines) => tail(&file, lines)?,
        };
        Ok(Self { file, times, at, pending: VecDeque::new(), last_growth: Instant::now() })
    }

    /// Whole lines that are there now, up to a chunk's worth.
    fn lines(&mut self) -> io::Result<Vec<LogEntry>> {
        let mut found = Vec::new();
        while found.is_empty() {
            if self.fill()? == 0 {
                break;
            }
            while let Some(entry) = self.line() {
                found.push(entry);
            }
        }
        Ok(found)
    }

    /// Reads on; skips a hole together with the line whose beginning went with it.
    fn fill(&mut self) -> io::Result<usize> {
        let mut buffer = vec![0; CHUNK];
        loop {
            let next = self.at + self.pending.len() as u64;
            let count = self.file.read_at(&mut buffer, next)?;
            // Asked after reading: holes grow from the front, so with data at its beginning all of it was data.
            let data = first_data(&self.file, next)?;
            if data == next {
                self.pending.extend(&buffer[..count]);
                if count > 0 {
                    self.last_growth = Instant::now();
                }
                return Ok(count);
            }
            self.pending.clear();
            self.at = line_after(&self.file, data)?;
        }
    }

    fn line(&mut self) -> Option<LogEntry> {
        match self.pending.iter().take(MAX_LINE + 1).position(|byte| *byte == b'\n') {
            Some(length) => Some(self.take(length, 1)),
            None if self.pending.len() > MAX_LINE => Some(self.take(MAX_LINE, 0)),
            None => None,
        }
    }

    /// What is there of a line that has no end yet.
    fn rest(&mut self) -> Option<LogEntry> {
        (!self.pending.is_empty()).then(|| self.take(self.pending.len(), 0))
    }

    fn take(&mut self, length: usize, line_feed: usize) -> LogEntry {
        let bytes: Vec<u8> = self.pending.drain(..length + line_feed).take(length).collect();
        let written = self.times.as_mut().and_then(|times| times.at(self.at));
        self.at += (length + line_feed) as u64;
        LogEntry { cursor: self.at, written, text: String::from_utf8_lossy(&bytes).into_owned() }
    }

    fn is_removed(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.nlink() == 0)
    }
}

/// Offset of the last `lines` lines.
fn tail(file: &File, lines: usize) -> io::Result<u64> {
    let end = file.metadata()?.len();
    let mut wanted = lines;
    let mut at = end;
    // What was given back to the disk may be a thousand times what is left.
    let floor = first_data(file, 0)?;
    let mut buffer = vec![0; CHUNK];
    while at > floor {
        let start = at.saturating_sub(CHUNK as u64).max(floor);
        let part = &mut buffer[..usize::try_from(at - start).expect("at most a chunk")];
        file.read_exact_at(part, start)?;
        for (offset, byte) in part.iter().enumerate().rev() {
            let position = start + offset as u64;
            // The line feed at the very end ends the last line and does not begin one.
            if *byte == b'\n' && position + 1 < end {
                if wanted <= 1 {
                    return Ok(if lines == 0 { end } else { position + 1 });
                }
                wanted -= 1;
            }
        }
        at = start;
    }
    Ok(if lines == 0 { end } else { 0 })
}

/// The first byte at or after `from` that is not in a hole; the end of the file when there is none.
fn first_data(file: &File, from: u64) -> io::Result<u64> {
    match seek(file, SeekFrom::Data(from)) {
        Ok(offset) => Ok(offset),
        // At or past the end; or a file system that knows no holes and so cannot have punched any.
        Err(Errno::NXIO | Errno::INVAL) => Ok(from),
        Err(error) => Err(error.into()),
    }
}

/// The beginning of the first whole line after `start`.
fn line_after(file: &File, start: u64) -> io::Result<u64> {
    let mut buffer = vec![0; CHUNK];
    let mut at = start;
    loop {
        let count = file.read_at(&mut buffer, at)?;
        if count == 0 {
            return Ok(start);
        }
        match buffer[..count].iter().position(|byte| *byte == b'\n') {
            Some(position) => return Ok(at + position as u64 + 1),
            None => at += count as u64,
        }
    }
}

/// Gives everything but the last `keep` bytes back to the disk. Offsets do not change.
pub(crate) fn trim(output: &Path, keep: u64) -> io::Result<()> {
    let file = match OpenOptions::new().write(true).open(output) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    let meta = file.metadata()?;
    let hole = meta.len().saturating_sub(keep) / HOLE_ALIGNMENT * HOLE_ALIGNMENT;
    // Nothing to do while the file takes no more room than it may; blocks are of 512 bytes.
    if hole == 0 || meta.blocks() * 512 <= keep + 2 * HOLE_ALIGNMENT {
        return Ok(());
    }
    punch(&file, hole)?;
    match OpenOptions::new().read(true).write(true).open(times::beside(output)) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        marks => {
            let marks = marks?;
            punch(&marks, times::unneeded(&marks, hole) / HOLE_ALIGNMENT * HOLE_ALIGNMENT)
        }
    }
}

fn punch(file: &File, hole: u64) -> io::Result<()> {
    if hole == 0 {
        return Ok(());
    }
    match fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, hole) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => Err(io::Error::new(
            ErrorKind::Unsupported,
            "the data directory's file system cannot punch holes, so output grows without bound: use ext4, xfs or btrfs",
        )),
        Err(error) => Err(error.into()),
    }
}

/// The last thing bwrap itself said in the output, when that is its end.
pub(crate) fn sandbox_said(output: &Path) -> Option<String> {
    let file = File::open(output).ok()?;
    let start = tail(&file, 1).ok()?;
    let mut buffer = vec![0; 1024];
    let count = file.read_at(&mut buffer, start).ok()?;
    let line = String::from_utf8_lossy(&buffer[..count]);
    line.trim_end().strip_prefix("bwrap: ").map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(content: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("output");
        std::fs::write(&path, content).expect("content");
        (directory, path)
    }

    async fn read(path: &Path, from: LogStart) -> Vec<LogEntry> {
        stream(Ok(path.to_owned()), from, false).map(|entry| entry.expect("entry")).collect().await
    }

    fn texts(entries: &[LogEntry]) -> Vec<&str> {
        entries.iter().map(|entry| entry.text.as_str()).collect()
    }

    #[tokio::test]
    async fn every_start_gives_the_lines_behind_it() {
        let (_directory, path) = file(b"one\ntwo\n\nthree");
        let all = read(&path, LogStart::Beginning).await;
        assert_eq!(texts(&all), ["one", "two", "", "three"]);
        assert_eq!(all.iter().map(|entry| entry.cursor).collect::<Vec<_>>(), [4, 8, 9, 14]);
        for (at, entry) in all.iter().enumerate() {
            assert_eq!(read(&path, LogStart::After(entry.cursor)).await, all[at + 1..], "{entry:?}");
        }
        for count in 0..6 {
            let expected = &all[all.len().saturating_sub(count)..];
            assert_eq!(read(&path, LogStart::Tail(count)).await, expected, "{count}");
        }
        assert!(read(&path, LogStart::After(1000)).await.is_empty());
    }

    #[tokio::test]
    async fn a_long_line_comes_in_pieces_and_nothing_is_lost() {
        let mut content = vec![b'x'; MAX_LINE * 2 + 5];
        content.extend(b"\nend\n");
        let (_directory, path) = file(&content);
        let entries = read(&path, LogStart::Beginning).await;
        assert_eq!(entries.iter().map(|entry| entry.text.len()).collect::<Vec<_>>(), [MAX_LINE, MAX_LINE, 5, 3]);
    }

    #[tokio::test]
    async fn a_trimmed_file_takes_little_room_and_keeps_its_cursors() {
        use std::fmt::Write as _;
        let mut content = String::new();
        for number in 0..200_000 {
            writeln!(content, "line {number:08}").expect("text");
        }
        let (_directory, path) = file(content.as_bytes());
        let before = read(&path, LogStart::Beginning).await;
        trim(&path, 512 << 10).expect("trim");
        let meta = std::fs::metadata(&path).expect("meta");
        assert_eq!(meta.len(), content.len() as u64);
        assert!(meta.blocks() * 512 <= (512 << 10) + 2 * HOLE_ALIGNMENT, "{} blocks", meta.blocks());
        let after = read(&path, LogStart::Beginning).await;
        assert!(after.len() > 512 * 1024 / 14 - 1, "{}", after.len());
        assert_eq!(after, before[before.len() - after.len()..], "whole lines with their old cursors");
        assert_eq!(read(&path, LogStart::After(before[10].cursor)).await, after, "a cursor in the hole");
        assert_eq!(read(&path, LogStart::Tail(before.len())).await, after, "more lines than there are");
        let late = before[before.len() - 3].cursor;
        assert_eq!(texts(&read(&path, LogStart::After(late)).await), ["line 00199998", "line 00199999"]);
    }

    #[test]
    fn a_line_whose_end_was_trimmed_away_is_left_out_whole() {
        let (_directory, path) = file(b"begun, ");
        let mut reader = Reader::new(File::open(&path).expect("open"), None, LogStart::Beginning).expect("reader");
        assert!(reader.lines().expect("lines").is_empty());
        let mut file = OpenOptions::new().append(true).open(&path).expect("open");
        file.write_all(&b"0123456789abcdef\n".repeat(20_000)).expect("append");
        trim(&path, 64 << 10).expect("trim");
        let lines = reader.lines().expect("lines");
        assert!(lines.len() > 1000 && lines.iter().all(|line| line.text == "0123456789abcdef"), "{:?}", lines.first());
    }

    #[tokio::test]
    async fn following_sees_what_is_appended_and_ends_with_the_file() {
        let (_directory, path) = file(b"one\nhal");
        let mut lines = stream(Ok(path.clone()), LogStart::Beginning, true);
        assert_eq!(lines.next().await.expect("line").expect("entry").text, "one");
        let mut file = OpenOptions::new().append(true).open(&path).expect("open");
        file.write_all(b"f\n").expect("append");
        assert_eq!(lines.next().await.expect("line").expect("entry").text, "half");
        file.write_all(b"prompt> ").expect("append");
        assert_eq!(lines.next().await.expect("line").expect("entry").text, "prompt> ");
        std::fs::remove_file(&path).expect("remove");
        assert!(lines.next().await.is_none());
    }

    #[test]
    fn a_tail_does_not_read_what_was_given_back() {
        let (_directory, path) = file(b"");
        let mut file = OpenOptions::new().read(true).write(true).open(&path).expect("open");
        file.set_len(1 << 42).expect("a hole of four tebibytes");
        io::Seek::seek(&mut file, io::SeekFrom::End(0)).expect("seek");
        file.write_all(b"one\ntwo\n").expect("lines");
        let begun = Instant::now();
        tail(&file, 5).expect("tail");
        assert!(begun.elapsed() < Duration::from_secs(20), "hours, if it went through the hole");
    }

    #[test]
    fn the_sandbox_is_quoted_only_when_it_spoke_last() {
        let (_directory, path) = file(b"hello\nbwrap: execvp /no: No such file or directory\n");
        assert_eq!(sandbox_said(&path).as_deref(), Some("execvp /no: No such file or directory"));
        let (_directory, path) = file(b"bwrap: x\nhello\n");
        assert_eq!(sandbox_said(&path), None);
    }
}
