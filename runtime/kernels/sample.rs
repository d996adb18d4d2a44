//! Draws one token from a row of logits, which [`adjust_logits`](super::adjust_logits) may have changed.
//!
//! In transformers' order: temperature, top-k, top-p, min-p, typical-p. With z = logit / T and w = e^(z − max z), the
//! kept set is every token whose z reaches a threshold, the largest of
//! - the k-th largest z (top-k),
//! - the largest z such that the tokens at or above it hold at least top_p of the mass that top-k left (top-p),
//! - max z + ln(min_p) (min-p).
//!
//! Typical-p then keeps, of these, the tokens whose surprise −ln p is closest to the entropy H of what is left: the
//! smallest deviations d = |−ln p − H| that together hold typical_p of the mass. Since ln p rises with z, they are a band
//! of z, from the threshold to a ceiling.
//!
//! Equal values share a fate, so count, threshold and ceiling are enough to rebuild the set. What is −∞ is never kept. The
//! draw inverts the cumulative distribution over the kept tokens in the order of their ids. At temperature 0 the
//! largest z wins, of equals the smallest id.
//!
//! What the shader reads, in passes over the vocabulary. Those of a search depend on the row: it ends its passes when its
//! range holds no more than 8 tokens a lane (some 500 in all). The usual figures are counts from made-up rows with
//! V = 49152 and 151936: a few peaks over normal noise of deviation 2.5 to 3; in brackets normal or uniform noise alone.
//!
//! | feature | usual | at most |
//! |---|---|---|
//! | greedy, or a row without a finite maximum | 1 | 1 |
//! | plain: temperature, mask, min-p | 2 | 2 |
//! | top-p 0.5 or 0.9 | + 1–2 (2–5) | + 25 |
//! | top-k 50 | + 2–4 (2–4) | + 25 |
//! | typical-p | + 2 and a search | + 27 |
//! | ids of a kept set that is small enough to report | + 1 | + 1 |
//!
//! That is up to temperature 1; at 100, or where thousands of tokens are kept, a search took up to 8. The most takes values
//! over all orders of magnitude.

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};
use super::log_sum_exp::CHUNK;

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// V.
    pub vocab: u32,
    /// The step's first request and draw.
    pub first: u32,
}

super::kernel!(
    "sample",
    Params,
    [("logits", Read), ("requests", Read), ("edits", Read), ("drawn", Write), ("kept_ids", Write)]
);

/// In [`Request::mask_row`]: every token may be drawn.
pub const NO_MASK: u32 = u32::MAX;

/// Most ids of a kept set that are reported.
pub const MAX_KEPT_IDS: usize = 1024;

/// What one row asks for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Request {
    /// In [0, 1): where the cumulative distribution is inverted.
    pub uniform: f32,
    /// 1 / T; negative for greedy.
    pub inverse_temperature: f32,
    /// 0: off.
    pub top_k: u32,
    /// 1: off.
    pub top_p: f32,
    /// 0: off.
    pub min_p: f32,
    /// 1: off.
    pub typical_p: f32,
    /// Where the row's edits begin; filled in by the backend, which also sets the next two.
    pub first_edit: u32,
    /// How many edits it has.
    pub edit_count: u32,
    /// Its row of the masks, or [`NO_MASK`].
    pub mask_row: u32,
    /// Report the ids of the kept set where it has no more than this many; at most [`MAX_KEPT_IDS`].
    pub kept_ids: u32,
    /// 1 if the row asks for a sample; 0: skip it.
    pub active: u32,
}

impl Default for Request {
    /// Temperature 1, nothing cut.
    fn default() -> Self {
        Request {
            uniform: 0.0,
            inverse_temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            first_edit: 0,
            edit_count: 0,
            mask_row: NO_MASK,
            kept_ids: 0,
            active: 1,
        }
    }
}

