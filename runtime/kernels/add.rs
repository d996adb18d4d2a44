//! y ← y + x, element by element: the residual stream takes what a block computed.

/// Parameters of the shader.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T · D.
    pub len: u32,
}

super::kernel!("add", Params, [("x", Read), ("y", Write)]);

/// Elements a workgroup handles.
pub const ELEMENTS_PER_WORKGROUP: u32 = 256;

/// The CPU twin.
pub fn add(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += x;
    }
}
