//! Joins the segments of keys that the GPU's `attention` computed side by side.
//!
//! out[t, h] = Σ_s o[s] · 2^(m[s] − M) / Σ_s l[s] · 2^(m[s] − M), with M the largest m, in rising s.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// H.
    pub heads: u32,
    /// E.
    pub head_dim: u32,
    /// S, as attention had it.
    pub segments: u32,
}

super::kernel!("attention_join", Params, [("partials", Read), ("out", Write)]);

/// Workgroups of the shader: one a row and head.
pub fn workgroups(params: &Params) -> [u32; 3] {
    [params.heads, params.rows, 1]
}

/// The CPU twin. `partials` is [S, T, H, 2 + E], m and l before the sums; `out` is [T, H, E].
///
/// # Panics
/// If a length does not fit.
pub fn attention_join(partials: &[f32], segments: usize, head_dim: usize, out: &mut [f32]) {
    let queries = out.len() / head_dim;
    assert_eq!(partials.len(), segments * queries * (2 + head_dim));
    for (i, out) in out.chunks_exact_mut(head_dim).enumerate() {
        let (mut joined_max, mut joined_total) = (f32::MIN, 0.0);
        out.fill(0.0);
        for s in 0..segments {
            let partial = &partials[(s * queries + i) * (2 + head_dim)..][..2 + head_dim];
            let (max, total) = (partial[0], partial[1]);
            if max == f32::MIN && total == 0.0 {
                continue;
            }
            let both = max.max(joined_max);
            let (before, now) = ((joined_max - both).exp2(), (max - both).exp2());
            joined_total = joined_total * before + total * now;
            out.iter_mut().zip(&partial[2..]).for_each(|(sum, o)| *sum = *sum * before + o * now);
            joined_max = both;
        }
        out.iter_mut().for_each(|v| *v *= 1.0 / joined_total);
    }
}
