//! Bytes to the device. Through a ring of mapped staging buffers: the host writes into memory that the device reads, and
//! fills one buffer while others are copied. Or from the mapped file itself, where the device imports its pages.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};

use wgpu::WriteOnly;

use super::device::Gpu;
use super::import::Imported;
use crate::backend::cpu::Pool;
use crate::error::{Error, Result};
use crate::weights::Weights;

/// Size of a staging buffer; a unit that is larger gets a larger one.
const STAGING: usize = 32 << 20;
/// Buffers of the ring.
const RING: usize = 3;
/// Bytes of a mapped file that are imported at a time: drivers pin their pages.
const WINDOW: usize = 256 << 20;
/// Imports that are there at a time.
const WINDOWS: usize = 2;
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

/// How the weights of a model came to the device, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UploadedBytes {
    /// Through staging buffers.
    pub staged: u64,
    /// Copied by the device from the mapped file.
    pub imported: u64,
    /// Of those that were staged: what the device could not import.
    pub refused: u64,
}

/// Fills device buffers.
pub(super) struct Uploader<'a> {
    gpu: &'a Gpu,
    pool: &'a Pool,
    weights: &'a Weights,
    pub uploaded: UploadedBytes,
    windows: VecDeque<(wgpu::SubmissionIndex, Imported)>,
    ring: Vec<Slot>,
    next: usize,
    size: usize,
}

impl<'a> Uploader<'a> {
    pub(super) fn new(gpu: &'a Gpu, pool: &'a Pool, weights: &'a Weights) -> Self {
        Uploader {
            gpu,
            pool,
            weights,
            uploaded: UploadedBytes::default(),
            windows: VecDeque::new(),
            ring: Vec::new(),
            next: 0,
            size: STAGING,
        }
    }

    /// Has the device copy bytes of a mapped file to the start of `buffer`; false where it cannot, and `write` must.
    pub(super) fn copy_mapped(&mut self, buffer: &wgpu::Buffer, bytes: &[u8]) -> Result<bool> {
        let gpu = self.gpu;
        let (Some(import), Some((map, range))) = (&gpu.host_import, self.weights.map_of(bytes)) else {
            return Ok(false);
        };
        // A map begins with a page, and copies take multiples of four bytes.
        let is_aligned = range.start.is_multiple_of(4) && range.len().is_multiple_of(4);
        let mut refusal = (!is_aligned).then(|| format!("at {}, no multiple of 4 bytes", range.start));
        for start in range.clone().step_by(WINDOW) {
            if refusal.is_some() {
                break;
            }
            let end = range.end.min(start + WINDOW);
            while self.windows.len() >= WINDOWS {
                self.end_window()?;
            }
            match import.import(gpu, &map, start..end) {
                Ok(imported) => {
                    let submission = gpu.checked("uploading", || {
                        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                        let (to, len) = ((start - range.start) as u64, (end - start) as u64);
                        encoder.copy_buffer_to_buffer(&imported.buffer, imported.offset, buffer, to, len);
                        gpu.queue.submit([encoder.finish()])
                    })?;
                    self.windows.push_back((submission, imported));
                }
                Err(error) => refusal = Some(error.to_string()),
            }
        }
        if let Some(reason) = refusal {
            log::debug!("{} bytes of a mapped file are staged: {reason}", bytes.len());
            self.uploaded.refused += bytes.len() as u64;
            return Ok(false);
        }
        self.uploaded.imported += bytes.len() as u64;
        Ok(true)
    }

    /// Waits for the oldest import's copy and lets go of it.
    fn end_window(&mut self) -> Result<()> {
        if let Some((submission, _)) = self.windows.front() {
            self.gpu.wait(submission.clone())?;
            self.windows.pop_front();
        }
        Ok(())
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
        self.uploaded.staged += (units * bytes) as u64;
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
        while !self.windows.is_empty() {
            self.end_window()?;
        }
        for slot in &mut self.ring {
            if let (Some(submission), Some(mapped)) = (slot.submission.take(), slot.mapped.take()) {
                self.gpu.wait(submission)?;
                self.gpu.mapped(&mapped)?;
            }
        }
        Ok(())
    }
}
