//! The pass over the vocabulary: logits of a tile of tokens and what [`super::log_sum_exp`] needs of them, in one kernel.
//!
//! The twin is a product ([`super::linear`]) and [`super::log_sum_exp::log_sum_exp`] of each tile.

/// Parameters of the shader, which sees one slice of the head's rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// K.
    pub k: u32,
    /// Elements from one row of the slice to the next.
    pub stride: u32,
    /// Head rows in the slice.
    pub count: u32,
    /// First token of the slice, a multiple of the tile's columns.
    pub first: u32,
    /// First row of the slice that is used.
    pub slice_row: u32,
    /// First row of `x` that is used.
    pub x_first: u32,
    /// V.
    pub vocab: u32,
    /// Tiles that the vocabulary has.
    pub tiles: u32,
    /// 1 to store the logits.
    pub keep: u32,
    /// The first row's target.
    pub first_target: u32,
}

super::kernel!(
    "head",
    Params,
    [
        ("x", Read),
        ("weight", Read),
        ("scales", Read),
        ("bias", Read),
        ("targets", Read),
        ("logits", Write),
        ("stats", Write),
    ]
);
