//! When output was written: marks beside an instance's output file, at most one a second.
//!
//! A mark is an offset of the output and the time of day when the output had come that far, in milliseconds since
//! 1970: two numbers of eight bytes, little-endian. What lies between two marks was written within a second of the
//! first.

use chrono::{DateTime, Utc};
use std::{
    fs::File,
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

type Bytes = [u8; 16];
const MARK: u64 = size_of::<Bytes>() as u64;
const BETWEEN: Duration = Duration::from_secs(1);

/// Where the marks of an output file are.
pub(crate) fn beside(output: &Path) -> PathBuf {
    output.with_file_name("times")
}

/// Makes the marks, in the writer of the output.
#[derive(Debug)]
pub(crate) struct Marker {
    marks: File,
    last: Option<Instant>,
}

impl Marker {
    /// `marks` appends, and nobody else writes to it.
    pub(crate) const fn new(marks: File) -> Self {
        Self { marks, last: None }
    }

    /// To be called before more is written to `output`.
    pub(crate) fn note(&mut self, output: &File) -> io::Result<()> {
        if self.last.is_some_and(|last| last.elapsed() < BETWEEN) {
            return Ok(());
        }
        self.last = Some(Instant::now());
        // Half a mark, of a full disk, would make nonsense of all behind it.
        let length = self.marks.metadata()?.len();
        if length % MARK != 0 {
            self.marks.set_len(length - length % MARK)?;
        }
        let now = Utc::now().timestamp_millis();
        let mark = [output.metadata()?.len().to_le_bytes(), now.to_le_bytes()].concat();
        self.marks.write_all(&mark)
    }
}

/// Finds the marks again, for offsets that grow.
#[derive(Debug)]
pub(crate) struct Times {
    marks: File,
    /// The last mark that is not behind the offset asked for, how many there are up to it, and the one after those,
    /// once it was made.
    found: Option<Mark>,
    count: u64,
    next: Option<Mark>,
}

#[derive(Debug, Clone, Copy)]
struct Mark {
    offset: u64,
    milliseconds: i64,
}

impl Times {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { marks: File::open(path)?, found: None, count: 0, next: None })
    }

    /// When the byte at `offset` was written; none when that is not known.
    pub(crate) fn at(&mut self, offset: u64) -> Option<DateTime<Utc>> {
        if self.found.is_none() {
            self.count = up_to(&self.marks, offset)?;
            self.found = self.count.checked_sub(1).and_then(|last| read(&self.marks, last));
        }
        loop {
            self.next = self.next.or_else(|| read(&self.marks, self.count));
            let Some(next) = self.next.take_if(|next| next.offset <= offset) else { break };
            self.found = Some(next);
            self.count += 1;
        }
        // Nothing but zeros is what was given back to the disk.
        let found = self.found.filter(|mark| mark.offset <= offset && mark.milliseconds > 0)?;
        DateTime::from_timestamp_millis(found.milliseconds)
    }
}

/// How many bytes from the beginning of `marks` nobody needs any more who reads output from `offset` on.
pub(crate) fn unneeded(marks: &File, offset: u64) -> u64 {
    up_to(marks, offset).map_or(0, |count| count.saturating_sub(1) * MARK)
}

/// How many marks are not behind `offset`.
fn up_to(marks: &File, offset: u64) -> Option<u64> {
    let (mut low, mut high) = (0, marks.metadata().ok()?.len() / MARK);
    while low < high {
        let middle = low + (high - low) / 2;
        if read(marks, middle)?.offset <= offset {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Some(low)
}

fn read(marks: &File, index: u64) -> Option<Mark> {
    let mut mark = Bytes::default();
    marks.read_exact_at(&mut mark, index * MARK).ok()?;
    let (offset, milliseconds) = mark.split_first_chunk()?;
    let milliseconds = milliseconds.first_chunk()?;
    Some(Mark { offset: u64::from_le_bytes(*offset), milliseconds: i64::from_le_bytes(*milliseconds) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn an_offset_has_the_time_of_the_mark_before_it() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("times");
        let marks = [(10, 1000_i64), (20, 2000), (20, 3000), (40, 4000)];
        let bytes: Vec<u8> =
            marks.iter().flat_map(|(offset, time)| [u64::to_le_bytes(*offset), time.to_le_bytes()].concat()).collect();
        fs::write(&path, &bytes).expect("marks");
        let expected = [(0, None), (9, None), (10, Some(1000)), (19, Some(1000)), (25, Some(3000)), (99, Some(4000))];
        let mut going_on = Times::open(&path).expect("times");
        for (offset, time) in expected {
            let time = time.and_then(DateTime::from_timestamp_millis);
            assert_eq!(Times::open(&path).expect("times").at(offset), time, "{offset}");
            assert_eq!(going_on.at(offset), time, "{offset}, going on");
        }
        let file = File::open(&path).expect("open");
        assert_eq!([0, 15, 20, 99].map(|offset| unneeded(&file, offset)), [0, 0, 32, 48]);
        // Half a mark is no mark, and given back is not known.
        fs::write(&path, &bytes[..24]).expect("marks");
        assert_eq!(Times::open(&path).expect("times").at(30), DateTime::from_timestamp_millis(1000));
        fs::write(&path, [0; 16]).expect("marks");
        assert_eq!(Times::open(&path).expect("times").at(30), None);
    }

    #[test]
    fn marks_are_a_second_apart_and_whole() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("times");
        fs::write(&path, [7; 5]).expect("half a mark");
        let output = tempfile::tempfile().expect("output");
        output.set_len(123).expect("output");
        let mut marker = Marker::new(File::options().append(true).open(&path).expect("open"));
        for _ in 0..3 {
            marker.note(&output).expect("a mark");
        }
        assert_eq!(fs::metadata(&path).expect("meta").len(), MARK, "one mark, and nothing else");
        let mut times = Times::open(&path).expect("times");
        assert_eq!(times.at(122), None);
        let age = Utc::now() - times.at(123).expect("a time");
        assert!((0..60_000).contains(&age.num_milliseconds()), "{age}");
    }
}
