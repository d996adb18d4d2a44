//! From a frame and the base to the new bytes.
//!
//! A frame is a stream of which nothing is believed: it is decompressed part by part into space that is there already, and
//! must end exactly where the tensor does. What it may allocate is the window, at most [`WINDOW_LOG`].

use std::io::Read;

use super::checksum::{Algorithm, Checksum, Hasher};
use crate::error::{Error, Result, checked_size, try_vec};

/// zstd's number for a window of 8 MiB: what levels up to 19 use, and what RFC 8878 asks every decoder to accept.
pub(super) const WINDOW_LOG: u32 = 23;
const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Bytes of the result that are made, then hashed, while the cache has them.
const PART: usize = 256 << 10;

/// Refuses what does not begin as a zstd frame.
pub(super) fn check_magic(frame: &[u8]) -> Result<()> {
    if frame.starts_with(&MAGIC) {
        return Ok(());
    }
    Err(Error::format("it does not begin with the magic number of a zstd frame"))
}

/// out = base ⊕ frame. Returns the checksum of `out`.
pub(super) fn xor(frame: &[u8], algorithm: Algorithm, base: &[u8], out: &mut [u8]) -> Result<Checksum> {
    let (mut frame, mut hasher, total) = (Frame::open(frame)?, Hasher::new(algorithm), base.len());
    for (out, base) in out.chunks_mut(PART).zip(base.chunks(PART)) {
        frame.fill(out, total)?;
        out.iter_mut().zip(base).for_each(|(o, b)| *o ^= b);
        hasher.update(out);
    }
    frame.end(total)?;
    Ok(hasher.finish())
}

/// out = base, then out\[position\] = value for every pair of the frame. Returns the checksum of `out`.
///
/// All positions come before all values, and there may be four times as many bytes of them as the tensor has: two readers
/// go through the frame, the one ahead at the values.
pub(super) fn overwrite(frame: &[u8], algorithm: Algorithm, base: &[u8], out: &mut [u8]) -> Result<Checksum> {
    let mut count = [0; 4];
    let mut positions = Frame::open(frame)?;
    positions.fill(&mut count, 4)?;
    let count = usize::try_from(u32::from_le_bytes(count)).unwrap_or(usize::MAX);
    if count > base.len() {
        return Err(Error::format(format!("its frame changes {count} bytes, the tensor has {}", base.len())));
    }
    let total = 4 + checked_size("its frame", &[5, count])?;
    let mut values = Frame::open(frame)?;
    let (mut places, mut bytes) = (try_vec("positions", 0, PART)?, try_vec("values", 0, PART / 4)?);
    let mut ahead = 4 + 4 * count;
    while ahead > 0 {
        let part = ahead.min(PART);
        values.fill(&mut places[..part], total)?;
        ahead -= part;
    }

    out.copy_from_slice(base);
    let mut left = count;
    while left > 0 {
        let part = left.min(PART / 4);
        let (places, bytes) = (&mut places[..4 * part], &mut bytes[..part]);
        positions.fill(places, total)?;
        values.fill(bytes, total)?;
        for (place, byte) in places.chunks_exact(4).zip(&*bytes) {
            let place = u32::from_le_bytes([place[0], place[1], place[2], place[3]]);
            let slot = usize::try_from(place).ok().and_then(|place| out.get_mut(place));
            *slot.ok_or_else(|| {
                Error::format(format!("its frame changes byte {place}, the tensor has {}", base.len()))
            })? = *byte;
        }
        left -= part;
    }
    values.end(total)?;
    let mut hasher = Hasher::new(algorithm);
    hasher.update(out);
    Ok(hasher.finish())
}

struct Frame<'a> {
    decoder: zstd::stream::read::Decoder<'a, &'a [u8]>,
    /// Bytes that came out of it.
    position: usize,
}

fn unreadable(error: std::io::Error) -> Error {
    Error::format(format!("its zstd frame cannot be read: {error}"))
}

impl<'a> Frame<'a> {
    fn open(frame: &'a [u8]) -> Result<Self> {
        let mut decoder = zstd::stream::read::Decoder::with_buffer(frame).map_err(unreadable)?.single_frame();
        decoder.window_log_max(WINDOW_LOG).map_err(unreadable)?;
        Ok(Frame { decoder, position: 0 })
    }

    /// Fills `out`; `total` is what the frame should hold.
    fn fill(&mut self, out: &mut [u8], total: usize) -> Result<()> {
        let mut done = 0;
        while done < out.len() {
            match self.decoder.read(&mut out[done..]).map_err(unreadable)? {
                0 => {
                    let what = format!("its frame holds {} bytes, it should hold {total}", self.position);
                    return Err(Error::format(what));
                }
                n => (done, self.position) = (done + n, self.position + n),
            }
        }
        Ok(())
    }

    /// Checks that the frame ends here, and that nothing follows it.
    fn end(mut self, total: usize) -> Result<()> {
        if self.decoder.read(&mut [0]).map_err(unreadable)? > 0 {
            return Err(Error::format(format!("its frame holds more than the {total} bytes that it should hold")));
        }
        match self.decoder.finish().len() {
            0 => Ok(()),
            rest => Err(Error::format(format!("{rest} bytes follow its zstd frame"))),
        }
    }
}
