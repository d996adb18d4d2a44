//! The K tokens with the largest logits of a row, largest first; of equal logits the smaller id first.
//!
//! The shader reads the row twice, whatever K is. Only where more than 1280 tokens reach the K-th largest of its 256
//! lanes' maxima (many equal logits, or large ones at ids with a pattern) it reads it up to 15 times.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// V.
    pub vocab: u32,
    /// K.
    pub k: u32,
}

super::kernel!("top_k", Params, [("logits", Read), ("best", Write)]);

/// Largest K.
pub const MAX_K: usize = 128;

/// Padding where a row has fewer than K tokens (or NaN logits).
pub const NO_TOKEN: u32 = u32::MAX;

/// A token and its logit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Candidate {
    /// Token id, or [`NO_TOKEN`].
    pub token: u32,
    /// Its logit.
    pub logit: f32,
}

/// The CPU twin for one row. NaN logits are never among the best.
pub fn top_k(logits: &[f32], k: usize) -> Vec<Candidate> {
    let mut best: Vec<Candidate> = Vec::with_capacity(k + 1);
    for (token, &logit) in logits.iter().enumerate() {
        let full = best.len() == k;
        if logit.is_nan() || (full && best.last().is_none_or(|worst| logit <= worst.logit)) {
            continue;
        }
        let place = best.partition_point(|c| c.logit >= logit);
        best.insert(place, Candidate { token: token as u32, logit });
        best.truncate(k);
    }
    best.resize(k, Candidate { token: NO_TOKEN, logit: f32::NEG_INFINITY });
    best
}
