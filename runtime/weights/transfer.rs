//! Moving elements from a caller's memory into a tensor: checked first, then copied or rounded, on several threads where
//! there is much to do.

use std::ops::Range;

use half::{bf16, f16};

use super::Dtype;
use crate::error::{Error, ErrorKind, Result};

/// Below this a thread costs more than it saves.
const BYTES_A_THREAD: usize = 4 << 20;
const MOST_THREADS: usize = 8;
/// Elements that are widened at a time: they stay in the first cache.
const CHUNK: usize = 1024;

/// What is checked before a byte is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Checks {
    /// No NaN, no infinity.
    pub finite: bool,
    /// What the elements are rounded to; a finite one must not become infinite.
    pub to: Option<Dtype>,
}

/// Checks the elements of a tensor.
///
/// # Errors
/// `NonFinite`, with the place and the value of the first element that fails.
pub(super) fn check(dtype: Dtype, bytes: &[u8], checks: Checks) -> Result<()> {
    let largest = match checks.to {
        Some(Dtype::F16) if dtype != Dtype::F16 => Some((65520.0, Dtype::F16)),
        // Half a unit in the last place above the largest bf16.
        Some(Dtype::BF16) if dtype == Dtype::F32 => Some((f32::from_bits(0x7f7f_8000), Dtype::BF16)),
        _ => None,
    };
    if !checks.finite && largest.is_none() {
        return Ok(());
    }
    let fails = |v: f32| {
        let overflows = largest.is_some_and(|(bound, _)| v.abs() >= bound && v.is_finite());
        overflows || (checks.finite && !v.is_finite())
    };
    let size = dtype.size();
    let parts = parts(bytes.len() / size, size);
    let find = |range: Range<usize>| first(dtype, &bytes[range.start * size..range.end * size], fails);
    let found = std::thread::scope(|scope| {
        let (here, others) = parts.split_first()?;
        let others: Vec<_> = others.iter().map(|range| (range.start, scope.spawn(|| find(range.clone())))).collect();
        let mut best = find(here.clone()).map(|(i, v)| (here.start + i, v));
        for (start, other) in others {
            // A check does not panic; if it did, that is a failed check.
            let found = other.join().unwrap_or(Some((0, f32::NAN)));
            best = best.or(found.map(|(i, v)| (start + i, v)));
        }
        best
    });
    match (found, largest) {
        (None, _) => Ok(()),
        (Some((i, v)), Some((_, to))) if v.is_finite() => {
            Err(Error::new(ErrorKind::NonFinite, format!("element {i} is {v:e}, which is infinite in {}", to.name())))
        }
        (Some((i, v)), _) => Err(Error::new(ErrorKind::NonFinite, format!("element {i} is {v}"))),
    }
}

/// The first element for which `fails` holds.
fn first(dtype: Dtype, bytes: &[u8], fails: impl Fn(f32) -> bool) -> Option<(usize, f32)> {
    let mut wide = [0.0f32; CHUNK];
    for (c, chunk) in bytes.chunks(CHUNK * dtype.size()).enumerate() {
        let wide = &mut wide[..chunk.len() / dtype.size()];
        dtype.read_f32(chunk, wide);
        // Without an early end the loop has no branch, and most chunks pass.
        if wide.iter().fold(false, |any, v| any | fails(*v))
            && let Some(i) = wide.iter().position(|v| fails(*v))
        {
            return Some((c * CHUNK + i, wide[i]));
        }
    }
    None
}

/// Copies elements, rounding to the nearest (ties to even) where the dtypes differ. Both hold the same number.
pub(super) fn copy(from: Dtype, source: &[u8], to: Dtype, target: &mut [u8]) {
    let elements = source.len() / from.size();
    let mut parts = parts(elements, from.size().max(to.size()));
    let last = parts.pop();
    std::thread::scope(|scope| {
        let mut rest = target;
        for range in parts {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(range.len() * to.size());
            rest = after;
            let source = &source[range.start * from.size()..range.end * from.size()];
            scope.spawn(move || copy_part(from, source, to, part));
        }
        if let Some(range) = last {
            copy_part(from, &source[range.start * from.size()..], to, rest);
        }
    });
}

fn copy_part(from: Dtype, source: &[u8], to: Dtype, target: &mut [u8]) {
    if from == to {
        target.copy_from_slice(source);
        return;
    }
    let mut wide = [0.0f32; CHUNK];
    for (source, target) in source.chunks(CHUNK * from.size()).zip(target.chunks_mut(CHUNK * to.size())) {
        let wide = &mut wide[..source.len() / from.size()];
        from.read_f32(source, wide);
        let pairs = target.chunks_exact_mut(to.size()).zip(wide);
        match to {
            Dtype::F32 => pairs.for_each(|(t, v)| t.copy_from_slice(&v.to_le_bytes())),
            Dtype::F16 => pairs.for_each(|(t, v)| t.copy_from_slice(&f16::from_f32(*v).to_le_bytes())),
            Dtype::BF16 => pairs.for_each(|(t, v)| t.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
        }
    }
}

/// Elements for each thread; one part where there is little.
fn parts(elements: usize, size: usize) -> Vec<Range<usize>> {
    if elements.saturating_mul(size) < 2 * BYTES_A_THREAD {
        return std::iter::once(0..elements).collect();
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
    let threads = (elements.saturating_mul(size) / BYTES_A_THREAD).clamp(1, cores);
    let each = elements.div_ceil(threads).next_multiple_of(CHUNK);
    (0..threads).map(|t| (t * each).min(elements)..((t + 1) * each).min(elements)).collect()
}
