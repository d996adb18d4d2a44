//! The kernels: one file each (`linear` is a folder), with its parameters, its dispatch rule and its CPU twin. The shader of the same stem
//! is under `shaders/`. Letters in comments are those of `shaders/README.md`.

pub mod adjust_logits;
pub mod attention;
pub mod attention_join;
pub mod attention_tiles;
pub mod embed;
pub mod gather_rows;
pub mod head;
pub mod kv_write;
pub(crate) mod lanes;
pub mod linear;
pub mod linear_gated;
pub mod linear_qkv;
pub mod log_sum_exp;
pub mod lora_down;
pub mod lora_up;
pub mod philox;
pub mod rms_norm;
pub mod rope;
pub mod sample;
pub mod silu_mul;
pub mod top_k;

pub use lanes::Isa;

/// Keys in a KV block.
pub const KV_BLOCK: usize = 16;

/// One row of a step, as every kernel that needs it sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct RowMeta {
    /// The token id.
    pub token: u32,
    /// Its position in its sequence, from 0.
    pub position: u32,
    /// Where its key and value go: block · [`KV_BLOCK`] + place in the block.
    pub slot: u32,
    /// Where its sequence's list of blocks begins in the step's block tables.
    pub table: u32,
}

/// What a shader may do with a storage binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// `var<storage, read>`.
    Read,
    /// `var<storage, read_write>`.
    Write,
}

/// A shader and what it binds: the parameter struct as immediates, and the storage buffers from binding 1 on, in order.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// The stem of the shader and of the twin.
    pub name: &'static str,
    /// The WGSL source, before [`crate::backend::gpu`] resolves its `#if` lines.
    pub source: &'static str,
    /// Bytes of the parameter struct.
    pub params_size: usize,
    /// Storage bindings from 1 on: the variable's name and its access.
    pub bindings: &'static [(&'static str, Access)],
    /// What follows them in the variants that add adapters.
    pub adapter_bindings: &'static [(&'static str, Access)],
}

impl Kernel {
    /// The storage bindings of a variant with or without adapters, from 1 on.
    pub fn bindings(&self, adapters: bool) -> impl Iterator<Item = (&'static str, Access)> + use<> {
        let more = if adapters { self.adapter_bindings } else { &[] };
        self.bindings.iter().chain(more).copied()
    }
}

/// Every kernel, for the table of pipelines and for the test that walks `shaders/`.
pub const ALL: [&Kernel; 15] = [
    &adjust_logits::KERNEL,
    &attention::KERNEL,
    &attention_join::KERNEL,
    &attention_tiles::KERNEL,
    &embed::KERNEL,
    &gather_rows::KERNEL,
    &head::KERNEL,
    &linear::KERNEL,
    &linear_gated::KERNEL,
    &linear_qkv::KERNEL,
    &log_sum_exp::KERNEL,
    &lora_down::KERNEL,
    &rms_norm::KERNEL,
    &sample::KERNEL,
    &top_k::KERNEL,
];

macro_rules! kernel {
    ($name:literal, $params:ty, $bindings:tt) => {
        $crate::kernels::kernel!($name, $params, $bindings, []);
    };
    (
        $name:literal,
        $params:ty,
        [$(($binding:literal, $access:ident)),* $(,)?],
        [$(($more:literal, $more_access:ident)),* $(,)?] $(,)?
    ) => {
        /// The shader and its bindings.
        pub const KERNEL: $crate::kernels::Kernel = $crate::kernels::Kernel {
            name: $name,
            source: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $name, ".wgsl")),
            params_size: size_of::<$params>(),
            bindings: &[$(($binding, $crate::kernels::Access::$access)),*],
            adapter_bindings: &[$(($more, $crate::kernels::Access::$more_access)),*],
        };
    };
}
pub(crate) use kernel;

/// A matrix [rows, cols] in its stored dtype, little endian, row major, of any alignment.
#[derive(Clone, Copy)]
pub struct MatrixView<'a> {
    dtype: crate::weights::Dtype,
    bytes: &'a [u8],
    rows: usize,
    cols: usize,
}

impl<'a> MatrixView<'a> {
    /// A view of `bytes`.
    ///
    /// # Panics
    /// If `bytes` does not hold exactly rows · cols elements.
    pub fn new(dtype: crate::weights::Dtype, bytes: &'a [u8], rows: usize, cols: usize) -> Self {
        assert_eq!(Some(bytes.len()), rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size())));
        MatrixView { dtype, bytes, rows, cols }
    }

    /// How an element is stored.
    pub fn dtype(&self) -> crate::weights::Dtype {
        self.dtype
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The bytes of row `i`.
    pub fn row(&self, i: usize) -> &'a [u8] {
        self.rows_bytes(i..i + 1)
    }

    /// The bytes of some rows, one after the other.
    pub fn rows_bytes(&self, rows: std::ops::Range<usize>) -> &'a [u8] {
        let stride = self.cols * self.dtype.size();
        &self.bytes[rows.start * stride..rows.end * stride]
    }
}

/// An output that several tasks write, each its own elements.
pub(crate) struct SharedMut<'a, T = f32> {
    start: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for SharedMut<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedMut<'_, T> {}

// SAFETY: it is a `&mut [T]` of plain values whose users promise to touch disjoint parts.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(out: &'a mut [T]) -> Self {
        SharedMut { start: out.as_mut_ptr(), len: out.len(), lifetime: std::marker::PhantomData }
    }

    /// The elements of `range`.
    ///
    /// # Safety
    /// While the slice lives nobody else may touch these elements.
    ///
    /// # Panics
    /// If `range` is not inside the buffer.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn slice(&self, range: std::ops::Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the buffer, and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
