//! out[t] = table[token[t]], converted to f32.

use super::{MatrixView, RowMeta};

/// Parameters of the shader, which sees one slice of the table's rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T.
    pub rows: u32,
    /// D.
    pub width: u32,
    /// Elements from one row of the slice to the next.
    pub stride: u32,
    /// First table row in the slice.
    pub first: u32,
    /// Table rows in the slice; other tokens are left alone.
    pub count: u32,
    /// First row of the step in the table of rows.
    pub first_meta: u32,
    /// First draw of the step before.
    pub first_drawn: u32,
}

super::kernel!("embed", Params, [("rows", Read), ("drawn", Read), ("table", Read), ("out", Write)]);

/// In [`RowMeta::token`]: the rest is the number of the output of the step before whose draw is the token.
pub const FROM_DRAW: u32 = 1 << 31;

/// The CPU twin, for the rows in `rows`; `out` is [rows, D].
///
/// # Panics
/// If a token is not a row of the table: the engine checks ids where they enter.
pub fn embed(rows: &[RowMeta], table: MatrixView, out: &mut [f32]) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(table.cols())) {
        table.dtype().read_f32(table.row(row.token as usize), out);
    }
}
