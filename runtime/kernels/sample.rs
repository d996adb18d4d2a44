//! Draws one token from a row of logits.
//!
//! In transformers' order: repetition penalty, temperature, top-k, top-p, min-p. With z = penalised logit / T and
//! w = e^(z − max z), the kept set is every token whose z reaches a threshold, the largest of
//! - the k-th largest z (top-k),
//! - the largest z such that the tokens at or above it hold at least top_p of the mass that top-k left (top-p),
//! - max z + ln(min_p) (min-p).
//!
//! Equal values share a fate, so count and threshold are enough to rebuild the set. The draw inverts the cumulative
//! distribution over the kept tokens in the order of their ids. At temperature 0 the largest z wins, of equals the
//! smallest id.

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// V.
    pub vocab: u32,
    /// Words of a row of `seen`.
    pub seen_words: u32,
}

super::kernel!("sample", Params, [("logits", Read), ("requests", Read), ("seen", Read), ("drawn", Write)]);

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
    /// 1: off. Positive logits of seen tokens are divided by it, others multiplied.
    pub repetition_penalty: f32,
    /// Row of `seen` with the tokens of the sequence so far, one bit each.
    pub seen_row: u32,
    /// 1 if the row asks for a sample; 0: skip it.
    pub active: u32,
}

/// What a row got.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Drawn {
    /// The token; [`super::top_k::NO_TOKEN`] if the row has no finite maximum.
    pub token: u32,
    /// Tokens in the kept set.
    pub kept: u32,
    /// Smallest z in the kept set.
    pub threshold: f32,
    /// Log-probability of the token in the distribution it was drawn from.
    pub logprob: f32,
    /// The token's logit as the model gave it.
    pub logit: f32,
}

/// The logit of `token` after the repetition penalty.
#[inline(always)]
fn penalised(logit: f32, token: usize, penalty: f32, seen: &[u32]) -> f32 {
    if penalty == 1.0 || seen[token / 32] >> (token % 32) & 1 == 0 {
        logit
    } else if logit > 0.0 {
        logit / penalty
    } else {
        logit * penalty
    }
}

for_each_isa! {
    /// The CPU twin for one row. `seen` has a bit a token (unused where the penalty is 1); `z` is scratch of V floats.
    pub fn sample(logits: &[f32], request: &Request, seen: &[u32], z: &mut Vec<f32>) -> Drawn = body
}

#[inline(always)]
fn body<L: Lanes>(logits: &[f32], request: &Request, seen: &[u32], z: &mut Vec<f32>) -> Drawn {
    let penalty = request.repetition_penalty;
    let greedy = request.inverse_temperature < 0.0;
    let factor = if greedy { 1.0 } else { request.inverse_temperature };
    z.clear();
    if penalty == 1.0 {
        z.extend(logits.iter().map(|l| l * factor));
    } else {
        z.extend(logits.iter().enumerate().map(|(v, l)| penalised(*l, v, penalty, seen) * factor));
    }
    let (mut best, mut max) = (super::top_k::NO_TOKEN, f32::NEG_INFINITY);
    let mut broken = false;
    for (v, &z) in z.iter().enumerate() {
        broken |= z.is_nan();
        if z > max {
            (best, max) = (v as u32, z);
        }
    }
    if broken || !max.is_finite() {
        let token = super::top_k::NO_TOKEN;
        return Drawn { token, kept: 0, threshold: f32::NAN, logprob: f32::NAN, logit: f32::NAN };
    }
    if greedy {
        return Drawn { token: best, kept: 1, threshold: max, logprob: 0.0, logit: logits[best as usize] };
    }

    let threshold = threshold(z, max, request);
    let kept = z.iter().map(|z| u32::from(*z >= threshold)).sum();
    // z becomes the weights of the kept tokens; zero elsewhere.
    let len = z.len();
    for_lanes!(L, len, |i, n| {
        // SAFETY: i + n ≤ len.
        unsafe {
            let v = load::<L>(z, i, n);
            store(v.sub(L::splat(max)).exp().zero_below(v, threshold), z, i, n);
        }
    });
    const CHUNK: usize = super::log_sum_exp::CHUNK;
    let mut sums = Vec::with_capacity(len.div_ceil(CHUNK));
    sums.extend(z.chunks(CHUNK).map(|chunk| chunk.iter().sum::<f32>()));
    let total: f32 = sums.iter().sum();
    let target = request.uniform * total;
    let mut below = 0.0f32;
    let mut token = best as usize;
    'search: for (c, sum) in sums.iter().enumerate() {
        if *sum == 0.0 {
            continue;
        }
        let chunk = &z[c * CHUNK..len.min((c + 1) * CHUNK)];
        let is_last = sums[c + 1..].iter().all(|s| *s == 0.0);
        if below + sum > target || is_last {
            let mut within = below;
            for (j, &w) in chunk.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                // The last kept token of the chunk takes what rounding leaves over.
                token = c * CHUNK + j;
                within += w;
                if within > target {
                    break 'search;
                }
            }
            break;
        }
        below += sum;
    }
    let z_token = penalised(logits[token], token, penalty, seen) * factor;
    let logprob = (z_token - max) - total.ln();
    Drawn { token: token as u32, kept, threshold, logprob, logit: logits[token] }
}

/// The smallest z that is kept.
fn threshold(z: &[f32], max: f32, request: &Request) -> f32 {
    let mut threshold = f32::NEG_INFINITY;
    let top_k = request.top_k as usize;
    if top_k > 0 && top_k < z.len() {
        let mut copy = z.to_vec();
        let (_, kth, _) = copy.select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a));
        threshold = *kth;
    }
    if request.top_p < 1.0 {
        threshold = threshold.max(top_p_threshold(z, max, threshold, request.top_p));
    }
    if request.min_p > 0.0 {
        threshold = threshold.max((max + request.min_p.ln()).min(max));
    }
    threshold
}

/// The largest z such that the tokens at or above it hold at least `top_p` of the mass of those at or above `floor`.
///
/// A histogram by distance from the maximum finds the bin where the mass is reached; only that bin is sorted.
fn top_p_threshold(z: &[f32], max: f32, floor: f32, top_p: f32) -> f32 {
    const BINS: usize = 1024;
    const BINS_PER_NAT: f32 = 32.0;
    let bin = |z: f32| (((max - z) * BINS_PER_NAT) as usize).min(BINS - 1);
    let weight = |z: f32| f64::from(z - max).exp();
    let mut mass = vec![0.0f64; BINS];
    for &z in z.iter().filter(|z| **z >= floor) {
        mass[bin(z)] += weight(z);
    }
    let wanted = f64::from(top_p) * mass.iter().sum::<f64>();
    let mut above = 0.0;
    for (b, in_bin) in mass.iter().enumerate() {
        if above + in_bin < wanted {
            above += in_bin;
            continue;
        }
        let mut members: Vec<f32> = z.iter().copied().filter(|&z| z >= floor && bin(z) == b).collect();
        members.sort_unstable_by(|a, b| b.total_cmp(a));
        for z in &members {
            above += weight(*z);
            if above >= wanted {
                return *z;
            }
        }
        // The bin's sum in another order fell short by rounding: its last member.
        if let Some(last) = members.last() {
            return *last;
        }
    }
    max
}
