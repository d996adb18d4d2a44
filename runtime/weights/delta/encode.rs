//! From old and new bytes to a frame.

use std::io::{self, Write};

use zstd::stream::write::Encoder;

use super::checksum::{Algorithm, Checksum, Hasher};
use super::index::Encoding;
use crate::error::{Error, Result};

/// Bytes that are compared, then compressed, at a time.
const PART: usize = 256 << 10;

/// One changed tensor.
pub(super) struct Encoded {
    pub frame: Vec<u8>,
    pub checksum: Checksum,
}

/// The frame that leads from `old` to `new`, which have one length; `None` if they are equal.
pub(super) fn encode(old: &[u8], new: &[u8], encoding: Encoding, level: i32) -> Result<Option<Encoded>> {
    if old == new {
        return Ok(None);
    }
    let frame = match encoding {
        Encoding::Xor => xor(old, new, level),
        Encoding::Overwrite if u32::try_from(new.len()).is_err() => {
            let what = format!("it has {} bytes; overwrite counts below 2^32 of them: use xor", new.len());
            return Err(Error::unsupported(what));
        }
        Encoding::Overwrite => overwrite(old, new, level),
    };
    let frame = frame.map_err(|e| Error::internal(format!("zstd: {e}")))?;
    let mut hasher = Hasher::new(Algorithm::Xxh3);
    hasher.update(new);
    Ok(Some(Encoded { frame, checksum: hasher.finish() }))
}

fn xor(old: &[u8], new: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let mut frame = encoder(new.len(), level)?;
    let mut part = Vec::with_capacity(PART);
    for (old, new) in old.chunks(PART).zip(new.chunks(PART)) {
        part.clear();
        part.extend(old.iter().zip(new).map(|(old, new)| old ^ new));
        frame.write_all(&part)?;
    }
    frame.finish()
}

fn overwrite(old: &[u8], new: &[u8], level: i32) -> io::Result<Vec<u8>> {
    let count = old.iter().zip(new).filter(|(old, new)| old != new).count();
    let mut frame = encoder(4 + 5 * count, level)?;
    // Fits, as do the places: `encode` has checked the length.
    frame.write_all(&(count as u32).to_le_bytes())?;
    let mut part = Vec::with_capacity(4 * PART);
    for (i, (old, new)) in old.chunks(PART).zip(new.chunks(PART)).enumerate() {
        part.clear();
        let changed = old.iter().zip(new).enumerate().filter(|(_, (old, new))| old != new);
        part.extend(changed.flat_map(|(place, _)| ((i * PART + place) as u32).to_le_bytes()));
        frame.write_all(&part)?;
    }
    for (old, new) in old.chunks(PART).zip(new.chunks(PART)) {
        part.clear();
        part.extend(old.iter().zip(new).filter(|(old, new)| old != new).map(|(_, new)| new));
        frame.write_all(&part)?;
    }
    frame.finish()
}

/// The frame says how much it holds: Python's one-shot `decompress`, which slime uses for `overwrite`, needs it.
fn encoder(bytes: usize, level: i32) -> io::Result<Encoder<'static, Vec<u8>>> {
    let mut encoder = Encoder::new(Vec::new(), level)?;
    encoder.set_pledged_src_size(Some(bytes as u64))?;
    encoder.include_contentsize(true)?;
    Ok(encoder)
}
