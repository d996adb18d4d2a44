//! The element types of weights.

use half::{bf16, f16};

/// How an element is stored. All conversions to f32 are exact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
}

impl Dtype {
    /// Every dtype, for tests and tables.
    pub const ALL: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

    /// Bytes an element.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
        }
    }

    /// The name in a safetensors header.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
        }
    }

    pub(crate) fn from_safetensors(dtype: safetensors::Dtype) -> Option<Dtype> {
        match dtype {
            safetensors::Dtype::F32 => Some(Dtype::F32),
            safetensors::Dtype::F16 => Some(Dtype::F16),
            safetensors::Dtype::BF16 => Some(Dtype::BF16),
            _ => None,
        }
    }

    /// Little-endian elements as f32. Bytes beyond a whole number of elements are ignored.
    pub fn to_f32(self, bytes: &[u8]) -> Vec<f32> {
        match self {
            Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        }
    }

    /// As [`Dtype::to_f32`], into `out`, as far as both reach.
    pub fn read_f32(self, bytes: &[u8], out: &mut [f32]) {
        let halves = bytes.chunks_exact(2).map(|b| [b[0], b[1]]);
        match self {
            Dtype::F32 => {
                out.iter_mut()
                    .zip(bytes.chunks_exact(4))
                    .for_each(|(o, b)| *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
            }
            Dtype::F16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => out.iter_mut().zip(halves).for_each(|(o, b)| *o = bf16::from_le_bytes(b).to_f32()),
        }
    }

    /// Rounds f32 values to this dtype, little endian: what test fixtures and synthetic checkpoints are made with.
    pub fn from_f32(self, values: &[f32]) -> Vec<u8> {
        match self {
            Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }
}
