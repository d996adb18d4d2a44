//! Advanced SIMD: 4 lanes.
#![allow(clippy::undocumented_unsafe_blocks)] // Each block is one intrinsic of the baseline instruction set.

use std::arch::aarch64::*;

use half::f16;

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Neon(float32x4_t);

impl Lanes for Neon {
    const N: usize = 4;
    const REGISTERS: usize = 32;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Neon(unsafe { vdupq_n_f32(v) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        Neon(unsafe { vld1q_f32(p) })
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        let mut lanes = [0.0f32; 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(n) {
            *lane = unsafe { p.add(i).read_unaligned() };
        }
        unsafe { Self::load(lanes.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        unsafe {
            let half = vreinterpret_u16_u8(vld1_u8(p));
            Neon(vreinterpretq_f32_u32(vshlq_n_u32::<16>(vmovl_u16(half))))
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        let read = |i: usize| unsafe { p.add(2 * i).cast::<[u8; 2]>().read_unaligned() };
        let lanes: [f32; 4] = std::array::from_fn(|i| f16::from_le_bytes(read(i)).to_f32());
        unsafe { Self::load(lanes.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        unsafe { vst1q_f32(p, self.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        let mut lanes = [0.0f32; 4];
        unsafe { self.store(lanes.as_mut_ptr()) };
        for (i, lane) in lanes.into_iter().enumerate().take(n) {
            unsafe { p.add(i).write_unaligned(lane) };
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        Neon(unsafe { vaddq_f32(self.0, o.0) })
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        Neon(unsafe { vsubq_f32(self.0, o.0) })
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        Neon(unsafe { vmulq_f32(self.0, o.0) })
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        Neon(unsafe { vdivq_f32(self.0, o.0) })
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        Neon(unsafe { vfmaq_f32(self.0, a.0, b.0) })
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        Neon(unsafe { vbslq_f32(vcgtq_f32(self.0, o.0), self.0, o.0) })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        Neon(unsafe { vbslq_f32(vcltq_f32(self.0, o.0), self.0, o.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        Neon(unsafe { vrndnq_f32(self.0) })
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        unsafe {
            let whole = vaddq_s32(vcvtnq_s32_f32(self.0), vdupq_n_s32(127));
            Neon(vreinterpretq_f32_s32(vshlq_n_s32::<23>(whole)))
        }
    }
    #[inline(always)]
    fn zero_below(self, x: Self, bound: f32) -> Self {
        unsafe {
            let below = vcltq_f32(x.0, vdupq_n_f32(bound));
            Neon(vbslq_f32(below, vdupq_n_f32(0.0), self.0))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let pair = vadd_f32(vget_low_f32(self.0), vget_high_f32(self.0));
            vget_lane_f32::<0>(vpadd_f32(pair, pair))
        }
    }
    type Pairs = int16x8_t;
    type Ints = int32x4_t;
    #[inline(always)]
    fn zero_ints() -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> int16x8_t {
        unsafe { vmovl_s8(vld1_s8(p)) }
    }
    #[inline(always)]
    unsafe fn load_i16(p: *const i16) -> int16x8_t {
        unsafe { vld1q_s16(p) }
    }
    #[inline(always)]
    fn add_pairs(sum: int32x4_t, a: int16x8_t, b: int16x8_t) -> int32x4_t {
        unsafe {
            let low = vmull_s16(vget_low_s16(a), vget_low_s16(b));
            vaddq_s32(sum, vpaddq_s32(low, vmull_high_s16(a, b)))
        }
    }
    #[inline(always)]
    fn from_ints(v: int32x4_t) -> Self {
        Neon(unsafe { vcvtq_f32_s32(v) })
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe { vmaxvq_f32(self.0) }
    }
}
