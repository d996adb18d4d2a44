//! out[m] = x[index[m]]: the rows that asked for an output, packed.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// M.
    pub rows: u32,
    /// D.
    pub width: u32,
    /// First row of the step in the list of indices.
    pub first: u32,
}

super::kernel!("gather_rows", Params, [("index", Read), ("x", Read), ("out", Write)]);

/// The CPU twin; `x` is [T, width], `out` is [M, width].
pub fn gather_rows(index: &[u32], x: &[f32], width: usize, out: &mut [f32]) {
    for (&from, out) in index.iter().zip(out.chunks_exact_mut(width)) {
        let start = from as usize * width;
        out.copy_from_slice(&x[start..start + width]);
    }
}
