//! AVX2 (8 lanes) and AVX-512 (16 lanes).
//!
//! These methods are inlined into functions that enable the instruction set (`for_each_isa`); elsewhere they must not
//! be called, which is the trait's condition.
#![allow(clippy::undocumented_unsafe_blocks)] // Each block is one intrinsic under that condition.

use std::arch::x86_64::*;

use super::Lanes;

#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Avx2(__m256);

/// Ones for lanes below n: read eight elements from index 8 − n.
static MASK: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    debug_assert!(n <= 8);
    unsafe { _mm256_loadu_si256(MASK.as_ptr().add(8 - n).cast()) }
}

impl Lanes for Avx2 {
    const N: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Avx2(unsafe { _mm256_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Avx2(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        Avx2(unsafe { _mm256_maskload_ps(p, mask(n)) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        Avx2(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())))) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        Avx2(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        unsafe { _mm256_maskstore_ps(p, mask(n), self.0) }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_add_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_sub_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_mul_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_div_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Avx2(unsafe { _mm256_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_max_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        Avx2(unsafe { _mm256_min_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        Avx2(unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        unsafe {
            let whole = _mm256_add_epi32(_mm256_cvtps_epi32(self.0), _mm256_set1_epi32(127));
            Avx2(_mm256_castsi256_ps(_mm256_slli_epi32::<23>(whole)))
        }
    }
    #[inline(always)]
    fn zero_below(self, x: Self, bound: f32) -> Self {
        unsafe {
            let below = _mm256_cmp_ps::<_CMP_LT_OQ>(x.0, _mm256_set1_ps(bound));
            Avx2(_mm256_andnot_ps(below, self.0))
        }
    }
    /// ((0 + 2) + (1 + 3)) + ((4 + 6) + (5 + 7)).
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let halves = _mm256_add_ps(self.0, _mm256_permute_ps::<0b01_00_11_10>(self.0));
            let quads = _mm256_add_ps(halves, _mm256_movehdup_ps(halves));
            _mm_cvtss_f32(_mm_add_ss(_mm256_castps256_ps128(quads), _mm256_extractf128_ps::<1>(quads)))
        }
    }
    #[inline(always)]
    fn sums(v: [Self; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        unsafe {
            // The vectors are transparent around their registers.
            let [low, high] = std::mem::transmute::<[Self; 16], [[__m256; 8]; 2]>(v);
            _mm256_storeu_ps(out.as_mut_ptr(), sums_of_eight(low));
            _mm256_storeu_ps(out.as_mut_ptr().add(8), sums_of_eight(high));
        }
        out
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    type Pairs = __m256i;
    type Ints = __m256i;
    #[inline(always)]
    fn zero_ints() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m256i {
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, i: usize) -> __m256i {
        unsafe {
            let bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128(block.cast()));
            let nibbles =
                if i < 16 { _mm256_and_si256(bytes, _mm256_set1_epi16(15)) } else { _mm256_srli_epi16::<4>(bytes) };
            _mm256_sub_epi16(nibbles, _mm256_set1_epi16(8))
        }
    }
    #[inline(always)]
    unsafe fn load_i16(p: *const i16) -> __m256i {
        unsafe { _mm256_loadu_si256(p.cast()) }
    }
    #[inline(always)]
    fn add_pairs(sum: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    fn from_ints(v: __m256i) -> Self {
        Avx2(unsafe { _mm256_cvtepi32_ps(v) })
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe {
            let q = _mm_max_ps(_mm256_castps256_ps128(self.0), _mm256_extractf128_ps::<1>(self.0));
            let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)))
        }
    }
}

/// Lane i is the sum of v[i]: a transpose whose every stage is an addition, in the order of [`Avx2::sum`].
#[inline(always)]
unsafe fn sums_of_eight(v: [__m256; 8]) -> __m256 {
    unsafe {
        let low = sums_of_four(v[0], v[1], v[2], v[3]);
        let high = sums_of_four(v[4], v[5], v[6], v[7]);
        _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(low, high), _mm256_permute2f128_ps::<0x31>(low, high))
    }
}

/// In each half: the sums of the halves of four vectors.
#[inline(always)]
unsafe fn sums_of_four(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    unsafe {
        let ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
        let cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
        _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)))
    }
}