/// What a row got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Drawn {
    /// The token; [`super::top_k::NO_TOKEN`] if the row has no finite maximum.
    pub token: u32,
    /// Tokens in the kept set.
    pub kept: u32,
    /// Smallest z in the kept set; −∞ if nothing cuts from below, the smallest finite number if only a mask does.
    pub threshold: f32,
    /// Largest z in the kept set; +∞ unless typical-p is on.
    pub ceiling: f32,
    /// Log-probability of the token in the distribution it was drawn from.
    pub logprob: f32,
    /// The token's logit as the model gave it.
    pub logit: f32,
}

/// Memory that the CPU twin keeps from row to row.
#[derive(Default)]
pub struct Scratch {
    /// logit / T.
    z: Vec<f32>,
    /// e^(z − max z); zero outside the kept set, but for chunks whose sum is zero.
    weights: Vec<f32>,
    /// The largest z of each chunk.
    largest: Vec<f32>,
    /// The sum of each chunk's weights.
    sums: Vec<f32>,
    /// The tokens among which the top-p threshold lies: (z, weight).
    members: Vec<(f32, f32)>,
}

for_each_isa! {
    /// The CPU twin for one row; the caller knows the raw logit, which stays as the row has it.
    pub fn sample(logits: &[f32], request: &Request, scratch: &mut Scratch) -> Drawn = body
}

#[inline(always)]
fn body<L: Lanes>(logits: &[f32], request: &Request, scratch: &mut Scratch) -> Drawn {
    let greedy = request.inverse_temperature < 0.0;
    let factor = if greedy { 1.0 } else { request.inverse_temperature };
    let len = logits.len();
    let Scratch { z, weights, largest, sums, members } = scratch;

    // 1. z, and its maximum in each chunk. `trap` becomes NaN if a z is NaN or infinite.
    z.resize(len, 0.0);
    largest.clear();
    let mut trap = L::zero();
    for (z, logits) in z.chunks_mut(CHUNK).zip(logits.chunks(CHUNK)) {
        if factor > 0.0 {
            for_lanes!(L, z.len(), |i, n| {
                // SAFETY: i + n ≤ the length of both.
                unsafe { store(load::<L>(logits, i, n).mul(L::splat(factor)), z, i, n) };
            });
        } else {
            // An infinite temperature makes all alike but what is masked.
            z.iter_mut().zip(logits).for_each(|(z, l)| *z = if *l == f32::NEG_INFINITY { *l } else { l * 0.0 });
        }
        let mut max = L::splat(f32::NEG_INFINITY);
        let whole = z.len() - z.len() % L::N;
        for_lanes!(L, whole, |i, n| {
            // SAFETY: i + n ≤ the length.
            let v = unsafe { load::<L>(z, i, n) };
            trap = trap.mul_add(v, L::zero());
            max = v.max(max);
        });
        let rest = &z[whole..];
        trap = trap.add(L::splat(rest.iter().map(|z| z * 0.0).sum()));
        largest.push(rest.iter().fold(max.largest(), |m, z| if *z > m { *z } else { m }));
    }
    let max = largest.iter().fold(f32::NEG_INFINITY, |m, z| if *z > m { *z } else { m });
    let broken = trap.sum().is_nan() && z.iter().any(|z| z.is_nan());
    if broken || !max.is_finite() {
        let token = super::top_k::NO_TOKEN;
        return Drawn { token, kept: 0, threshold: f32::NAN, ceiling: f32::NAN, logprob: f32::NAN, logit: f32::NAN };
    }
    let chunk_of_best = largest.iter().position(|l| *l == max).unwrap_or(0) * CHUNK;
    let best = chunk_of_best + z[chunk_of_best..].iter().position(|z| *z == max).unwrap_or(0);
    if greedy {
        let (token, logit) = (best as u32, logits[best]);
        return Drawn { token, kept: 1, threshold: max, ceiling: f32::INFINITY, logprob: 0.0, logit };
    }

    // 2. Weights.
    weights.resize(len, 0.0);
    sums.clear();
    for (z, weights) in z.chunks(CHUNK).zip(weights.chunks_mut(CHUNK)) {
        let mut sum = L::zero();
        for_lanes!(L, z.len(), |i, n| {
            // SAFETY: i + n ≤ the length of both. What lies past the end of a part is no weight.
            unsafe {
                store(load::<L>(z, i, n).sub(L::splat(max)).exp(), weights, i, n);
                sum = sum.add(load::<L>(weights, i, n));
            }
        });
        sums.push(sum.sum());
    }

    // 3. The kept set.
    let mut threshold = threshold::<L>(z, weights, largest, members, max, request);
    let mut ceiling = f32::INFINITY;
    let mut kept = len as u32;
    if threshold > f32::NEG_INFINITY {
        kept = keep_from::<L>(z, weights, largest, sums, threshold);
    }
    if request.typical_p < 1.0 {
        (threshold, ceiling) = typical_band(z, weights, sums, members, max, threshold, request.typical_p);
        kept = keep_band(z, weights, sums, threshold, ceiling);
    }

    // 4. The token: first its chunk, then its place there.
    let total: f32 = sums.iter().sum();
    let target = request.uniform * total;
    let last = sums.iter().rposition(|s| *s > 0.0).unwrap_or(0);
    let mut below = 0.0f32;
    let mut token = best;
    for (c, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        if below + sum <= target && c < last {
            below += sum;
            continue;
        }
        let mut within = below;
        let chunk = &weights[c * CHUNK..len.min((c + 1) * CHUNK)];
        for (j, weight) in chunk.iter().enumerate().filter(|(_, w)| **w > 0.0) {
            // The last kept token of the chunk takes what rounding leaves over.
            token = c * CHUNK + j;
            within += weight;
            if within > target {
                break;
            }
        }
        break;
    }
    // One token alone is certain, whatever rounding says.
    let logprob = if kept == 1 { 0.0 } else { (z[token] - max) - total.ln() };
    Drawn { token: token as u32, kept, threshold, ceiling, logprob, logit: logits[token] }
}

