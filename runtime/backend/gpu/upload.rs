//! Bytes to the device through a ring of mapped staging buffers: the host writes into memory that the device reads, and
//! fills one buffer while others are copied.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};

use wgpu::WriteOnly;

use super::device::Gpu;
use crate::backend::cpu::Pool;
use crate::error::{Error, Result};

/// Size of a staging buffer; a unit that is larger gets a larger one.
const STAGING: usize = 32 << 20;
/// Buffers of the ring.
const RING: usize = 3;
/// Bytes that a thread fills at a time.
const TASK: usize = 1 << 20;

/// Writes a unit, with room for what it needs meanwhile.
type Fill<'a> = dyn Fn(usize, WriteOnly<[u8]>, &mut Vec<u8>) + Sync + 'a;

/// A part of a mapped buffer that one thread writes.
struct Piece<'a>(WriteOnly<'a, [u8]>);

// SAFETY: it is a `&mut [u8]` that cannot be read; wgpu says so for slices of known size only.
unsafe impl Send for Piece<'_> {}

struct Slot {
    buffer: wgpu::Buffer,
    /// Says that the buffer is mapped again; `None` while it never was used.
    mapped: Option<Receiver<bool>>,
    submission: Option<wgpu::SubmissionIndex>,
}

/// Fills device buffers.
pub(super) struct Uploader<'a> {
    gpu: &'a Gpu,
    pool: &'a Pool,
    ring: Vec<Slot>,
    next: usize,
    size: usize,
}

impl<'a> Uploader<'a> {
    pub(super) fn new(gpu: &'a Gpu, pool: &'a Pool) -> Self {
        Uploader { gpu, pool, ring: Vec::new(), next: 0, size: STAGING }
    }

    /// Writes `units` units of `bytes` bytes each to the start of `buffer`. `fill(i, out, scratch)` writes unit i, all of
    /// it, on any thread.
    pub(super) fn write(&mut self, buffer: &wgpu::Buffer, units: usize, bytes: usize, fill: &Fill) -> Result<()> {
        // Copies take multiples of four bytes.
        if !bytes.is_multiple_of(4) {
            return Err(Error::internal(format!("units of {bytes} bytes are uploaded")));
        }
        if bytes > self.size {
            self.finish()?;
            self.ring.clear();
            self.size = bytes;
        }
        let at_a_time = (self.size / bytes.max(1)).max(1);
        for start in (0..units).step_by(at_a_time) {
            let count = at_a_time.min(units - start);
            self.chunk(buffer, (start * bytes) as u64, count, bytes, &|i, out, scratch| fill(start + i, out, scratch))?;
        }
        Ok(())
    }

    fn chunk(&mut self, buffer: &wgpu::Buffer, offset: u64, units: usize, bytes: usize, fill: &Fill) -> Result<()> {
        let gpu = self.gpu;
        let slot = self.slot()?;
        let staging = slot.buffer.clone();
        let total = (units * bytes) as u64;
        let mut view =
            staging.slice(0..total).get_mapped_range_mut().map_err(|e| Error::gpu(format!("staging: {e}")))?;
        // 1. Threads fill parts of whole units.
        let each = (TASK / bytes).max(1);
        let mut rest = view.slice(..);
        let mut parts = Vec::new();
        for first in (0..units).step_by(each) {
            let count = each.min(units - first);
            let (part, after) = rest.split_at(count * bytes);
            rest = after;
            parts.push(Mutex::new(Some((first, count, Piece(part)))));
        }
        self.pool.run(parts.len(), &|i| {
            let piece = parts[i].lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some((first, count, Piece(mut part))) = piece else { return };
            let mut scratch = Vec::new();
            for unit in 0..count {
                fill(first + unit, part.slice(unit * bytes..(unit + 1) * bytes), &mut scratch);
            }
        });
        drop(parts);
        drop(view);
        // 2. The device copies while the next buffer is filled.
        let (sender, mapped) = channel();
        let submission = gpu.checked("uploading", || {
            staging.unmap();
            let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&staging, 0, buffer, offset, total);
            let submission = gpu.queue.submit([encoder.finish()]);
            staging.slice(..).map_async(wgpu::MapMode::Write, move |result| {
                // Who no longer waits does not want to know.
                let _ = sender.send(result.is_ok());
            });
            submission
        })?;
        let slot = &mut self.ring[self.next];
        slot.mapped = Some(mapped);
        slot.submission = Some(submission);
        self.next = (self.next + 1) % RING;
        Ok(())
    }

    /// The next buffer of the ring, mapped.
    fn slot(&mut self) -> Result<&mut Slot> {
        if self.ring.len() < RING {
            let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
            let descriptor = wgpu::BufferDescriptor {
                label: Some("staging"),
                size: self.size.next_multiple_of(16) as u64,
                usage,
                mapped_at_creation: true,
            };
            let buffer = self.gpu.checked("staging", || self.gpu.device.create_buffer(&descriptor))?;
            self.next = self.ring.len();
            self.ring.push(Slot { buffer, mapped: None, submission: None });
        }
        let slot = &mut self.ring[self.next];
        if let (Some(submission), Some(mapped)) = (slot.submission.take(), slot.mapped.take()) {
            self.gpu.wait(submission)?;
            self.gpu.mapped(&mapped)?;
        }
        Ok(slot)
    }

    /// Waits until everything is on the device.
    pub(super) fn finish(&mut self) -> Result<()> {
        for slot in &mut self.ring {
            if let (Some(submission), Some(mapped)) = (slot.submission.take(), slot.mapped.take()) {
                self.gpu.wait(submission)?;
                self.gpu.mapped(&mapped)?;
            }
        }
        Ok(())
    }
}
