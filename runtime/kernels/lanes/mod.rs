//! Vectors of f32 for the CPU twins: one body, written against [`Lanes`], compiled once per instruction set.
//!
//! [`Isa::detect`] chooses at run time; `REWARDRT_ISA` overrides it for tests. Each instruction set has its own order
//! of additions (its lane count); within one, an element's order depends on the shape of its weight alone.

#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

use std::sync::OnceLock;

use crate::error::{Error, Result};

/// An instruction set that the CPU twins are compiled for. Other crates get one from [`Isa::available`] or
/// [`Isa::detect`] only, which ask the processor: a value is the proof that its instructions work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain loops: the oracle.
    #[non_exhaustive]
    Portable,
    /// AVX2 + FMA + F16C, 8 lanes.
    #[non_exhaustive]
    Avx2,
    /// AVX-512 F/BW/VL, 16 lanes.
    #[non_exhaustive]
    Avx512,
    /// AVX-512 with BF16: products of bf16 weights at twice the speed.
    #[non_exhaustive]
    Avx512Bf16,
    /// The same with AMX tiles for bf16 products.
    #[non_exhaustive]
    Amx,
    /// Advanced SIMD, 4 lanes.
    #[non_exhaustive]
    Neon,
}

static FORCED: OnceLock<Isa> = OnceLock::new();

impl Isa {
    const ALL: [Isa; 6] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx, Isa::Neon];

    /// Every instruction set that this machine has (and that the system lets this process use), slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_available() || FORCED.get() == Some(isa)).collect()
    }

    #[cfg(target_arch = "x86_64")]
    fn is_available(self) -> bool {
        let avx2 =
            || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        let avx512 = || {
            avx2()
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
        };
        let bf16 = || avx512() && is_x86_feature_detected!("avx512bf16");
        match self {
            Isa::Portable => true,
            Isa::Avx2 => avx2(),
            Isa::Avx512 => avx512(),
            Isa::Avx512Bf16 => bf16(),
            Isa::Amx => bf16() && super::linear::amx_supported(),
            Isa::Neon => false,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn is_available(self) -> bool {
        self == Isa::Portable || (cfg!(target_arch = "aarch64") && self == Isa::Neon)
    }

    /// The fastest available one, unless `REWARDRT_ISA` names another available one.
    ///
    /// # Errors
    /// `Argument` if `REWARDRT_ISA` names none that this machine has.
    pub fn detect() -> Result<Isa> {
        if let Some(forced) = FORCED.get() {
            return Ok(*forced);
        }
        let available = Self::available();
        let Some(wanted) = std::env::var_os("REWARDRT_ISA").filter(|name| !name.is_empty()) else {
            return Ok(available.last().copied().unwrap_or(Isa::Portable));
        };
        available.iter().copied().find(|isa| wanted == isa.name()).ok_or_else(|| {
            let names: Vec<&str> = available.iter().map(|isa| isa.name()).collect();
            Error::argument(format!("REWARDRT_ISA is {wanted:?}; this machine has {}", names.join(", ")))
        })
    }

    /// This one, or the next best where the system does not let the process use it.
    pub(crate) fn permitted(self) -> Isa {
        #[cfg(target_arch = "x86_64")]
        if self == Isa::Amx && !super::linear::amx_permitted() {
            log::warn!("the system does not let this process use AMX");
            return Isa::Avx512Bf16;
        }
        self
    }

    /// Makes every later [`Isa::detect`] answer the one of this name, whatever the processor says; the first call counts.
    ///
    /// # Safety
    /// The instructions must work in this process: a test that emulates them may say so.
    #[doc(hidden)]
    pub unsafe fn force(name: &str) {
        if let Some(isa) = Self::ALL.into_iter().find(|isa| isa.name() == name) {
            let _ = FORCED.set(isa);
        }
    }

    pub(crate) fn is_forced(isa: Isa) -> bool {
        FORCED.get() == Some(&isa)
    }

    /// Its name in `REWARDRT_ISA` and in `rewardrt devices`.
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512bf16",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        }
    }
}

