//! up ← silu(gate) · up with silu(x) = x / (1 + e^(−x)). The GPU does it in [`super::linear_gated`].

use super::lanes::{Lanes, for_each_isa, for_lanes, load, store};

for_each_isa! {
    /// The CPU twin, element by element.
    pub fn silu_mul(gate: &[f32], up: &mut [f32]) = body
}

#[inline(always)]
fn body<L: Lanes>(gate: &[f32], up: &mut [f32]) {
    let len = gate.len().min(up.len());
    for_lanes!(L, len, |i, n| {
        // SAFETY: i + n ≤ len, at most the length of both.
        unsafe {
            store(gated_lanes(load::<L>(gate, i, n), load::<L>(up, i, n)), up, i, n);
        }
    });
}

/// silu(gate) · up of some lanes.
#[inline(always)]
pub(super) fn gated_lanes<L: Lanes>(gate: L, up: L) -> L {
    let sigmoid_inverse = L::splat(1.0).add(L::zero().sub(gate).exp());
    gate.div(sigmoid_inverse).mul(up)
}