/// Lane i is the sum of v[i], in the order of [`Avx512::sum`].
#[inline(always)]
unsafe fn sums_of_sixteen(v: [__m512; 16]) -> __m512 {
    unsafe {
        let low = joined(quarter_sums(v[0], v[1], v[2], v[3]), quarter_sums(v[4], v[5], v[6], v[7]));
        let high = joined(quarter_sums(v[8], v[9], v[10], v[11]), quarter_sums(v[12], v[13], v[14], v[15]));
        joined(low, high)
    }
}

/// In each quarter: the sums of the quarters of four vectors.
#[inline(always)]
unsafe fn quarter_sums(a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    unsafe {
        let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)))
    }
}

/// Neighbouring quarters added: a's two sums, then b's.
#[inline(always)]
unsafe fn joined(a: __m512, b: __m512) -> __m512 {
    unsafe { _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b)) }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Avx512(pub(crate) __m512);

impl Lanes for Avx512 {
    const N: usize = 16;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Avx512(unsafe { _mm512_set1_ps(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        Avx512(unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as __mmask16, p) })
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as __mmask16, self.0) }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_add_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_sub_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_mul_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_div_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Avx512(unsafe { _mm512_fmadd_ps(a.0, b.0, self.0) })
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_max_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        Avx512(unsafe { _mm512_min_ps(self.0, o.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        Avx512(unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0) })
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        unsafe {
            let whole = _mm512_add_epi32(_mm512_cvtps_epi32(self.0), _mm512_set1_epi32(127));
            Avx512(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(whole)))
        }
    }
    #[inline(always)]
    fn zero_below(self, x: Self, bound: f32) -> Self {
        unsafe {
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(x.0, _mm512_set1_ps(bound));
            Avx512(_mm512_mask_mov_ps(self.0, below, _mm512_setzero_ps()))
        }
    }
    /// Of each quarter (0 + 2) + (1 + 3), then the quarters (0 + 1) + (2 + 3).
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let halves = _mm512_add_ps(self.0, _mm512_permute_ps::<0b01_00_11_10>(self.0));
            let quarters = _mm512_add_ps(halves, _mm512_movehdup_ps(halves));
            let pairs = _mm512_add_ps(quarters, _mm512_shuffle_f32x4::<0b10_11_00_01>(quarters, quarters));
            let upper = _mm512_extractf32x4_ps::<2>(pairs);
            _mm_cvtss_f32(_mm_add_ss(_mm512_castps512_ps128(pairs), upper))
        }
    }
    #[inline(always)]
    fn sums(v: [Self; 16]) -> [f32; 16] {
        let mut out = [0.0; 16];
        // The vectors are transparent around their registers.
        unsafe {
            _mm512_storeu_ps(out.as_mut_ptr(), sums_of_sixteen(std::mem::transmute::<[Self; 16], [__m512; 16]>(v)))
        };
        out
    }
    #[inline(always)]
    fn prefetch(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn prefetch_far(p: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
    }
    type Pairs = __m512i;
    type Ints = __m512i;
    #[inline(always)]
    fn zero_ints() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512i {
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(p.cast())) }
    }
    /// A whole block.
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, _i: usize) -> __m512i {
        unsafe {
            // The bytes twice, the second time four bits to the right: within words, so what comes from above is masked.
            let twice = _mm256_broadcastsi128_si256(_mm_loadu_si128(block.cast()));
            let shifted = _mm256_srlv_epi64(twice, _mm256_setr_epi64x(0, 0, 4, 4));
            let nibbles = _mm256_and_si256(shifted, _mm256_set1_epi8(15));
            _mm512_cvtepi8_epi16(_mm256_sub_epi8(nibbles, _mm256_set1_epi8(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_i16(p: *const i16) -> __m512i {
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    fn add_pairs(sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_add_epi32(sum, _mm512_madd_epi16(a, b)) }
    }
    #[inline(always)]
    fn from_ints(v: __m512i) -> Self {
        Avx512(unsafe { _mm512_cvtepi32_ps(v) })
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe {
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(self.0)));
            Avx2(_mm256_max_ps(_mm512_castps512_ps256(self.0), upper)).largest()
        }
    }
}
