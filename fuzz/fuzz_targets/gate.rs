//! The edge's framing gate: no input panics, and how bytes are cut into reads changes nothing.
#![no_main]

use libfuzzer_sys::fuzz_target;
use systemprompt_edge::gate::{Framing, Step};

/// Whether the connection was refused, and how many heads were accepted before.
fn read<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> (bool, u64) {
    let mut framing = Framing::new(1024);
    for mut piece in pieces {
        loop {
            match framing.feed(piece) {
                Step::Pass => break,
                Step::Refuse(..) => return (true, framing.heads()),
                Step::Hold(index) => {
                    piece = &piece[index..];
                    framing.resume();
                }
            }
        }
    }
    (false, framing.heads())
}

fuzz_target!(|input: (u8, &[u8])| {
    let (cut, bytes) = input;
    let whole = read(std::iter::once(bytes));
    assert_eq!(read(bytes.chunks(usize::from(cut).max(1))), whole);
});
