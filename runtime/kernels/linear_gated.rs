//! out = scale · silu(x · gateᵀ + b) · (x · upᵀ + b): the two products of a gated MLP in one dispatch.
//!
//! The twin is two products ([`super::linear`]) and [`super::silu_mul`].

/// Parameters of the shader, which sees one slice of the interleaved weight's rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// K.
    pub k: u32,
    /// Elements from one row of the slice to the next.
    pub stride: u32,
    /// Weight rows in the slice.
    pub count: u32,
    /// First weight row of the slice; even.
    pub first: u32,
    /// F: elements a row of `out`.
    pub out_stride: u32,
    /// 1 if there is a bias.
    pub has_bias: u32,
    /// First row of the slice that is used.
    pub slice_row: u32,
    /// First row of `x` that is used.
    pub x_first: u32,
    /// Multiplies the result: a power of two.
    pub scale: f32,
}

super::kernel!(
    "linear_gated",
    Params,
    [("x", Read), ("weight", Read), ("scales", Read), ("bias", Read), ("out", Write)],
    [("adapters", Read), ("down", Read)],
);
