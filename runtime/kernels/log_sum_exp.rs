//! One pass over a row of logits l: their maximum m, Σ e^(l−m) and Σ e^(l−m)·(l−m).
//!
//! From these come log p[v] = l[v] − m − ln Σ and the entropy ln Σ − (Σ e^(l−m)(l−m)) / Σ, without a softmax over the
//! vocabulary. The CPU works in chunks of [`CHUNK`] logits, right after the head has made them, and joins the chunks
//! in order.

use super::lanes::{Lanes, for_each_isa, for_lanes, load};

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// Tiles of the vocabulary.
    pub tiles: u32,
    /// The first row that is written.
    pub first: u32,
}

super::kernel!("log_sum_exp", Params, [("stats", Read), ("joined", Write)]);

/// What the shaders keep of a tile of tokens, and of the whole row: the pass that makes the logits sees the target's.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RowStats {
    /// Of the tile or the row.
    pub stats: Stats,
    /// The logit of the row's target; 0 where it is not among these tokens.
    pub target_logit: f32,
}

/// Logits the CPU reduces at a time.
pub const CHUNK: usize = 256;

/// What the pass leaves of a row (or of a chunk of it).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Stats {
    /// m.
    pub max: f32,
    /// Σ e^(l−m).
    pub sum: f32,
    /// Σ e^(l−m) · (l−m).
    pub weighted: f32,
}

impl Stats {
    /// The log-probability of a token with this logit.
    pub fn logprob(&self, logit: f32) -> f32 {
        (logit - self.max) - self.sum.ln()
    }

    /// The entropy of softmax(l), in nats.
    pub fn entropy(&self) -> f32 {
        self.sum.ln() - self.weighted / self.sum
    }

    /// Joins the statistics of chunks, in order.
    pub fn join(chunks: &[Stats]) -> Stats {
        let max = chunks.iter().fold(f32::NEG_INFINITY, |m, c| if c.max > m || c.max.is_nan() { c.max } else { m });
        let (mut sum, mut weighted) = (0.0f64, 0.0f64);
        for c in chunks.iter().filter(|c| c.max != f32::NEG_INFINITY) {
            let shift = f64::from(c.max) - f64::from(max);
            let shrink = shift.exp();
            sum += f64::from(c.sum) * shrink;
            weighted += (f64::from(c.weighted) + f64::from(c.sum) * shift) * shrink;
        }
        Stats { max, sum: sum as f32, weighted: weighted as f32 }
    }
}

for_each_isa! {
    /// The CPU twin for one chunk of a row; NaN where a logit is NaN.
    pub fn log_sum_exp(logits: &[f32]) -> Stats = body
}

#[inline(always)]
fn body<L: Lanes>(logits: &[f32]) -> Stats {
    let whole = logits.len() - logits.len() % L::N;
    let rest = &logits[whole..];
    // `trap` becomes NaN if a logit is NaN (or infinite, which the scan below tells apart).
    let (mut max, mut trap) = (L::splat(f32::NEG_INFINITY), L::zero());
    for_lanes!(L, whole, |i, n| {
        // SAFETY: i + n ≤ whole.
        let l = unsafe { load::<L>(logits, i, n) };
        trap = trap.mul_add(l, L::zero());
        max = l.max(max);
    });
    let mut max = rest.iter().fold(max.largest(), |m, l| if *l > m { *l } else { m });
    if (trap.sum() + rest.iter().map(|l| l * 0.0).sum::<f32>()).is_nan() && logits.iter().any(|l| l.is_nan()) {
        max = f32::NAN;
    }
    if max == f32::NEG_INFINITY {
        return Stats { max, sum: 0.0, weighted: 0.0 };
    }
    let (mut sum, mut weighted) = (L::zero(), L::zero());
    for_lanes!(L, whole, |i, n| {
        // SAFETY: i + n ≤ whole.
        let d = unsafe { load::<L>(logits, i, n) }.sub(L::splat(max));
        let p = d.exp();
        sum = sum.add(p);
        // e^−∞ · −∞ counts as 0.
        weighted = weighted.mul_add(p, L::splat(-1e30).max(d));
    });
    let (mut sum, mut weighted) = (sum.sum(), weighted.sum());
    for l in rest {
        let d = l - max;
        let p = L::splat(d).exp().first();
        sum += p;
        weighted += p * d.max(-1e30);
    }
    Stats { max, sum, weighted }
}
