//! Queries, keys and values in one dispatch: the products, the rotation, and the write into the paged cache.
//!
//! The twin is three products ([`super::linear`]), [`super::rope`] and [`super::kv_write`].

/// Parameters of the shader, which sees one slice of the merged weight's rows at a time.
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
    /// 1 if there is a bias.
    pub has_bias: u32,
    /// First row of the slice that is used.
    pub slice_row: u32,
    /// First row of `x` that is used.
    pub x_first: u32,
    /// H.
    pub heads: u32,
    /// G.
    pub kv_heads: u32,
    /// E.
    pub head_dim: u32,
    /// First row of the step in `rows` and `cos_sin`.
    pub first_meta: u32,
    /// What queries are multiplied by after the rotation.
    pub q_scale: f32,
}

super::kernel!(
    "linear_qkv",
    Params,
    [
        ("x", Read),
        ("weight", Read),
        ("scales", Read),
        ("bias", Read),
        ("rows", Read),
        ("cos_sin", Read),
        ("q", Write),
        ("keys", Write),
        ("values", Write),
    ],
    [("adapters", Read), ("down", Read)],
);