/// `N` f32 lanes. Pointers need no alignment; `_part` reads or writes the first `n < N` elements, the rest is 0.
///
/// # Safety
/// Pointer methods need `N` (or `n`) readable or writable elements. Every method needs the instruction set.
pub(crate) trait Lanes: Copy {
    /// Lanes.
    const N: usize;
    /// Vector registers: how large a tile of sums may be.
    const REGISTERS: usize;
    fn splat(v: f32) -> Self;
    unsafe fn load(p: *const f32) -> Self;
    unsafe fn load_part(p: *const f32, n: usize) -> Self;
    /// Little-endian bf16.
    unsafe fn load_bf16(p: *const u8) -> Self;
    /// Little-endian f16.
    unsafe fn load_f16(p: *const u8) -> Self;
    unsafe fn store(self, p: *mut f32);
    unsafe fn store_part(self, p: *mut f32, n: usize);
    fn add(self, o: Self) -> Self;
    fn sub(self, o: Self) -> Self;
    fn mul(self, o: Self) -> Self;
    fn div(self, o: Self) -> Self;
    /// self + a · b.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger; `o` if either is NaN.
    fn max(self, o: Self) -> Self;
    /// The smaller; `o` if either is NaN.
    fn min(self, o: Self) -> Self;
    /// Nearest integer, ties to even.
    fn round(self) -> Self;
    /// 2^self for whole numbers in [-126, 127].
    fn exp2_whole(self) -> Self;
    /// `self` where `x >= bound`, otherwise 0; NaN in `x` keeps `self`.
    fn zero_below(self, x: Self, bound: f32) -> Self;
    /// The sum over the lanes, in an order that is the instruction set's own.
    fn sum(self) -> f32;
    /// The sums of sixteen vectors: each equals [`Lanes::sum`] to the bit.
    #[inline(always)]
    fn sums(v: [Self; 16]) -> [f32; 16] {
        v.map(Self::sum)
    }
    /// 2 · `N` 16-bit integers.
    type Pairs: Copy;
    /// `N` 32-bit integers.
    type Ints: Copy;
    fn zero_ints() -> Self::Ints;
    /// 2 · `N` elements, widened.
    unsafe fn load_i8(p: *const i8) -> Self::Pairs;
    /// 2 · `N` elements of a block of 32 from element `i` on, a multiple of 2 · `N`: byte j of its 16 holds the elements j
    /// (low nibble) and j + 16 (high nibble), each plus 8.
    #[inline(always)]
    unsafe fn load_nibbles(block: *const u8, i: usize) -> Self::Pairs {
        let mut elements = [0i8; 32];
        for (j, element) in elements.iter_mut().enumerate().take(2 * Self::N) {
            // SAFETY: the caller's promise: sixteen readable bytes.
            let byte = unsafe { *block.add((i + j) % 16) };
            *element = (if i + j < 16 { byte & 15 } else { byte >> 4 }) as i8 - 8;
        }
        // SAFETY: thirty-two elements.
        unsafe { Self::load_i8(elements.as_ptr()) }
    }
    /// 2 · `N` elements.
    unsafe fn load_i16(p: *const i16) -> Self::Pairs;
    /// Lane j takes a[2j] · b[2j] + a[2j + 1] · b[2j + 1].
    fn add_pairs(sum: Self::Ints, a: Self::Pairs, b: Self::Pairs) -> Self::Ints;
    fn from_ints(v: Self::Ints) -> Self;
    /// Asks for the cache line at `p` ahead of time; any address will do.
    #[inline(always)]
    fn prefetch(_p: *const u8) {}
    /// The same, into the second-level cache.
    #[inline(always)]
    fn prefetch_far(_p: *const u8) {}
    /// The largest lane; not for NaN.
    fn largest(self) -> f32;

