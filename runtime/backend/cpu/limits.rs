//! What this processor does at best: reading memory, and products whose operands the caches hold.

use std::hint::black_box;
use std::time::{Duration, Instant};

use super::CpuOptions;
use crate::backend::Limits;
use crate::error::{Error, Result, try_vec};
use crate::kernels::linear::{self, Arithmetic, Hint, PackBuffer, Quantised, ROW_BLOCK, Source, Weight};
use crate::kernels::{MatrixView, SharedMut};
use crate::weights::{Dtype, WeightFormat};

/// More than the last-level cache that a socket's share of threads has.
const READ_BYTES: usize = 512 << 20;
/// A product of [64, K] by [N, K]: the operands fill about half of an L2 cache.
const N: usize = 256;
const K: usize = 512;
/// How long each measurement goes on; the best run of it counts.
const LEAST: Duration = Duration::from_millis(300);
const RUNS: usize = 3;

/// Measures with all threads at once; `like`: a weight of the model, which says the dtype and the arithmetic.
pub(super) fn measure(options: &CpuOptions, like: &Weight) -> Result<Limits> {
    Ok(Limits { bytes_per_second: reading(options)?, flops: products(options, like)? })
}

/// The speed of the fastest of some runs, each of which does `work`.
fn best(work: f64, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut shortest = f64::INFINITY;
    for runs in 0.. {
        if runs >= RUNS && begin.elapsed() >= LEAST {
            break;
        }
        let start = Instant::now();
        run();
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    work / shortest
}

fn reading(options: &CpuOptions) -> Result<f64> {
    let pool = &options.pool;
    // Written, so that every page is its own: untouched pages are all the same one.
    let numbers = try_vec("the buffer that reading is timed with", 1u64, READ_BYTES / 8)?;
    let span = numbers.len().div_ceil(8 * pool.threads());
    Ok(best(READ_BYTES as f64, || {
        pool.run(numbers.len().div_ceil(span), &|i| {
            let part = &numbers[i * span..numbers.len().min((i + 1) * span)];
            black_box(part.iter().fold(0u64, |sum, n| sum.wrapping_add(*n)));
        });
    }))
}

fn products(options: &CpuOptions, like: &Weight) -> Result<f64> {
    let CpuOptions { isa, pool, precision, .. } = options;
    let values: Vec<f32> = (0..N * K).map(|i| (i % 251) as f32 / 251.0 - 0.5).collect();
    let dtype = match like {
        Weight::Stored(view) => view.dtype(),
        Weight::Int8(_) | Weight::Int4(_) => Dtype::F32,
    };
    let stored = dtype.from_f32(&values);
    let view = MatrixView::new(dtype, &stored, N, K);
    let format = match like {
        Weight::Stored(_) => WeightFormat::Stored,
        Weight::Int8(_) => WeightFormat::Int8,
        Weight::Int4(_) => WeightFormat::Int4,
    };
    let quantised = Quantised::of(format, view, pool)?;
    let weight = quantised.as_ref().map_or(Weight::Stored(view), Quantised::weight);
    let arithmetic = Arithmetic::of(*isa, *precision, [weight]);
    let mut buffer = PackBuffer::default();
    buffer.reserve(ROW_BLOCK, K)?;
    let source = Source { x: &values[..ROW_BLOCK * K], rows: ROW_BLOCK, k: K, norm: None };
    let packed = buffer.pack(*isa, pool, arithmetic, source);
    let tasks = pool.threads();
    let mut sums = try_vec("the sums that products are timed with", 0.0f32, tasks * ROW_BLOCK * N)?;
    let shared = SharedMut::new(&mut sums);
    // Long enough for the start and the end of the loop not to count.
    const TIMES: usize = 64;
    let flops = 2 * tasks * TIMES * ROW_BLOCK * N * K;
    let speed = best(flops as f64, || {
        pool.run(tasks, &|i| {
            // SAFETY: every task has its own part.
            let sums = unsafe { shared.slice(i * ROW_BLOCK * N..(i + 1) * ROW_BLOCK * N) };
            for _ in 0..TIMES {
                linear::column_sums(*isa, &packed, 0..ROW_BLOCK, &weight, 0..N, black_box(sums), Hint::NONE);
            }
        });
    });
    if sums.iter().any(|s| !s.is_finite()) {
        return Err(Error::internal("a product of small numbers is not finite"));
    }
    Ok(speed)
}
