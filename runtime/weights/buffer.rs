//! Memory that holds one tensor: what was put from a caller's memory, made from a delta, or changed in place.

use crate::error::{Error, ErrorKind, Result};

/// Kernels read whole cache lines.
const ALIGN: usize = 64;

/// Bytes that begin on a cache line.
pub(super) struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Zeroed memory, which the system commits when it is written.
    pub fn new(what: &str, len: usize) -> Result<Self> {
        let none = || Error::new(ErrorKind::HostMemory, format!("{what}: no memory for {len} bytes"));
        let size = len.checked_add(ALIGN).filter(|n| *n <= isize::MAX as usize).ok_or_else(none)?;
        let layout = std::alloc::Layout::array::<u8>(size).map_err(|_| none())?;
        // SAFETY: the layout has a size above 0.
        let memory = unsafe { std::alloc::alloc_zeroed(layout) };
        if memory.is_null() {
            return Err(none());
        }
        // SAFETY: from the global allocator with this layout, and initialised.
        let bytes = unsafe { Vec::from_raw_parts(memory, size, size) };
        // `align_offset` may give up, which costs speed alone.
        let start = bytes.as_ptr().align_offset(ALIGN).min(ALIGN);
        Ok(Buffer { bytes, start, len })
    }

    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }

    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}