/// Zeroes the weights of tokens whose z is below `threshold`; how many are left, with the chunks' sums anew.
#[inline(always)]
fn keep_from<L: Lanes>(z: &[f32], weights: &mut [f32], largest: &[f32], sums: &mut [f32], threshold: f32) -> u32 {
    let mut kept = 0;
    let chunks = z.chunks(CHUNK).zip(weights.chunks_mut(CHUNK)).zip(largest).zip(sums);
    for (((z, weights), largest), kept_sum) in chunks {
        if *largest < threshold {
            *kept_sum = 0.0;
            continue;
        }
        let (mut sum, mut count) = (L::zero(), L::zero());
        let whole = z.len() - z.len() % L::N;
        for_lanes!(L, whole, |i, n| {
            // SAFETY: i + n ≤ the length of both.
            unsafe {
                let v = load::<L>(z, i, n);
                let weight = load::<L>(weights, i, n).zero_below(v, threshold);
                store(weight, weights, i, n);
                sum = sum.add(weight);
                count = count.add(L::splat(1.0).zero_below(v, threshold));
            }
        });
        let (mut sum, mut count) = (sum.sum(), count.sum() as u32);
        for (z, weight) in z[whole..].iter().zip(&mut weights[whole..]) {
            if *z >= threshold {
                sum += *weight;
                count += 1;
            } else {
                *weight = 0.0;
            }
        }
        *kept_sum = sum;
        kept += count;
    }
    kept
}

