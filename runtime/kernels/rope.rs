//! Rotates each head of x by its position: (a, b) ← (a·cos − b·sin, b·cos + a·sin) for the pairs (i, i + E/2).
//!
//! cos and sin come as a table [T, E/2], computed once a step on the host: both backends rotate by the same angles.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// H or G.
    pub heads: u32,
    /// E / 2.
    pub half: u32,
}

super::kernel!("rope", Params, [("cos_sin", Read), ("x", Write)]);

/// The CPU twin; `x` is [rows, heads · E], `cos_sin` is [rows, 2, E/2].
pub fn rope(cos_sin: &[f32], half: usize, heads: usize, x: &mut [f32]) {
    for (angles, row) in cos_sin.chunks_exact(2 * half).zip(x.chunks_exact_mut(heads * 2 * half)) {
        let (cos, sin) = angles.split_at(half);
        for head in row.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (a, b) = (low[i], high[i]);
                low[i] = a * cos[i] - b * sin[i];
                high[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}
