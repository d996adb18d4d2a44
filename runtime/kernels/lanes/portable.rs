//! Plain loops over eight floats: what every other instruction set is compared with.

use half::{bf16, f16};

use super::Lanes;

#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Portable(self.0.map(f))
    }

    #[inline(always)]
    fn zip(self, o: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Portable(std::array::from_fn(|i| f(self.0[i], o.0[i])))
    }
}

// SAFETY of the unsafe methods: the trait's conditions on pointers.
impl Lanes for Portable {
    const N: usize = 8;
    const REGISTERS: usize = 16;

    #[inline(always)]
    fn splat(v: f32) -> Self {
        Portable([v; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: eight readable floats, the caller's promise.
        Portable(std::array::from_fn(|i| unsafe { p.add(i).read_unaligned() }))
    }
    #[inline(always)]
    unsafe fn load_part(p: *const f32, n: usize) -> Self {
        // SAFETY: n readable floats, the caller's promise.
        Portable(std::array::from_fn(|i| if i < n { unsafe { p.add(i).read_unaligned() } } else { 0.0 }))
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self {
        // SAFETY: sixteen readable bytes, the caller's promise.
        let read = |i: usize| unsafe { p.add(2 * i).cast::<[u8; 2]>().read_unaligned() };
        Portable(std::array::from_fn(|i| bf16::from_le_bytes(read(i)).to_f32()))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self {
        // SAFETY: sixteen readable bytes, the caller's promise.
        let read = |i: usize| unsafe { p.add(2 * i).cast::<[u8; 2]>().read_unaligned() };
        Portable(std::array::from_fn(|i| f16::from_le_bytes(read(i)).to_f32()))
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        for (i, v) in self.0.into_iter().enumerate() {
            // SAFETY: eight writable floats, the caller's promise.
            unsafe { p.add(i).write_unaligned(v) };
        }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, n: usize) {
        for (i, v) in self.0.into_iter().enumerate().take(n) {
            // SAFETY: n writable floats, the caller's promise.
            unsafe { p.add(i).write_unaligned(v) };
        }
    }
    #[inline(always)]
    fn add(self, o: Self) -> Self {
        self.zip(o, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, o: Self) -> Self {
        self.zip(o, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, o: Self) -> Self {
        self.zip(o, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, o: Self) -> Self {
        self.zip(o, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        self.add(a.mul(b))
    }
    #[inline(always)]
    fn max(self, o: Self) -> Self {
        self.zip(o, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, o: Self) -> Self {
        self.zip(o, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding 1.5 · 2^23 leaves no room for fraction bits; exact for |v| < 2^22, NaN stays NaN.
        self.map(|v| (v + 12_582_912.0) - 12_582_912.0)
    }
    #[inline(always)]
    fn exp2_whole(self) -> Self {
        self.map(|v| f32::from_bits(((v as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn zero_below(self, x: Self, bound: f32) -> Self {
        self.zip(x, |v, x| if x < bound { 0.0 } else { v })
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    type Pairs = [i16; 16];
    type Ints = [i32; 8];
    #[inline(always)]
    fn zero_ints() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> [i16; 16] {
        // SAFETY: sixteen readable elements, the caller's promise.
        std::array::from_fn(|i| i16::from(unsafe { *p.add(i) }))
    }
    #[inline(always)]
    unsafe fn load_i16(p: *const i16) -> [i16; 16] {
        // SAFETY: as above.
        std::array::from_fn(|i| unsafe { p.add(i).read_unaligned() })
    }
    #[inline(always)]
    fn add_pairs(sum: [i32; 8], a: [i16; 16], b: [i16; 16]) -> [i32; 8] {
        let product = |i: usize| i32::from(a[i]) * i32::from(b[i]);
        std::array::from_fn(|j| sum[j] + product(2 * j) + product(2 * j + 1))
    }
    #[inline(always)]
    fn from_ints(v: [i32; 8]) -> Self {
        Portable(v.map(|v| v as f32))
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}