/// The same for a band of z.
fn keep_band(z: &[f32], weights: &mut [f32], sums: &mut [f32], threshold: f32, ceiling: f32) -> u32 {
    let mut kept = 0;
    for ((z, weights), kept_sum) in z.chunks(CHUNK).zip(weights.chunks_mut(CHUNK)).zip(sums) {
        *kept_sum = 0.0;
        for (z, weight) in z.iter().zip(weights) {
            if (threshold..=ceiling).contains(z) {
                *kept_sum += *weight;
                kept += 1;
            } else {
                *weight = 0.0;
            }
        }
    }
    kept
}

/// The smallest and the largest z that typical-p keeps of the tokens from `floor` on. The weights of chunks whose sum is
/// zero do not count.
fn typical_band(
    z: &[f32],
    weights: &[f32],
    sums: &[f32],
    members: &mut Vec<(f32, f32)>,
    max: f32,
    floor: f32,
    typical_p: f32,
) -> (f32, f32) {
    let floor = floor.max(f32::MIN);
    let kept = || {
        let chunks = z.chunks(CHUNK).zip(weights.chunks(CHUNK)).zip(sums).filter(|(_, sum)| **sum > 0.0);
        chunks.flat_map(|((z, w), _)| z.iter().zip(w)).filter(|(z, w)| **z >= floor && **w > 0.0)
    };
    let total: f64 = kept().map(|(_, w)| f64::from(*w)).sum();
    let log_total = total.ln();
    // H = ln S − Σ w (z − max) / S, and −ln p = ln S − (z − max).
    let mean: f64 = kept().map(|(z, w)| f64::from(*w) * f64::from(z - max)).sum::<f64>() / total;
    let entropy = (log_total - mean) as f32;
    let deviation = |z: f32| ((log_total as f32 - (z - max)) - entropy).abs();
    members.clear();
    members.extend(kept().map(|(z, w)| (-deviation(*z), *w)));
    let most = -reach(members, 0.0, f64::from(typical_p) * total).unwrap_or(f32::NEG_INFINITY);
    let band = kept().filter(|(z, _)| deviation(**z) <= most);
    band.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), (z, _)| (low.min(*z), high.max(*z)))
}

/// The ids of a kept set, rising, where there are no more than `most`.
pub fn kept_ids(logits: &[f32], request: &Request, drawn: &Drawn, scratch: &Scratch) -> Vec<u32> {
    if drawn.kept == 0 || drawn.kept > request.kept_ids {
        return Vec::new();
    }
    if request.inverse_temperature < 0.0 {
        return vec![drawn.token];
    }
    let z = scratch.z[..logits.len()].iter().enumerate();
    z.filter(|(_, z)| (drawn.threshold..=drawn.ceiling).contains(*z)).map(|(v, _)| v as u32).collect()
}

/// The smallest z that is kept.
#[inline(always)]
fn threshold<L: Lanes>(
    z: &[f32],
    weights: &[f32],
    largest: &[f32],
    members: &mut Vec<(f32, f32)>,
    max: f32,
    request: &Request,
) -> f32 {
    // What is masked is never kept.
    let mut threshold = if request.mask_row == NO_MASK { f32::NEG_INFINITY } else { f32::MIN };
    let top_k = request.top_k as usize;
    if top_k > 0 && top_k < z.len() {
        threshold = threshold.max(kth_largest(z, largest, top_k));
    }
    if request.top_p < 1.0 {
        threshold = threshold.max(top_p_threshold::<L>(z, weights, largest, members, max, threshold, request.top_p));
    }
    if request.min_p > 0.0 {
        threshold = threshold.max((max + request.min_p.ln()).min(max));
    }
    threshold
}

/// The k-th largest z. The k-th largest of the chunks' maxima is no larger, so only what reaches it is looked at.
fn kth_largest(z: &[f32], largest: &[f32], k: usize) -> f32 {
    let falling = |a: &f32, b: &f32| b.total_cmp(a);
    let mut floor = f32::NEG_INFINITY;
    if k <= largest.len() {
        let mut maxima = largest.to_vec();
        floor = *maxima.select_nth_unstable_by(k - 1, falling).1;
    }
    let mut reaching: Vec<f32> = Vec::with_capacity(4 * k);
    for (z, _) in z.chunks(CHUNK).zip(largest).filter(|(_, largest)| **largest >= floor) {
        reaching.extend(z.iter().filter(|z| **z >= floor));
    }
    *reaching.select_nth_unstable_by(k - 1, falling).1
}

