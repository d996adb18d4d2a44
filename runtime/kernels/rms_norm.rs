//! out = x / sqrt(mean(x²) + eps) · weight, row by row.

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T or M.
    pub rows: u32,
    /// D.
    pub width: u32,
    /// Added to the mean square.
    pub eps: f32,
}

super::kernel!("rms_norm", Params, [("x", Read), ("weight", Read), ("out", Write)]);

for_each_isa! {
    /// The CPU twin; `x` and `out` are [rows, D], `weight` is [D].
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = body
}

#[inline(always)]
fn body<L: Lanes>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mut squares = L::zero();
        for_lanes!(L, width, |i, n| {
            // SAFETY: i + n ≤ width.
            let v = unsafe { load::<L>(x, i, n) };
            squares = squares.mul_add(v, v);
        });
        let scale = L::splat(1.0 / (squares.sum() / width as f32 + eps).sqrt());
        for_lanes!(L, width, |i, n| {
            // SAFETY: i + n ≤ width, the length of all three.
            unsafe { store(load::<L>(x, i, n).mul(scale).mul(load::<L>(weight, i, n)), out, i, n) };
        });
    }
}
