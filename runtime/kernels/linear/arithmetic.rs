//! Which arithmetic computes a product: one table.

use super::Weight;
use crate::kernels::Isa;
use crate::weights::Dtype;

/// How products are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// Inputs of a product may be rounded to bf16 where the weights are bf16 and the processor multiplies that faster
    /// (AVX-512 BF16, AMX), to 16-bit integers where the weights are quantised, and to f16 where a GPU has matrix units.
    #[default]
    Auto,
    /// Inputs are not rounded; on AMX they keep 16 bits of mantissa.
    F32,
}

/// How the elements of a product are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// f32 inputs, weights widened exactly, f32 FMA. Lane j adds the products k ≡ j (mod lanes) in rising k.
    Fma,
    /// Inputs rounded to bf16, `vdpbf16ps`: lane j adds the pairs k/2 ≡ j (mod 16) in rising k.
    Bf16,
    /// Inputs as 1 bf16 term, or as 2 whose sum has 16 bits of mantissa; `tdpbf16ps` over blocks of 32 in rising k.
    Amx {
        /// 1 or 2.
        terms: usize,
    },
    /// Inputs rounded to 16-bit integers with one scale a row, times 8-bit weights: exact sums over blocks of
    /// [`super::INT8_BLOCK`], which are scaled and added in f32.
    Int8,
    /// The same with 4-bit weights and blocks of [`super::INT4_BLOCK`].
    Int4,
}

impl Arithmetic {
    /// The arithmetic of products that share their input. Weights of several kinds are computed in f32.
    pub fn of<'a>(isa: Isa, precision: Precision, weights: impl IntoIterator<Item = Weight<'a>>) -> Self {
        let mut chosen = None;
        for weight in weights {
            let one = match (weight, isa, precision) {
                (Weight::Int8(_), _, Precision::Auto) => Arithmetic::Int8,
                (Weight::Int4(_), _, Precision::Auto) => Arithmetic::Int4,
                (Weight::Stored(view), Isa::Avx512Bf16, Precision::Auto) if view.dtype() == Dtype::BF16 => {
                    Arithmetic::Bf16
                }
                (Weight::Stored(view), Isa::Amx, _) if view.dtype() == Dtype::BF16 => {
                    Arithmetic::Amx { terms: if precision == Precision::Auto { 1 } else { 2 } }
                }
                _ => Arithmetic::Fma,
            };
            if chosen.is_some_and(|c| c != one) {
                return Arithmetic::Fma;
            }
            chosen = Some(one);
        }
        chosen.unwrap_or(Arithmetic::Fma)
    }
}