/// The largest z such that the tokens at or above it hold at least `top_p` of the mass of those at or above `floor`.
///
/// Some fixed distances from the maximum tell between which two of them it lies; the tokens there are selected from.
#[inline(always)]
fn top_p_threshold<L: Lanes>(
    z: &[f32],
    weights: &[f32],
    largest: &[f32],
    members: &mut Vec<(f32, f32)>,
    max: f32,
    floor: f32,
    top_p: f32,
) -> f32 {
    /// In nats; the last one reaches every token.
    const DISTANCES: [f32; 8] = [0.25, 1.0, 2.0, 3.5, 5.5, 8.0, 12.0, f32::INFINITY];
    let bounds = DISTANCES.map(|d| floor.max(max - d));
    let mut mass = [0.0f64; DISTANCES.len()];
    for (z, weights) in z.chunks(CHUNK).zip(weights.chunks(CHUNK)) {
        let mut sums = [L::zero(); 16];
        let whole = z.len() - z.len() % L::N;
        for_lanes!(L, whole, |i, n| {
            // SAFETY: i + n ≤ the length of both.
            let (v, weight) = unsafe { (load::<L>(z, i, n), load::<L>(weights, i, n)) };
            for (sum, bound) in sums.iter_mut().zip(bounds) {
                *sum = sum.add(weight.zero_below(v, bound));
            }
        });
        for (mass, sum) in mass.iter_mut().zip(L::sums(sums)) {
            *mass += f64::from(sum);
        }
        for (z, weight) in z[whole..].iter().zip(&weights[whole..]) {
            for (mass, bound) in mass.iter_mut().zip(bounds) {
                *mass += if *z >= bound { f64::from(*weight) } else { 0.0 };
            }
        }
    }
    let wanted = f64::from(top_p) * mass[DISTANCES.len() - 1];
    let found = mass.iter().position(|m| *m >= wanted).unwrap_or(DISTANCES.len() - 1);
    let low = bounds[found];
    let (high, above) = if found == 0 { (f32::INFINITY, 0.0) } else { (bounds[found - 1], mass[found - 1]) };
    members.clear();
    for ((z, weights), _) in z.chunks(CHUNK).zip(weights.chunks(CHUNK)).zip(largest).filter(|(_, l)| **l >= low) {
        for (z, weight) in z.iter().zip(weights).filter(|(z, _)| **z >= low && **z < high) {
            members.push((*z, *weight));
        }
    }
    reach(members, above, wanted).unwrap_or(max)
}

/// The z of the member at which the mass above, with the members from the largest z on, reaches `wanted`; the smallest
/// one if rounding left the members short of it; `None` if there are none.
fn reach(mut members: &mut [(f32, f32)], mut above: f64, wanted: f64) -> Option<f32> {
    // The larger half again and again: a selection, not a sort.
    while members.len() > 32 {
        let middle = members.len() / 2;
        members.select_nth_unstable_by(middle, |a, b| b.0.total_cmp(&a.0));
        let (upper, lower) = members.split_at_mut(middle);
        let mass: f64 = upper.iter().map(|(_, w)| f64::from(*w)).sum();
        if above + mass >= wanted {
            members = upper;
        } else {
            above += mass;
            members = lower;
        }
    }
    members.sort_unstable_by(|a, b| b.0.total_cmp(&a.0));
    for (z, weight) in &*members {
        above += f64::from(*weight);
        if above >= wanted {
            return Some(*z);
        }
    }
    members.last().map(|(z, _)| *z)
}