    #[inline(always)]
    fn zero() -> Self {
        Self::splat(0.0)
    }

    /// Lane 0.
    #[inline(always)]
    fn first(self) -> f32 {
        let mut lane = 0.0;
        // SAFETY: one writable float.
        unsafe { self.store_part(&mut lane, 1) };
        lane
    }

    /// e^x, within 2 ulp; 0 below −87.33 (where the result is subnormal), +Inf above 88.72, NaN for NaN.
    ///
    /// Cephes' expf: x = k·ln2 + r, a polynomial of degree 6 on |r| ≤ ln2 / 2.
    #[inline(always)]
    fn exp(self) -> Self {
        let s = Self::splat;
        // Above 88.73 the product below overflows to +Inf by itself; below −88 the result is cleared at the end.
        let x = s(-88.0).max(s(89.0).min(self));
        let k = x.mul(s(std::f32::consts::LOG2_E)).round();
        let r = x.mul_add(k, s(-0.693_359_4)).mul_add(k, s(2.121_944_4e-4));
        let mut p = s(1.987_569_1e-4);
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            p = s(c).mul_add(p, r);
        }
        let y = s(1.0).add(r).mul_add(p, r.mul(r));
        // 2^k in two factors: k reaches 128.
        let half = k.mul(s(0.5)).round();
        y.mul(half.exp2_whole()).mul(k.sub(half).exp2_whole()).zero_below(self, -87.33)
    }
}

/// Compiles a generic body once per instruction set and gives it a front door that takes an [`Isa`].
macro_rules! for_each_isa {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::kernels::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::kernels::lanes::Avx2>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma,f16c")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<$crate::kernels::lanes::Avx512>($($arg),*)
                }
                match isa {
                    // SAFETY: an Isa comes from `Isa::available` or `detect`, which ask the processor.
                    $crate::kernels::Isa::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::kernels::Isa::Avx512 | $crate::kernels::Isa::Avx512Bf16 | $crate::kernels::Isa::Amx => {
                        // SAFETY: as above.
                        return unsafe { avx512($($arg),*) };
                    }
                    _ => {}
                }
            }
            #[cfg(target_arch = "aarch64")]
            if isa == $crate::kernels::Isa::Neon {
                return $body::<$crate::kernels::lanes::Neon>($($arg),*);
            }
            let _ = isa;
            $body::<$crate::kernels::lanes::Portable>($($arg),*)
        }
    };
}
pub(crate) use for_each_isa;

/// Runs a block for every group of lanes in 0..len, with its start and its count: whole groups, then what is left.
///
/// A macro, since a closure would be compiled without the instruction set and might stay a call.
macro_rules! for_lanes {
    ($lanes:ty, $len:expr, |$i:ident, $n:ident| $body:block) => {{
        let len: usize = $len;
        let whole = len - len % <$lanes>::N;
        let mut at = 0;
        while at < whole {
            let ($i, $n) = (at, <$lanes>::N);
            $body
            at += <$lanes>::N;
        }
        if at < len {
            let ($i, $n) = (at, len - at);
            $body
        }
    }};
}
pub(crate) use for_lanes;

/// # Safety
/// i + n must be at most the length, n at most the lanes.
#[inline(always)]
pub(crate) unsafe fn load<L: Lanes>(x: &[f32], i: usize, n: usize) -> L {
    debug_assert!(i + n <= x.len());
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        let p = x.as_ptr().add(i);
        if n == L::N { L::load(p) } else { L::load_part(p, n) }
    }
}

/// # Safety
/// i + n must be at most the length, n at most the lanes.
#[inline(always)]
pub(crate) unsafe fn store<L: Lanes>(v: L, out: &mut [f32], i: usize, n: usize) {
    debug_assert!(i + n <= out.len());
    // SAFETY: in bounds by the caller's promise.
    unsafe {
        let p = out.as_mut_ptr().add(i);
        if n == L::N { v.store(p) } else { v.store_part(p, n) }
    }
}
