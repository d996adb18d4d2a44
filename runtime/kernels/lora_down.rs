//! down[t, j] = scale · Σ_k x[t, k] · a[j, k]: an adapter's first factor, for the rows that have one.

use super::linear::{Hint, Packed, Weight, column_sums};
use super::{Isa, MatrixView};
use crate::weights::Dtype;

/// Parameters of the shader. It finds the factors of all adapters, of several products that share x, in one buffer.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// K.
    pub k: u32,
    /// First row of the step in `slots`.
    pub first_meta: u32,
    /// Products that share x.
    pub parts: u32,
    /// What x was divided by: a power of two.
    pub scale: f32,
}

super::kernel!("lora_down", Params, [("x", Read), ("slots", Read), ("adapters", Read), ("down", Write)]);

/// Elements of `down` that a workgroup of the shader owns.
pub const COLS: u32 = 8;

/// Words of the shader's buffer before the factors: the stride of `down`, then four words a slot.
pub fn header_words(slots: usize) -> usize {
    4 + 4 * slots
}

/// The CPU twin: `x` is [rows, K], `a` [R, K], `down` [rows, R]. f32 FMA, whatever the base weights' arithmetic is.
///
/// # Panics
/// If the lengths do not fit.
pub fn lora_down(isa: Isa, x: &[f32], a: &[f32], rank: usize, scale: f32, down: &mut [f32]) {
    let k = a.len() / rank;
    let rows = down.len() / rank;
    let weight = Weight::Stored(MatrixView::new(Dtype::F32, bytemuck::cast_slice(a), rank, k));
    column_sums(isa, &Packed::plain(x, rows, k), 0..rows, &weight, 0..rank, down, Hint::NONE);
    down.iter_mut().for_each(|v| *v *= scale);
}
