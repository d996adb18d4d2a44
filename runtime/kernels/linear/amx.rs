//! [`super::Arithmetic::Amx`]: bf16 weights times bf16 inputs, a tile of 16 weight rows × 16 rows of x an instruction.
//!
//! The weights are the A operand: 16 rows × 32 elements, loaded straight from the row-major checkpoint. The inputs are
//! the B operand, packed by [`pack_group`]: for sixteen rows of x and each 32 elements of K a tile [16 pairs, 16 rows],
//! twice with two terms (hi, then lo). The result is [16 weight rows, 16 rows of x]. An element takes the tiles of K in
//! rising order, of each hi before lo; one row of x takes them exactly as 512 do.
//!
//! Tiles cannot be operands of Rust's inline assembly, so each block of it names its own; tmm0–3 carry the sums from
//! one block to the next, and nothing in between touches them: the compiler has no use for tiles.

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
use std::sync::OnceLock;

use super::input::{Packed, round_to_bf16};
use crate::kernels::{Isa, MatrixView};

/// Rows of a tile, of weights and of x.
const ROWS: usize = 16;
/// Elements of K in a tile.
const STEP: usize = 32;
const TILE_BYTES: usize = 1024;

const XFEATURE_XTILEDATA: u64 = 18;

/// Whether the processor has AMX with bf16 and the system knows its state. Changes nothing.
pub(crate) fn supported() -> bool {
    let leaf = __cpuid_count(7, 0);
    let (tile, bf16) = (leaf.edx >> 24 & 1 == 1, leaf.edx >> 22 & 1 == 1);
    let mut features = 0u64;
    const ARCH_GET_XCOMP_SUPP: u64 = 0x1021;
    // SAFETY: the kernel writes one u64.
    let known = tile && bf16 && unsafe { arch_prctl(ARCH_GET_XCOMP_SUPP, (&raw mut features) as u64) };
    known && features >> XFEATURE_XTILEDATA & 1 == 1
}

/// Asks the system, once, to let this process use tiles: Linux gives out their state (8 KiB a thread) only then, and from
/// then on wants signal stacks that have room for it. True as well where a test has forced this path.
pub(crate) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        // SAFETY: plain numbers.
        let granted = supported() && unsafe { arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) };
        granted || Isa::is_forced(Isa::Amx)
    })
}

/// True if the call succeeds.
///
/// # Safety
/// `argument` must be what `code` asks for.
#[cfg(target_os = "linux")]
unsafe fn arch_prctl(code: u64, argument: u64) -> bool {
    const SYS_ARCH_PRCTL: i64 = 158;
    let result: i64;
    // SAFETY: a system call, by the caller's promise; the kernel clobbers rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") SYS_ARCH_PRCTL => result,
            in("rdi") code,
            in("rsi") argument,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
unsafe fn arch_prctl(_code: u64, _argument: u64) -> bool {
    false
}

/// The tile configuration while it lives, on this thread.
struct Tiles;

impl Tiles {
    /// Eight tiles of 16 rows × 64 bytes.
    ///
    /// # Safety
    /// The processor must have AMX, and the process permission.
    unsafe fn configure() -> Self {
        #[repr(C, align(64))]
        struct Config {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let mut config = Config { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        config.row_bytes[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: 64 readable bytes; the rest is the caller's promise.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &config, options(nostack, readonly)) };
        Tiles
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: configured by this thread. Without it every context switch would save eight KiB.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// tmm0–3 = 0.
unsafe fn zero() {
    // SAFETY: the caller configured tiles.
    unsafe { asm!("tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3", options(nostack, nomem)) };
}

/// Where the operands of `count` tiles along K lie.
#[derive(Clone, Copy)]
struct Operands {
    /// The first weight row of up to four groups of sixteen.
    a: [*const u8; 4],
    /// Bytes from one weight row to the next.
    a_stride: usize,
    /// The first tile of x of up to two groups of sixteen.
    b: [*const u8; 2],
    count: usize,
}

/// tmm0 += a0·b0, tmm1 += a0·b1, tmm2 += a1·b0, tmm3 += a1·b1, for one term or two.
unsafe fn two_by_two(o: Operands, terms: usize) {
    if o.count == 0 {
        return;
    }
    macro_rules! run {
        ($($second:literal),*) => {
            asm!(
                "2:",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm6, [{b0} + {line}*1]",
                "tileloadd tmm7, [{b1} + {line}*1]",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                $($second,)*
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b0}, {step}",
                "add {b1}, {step}",
                "dec {count}",
                "jnz 2b",
                a0 = inout(reg) o.a[0] => _,
                a1 = inout(reg) o.a[1] => _,
                b0 = inout(reg) o.b[0] => _,
                b1 = inout(reg) o.b[1] => _,
                count = inout(reg) o.count => _,
                stride = in(reg) o.a_stride,
                line = in(reg) 64usize,
                step = in(reg) terms * TILE_BYTES,
                options(nostack, readonly),
            )
        };
    }
    // SAFETY: the operands are readable for `count` steps, the caller's promise.
    unsafe {
        if terms == 1 {
            run!();
        } else {
            run!(
                "tileloadd tmm6, [{b0} + {line}*1 + 1024]",
                "tileloadd tmm7, [{b1} + {line}*1 + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            );
        }
    }
}

/// tmm0 += a0·b0, …, tmm3 += a3·b0: four groups of weights, for few rows of x.
unsafe fn four_by_one(o: Operands, terms: usize) {
    if o.count == 0 {
        return;
    }
    macro_rules! run {
        ($($line:literal),*) => {
            asm!(
                "2:",
                "tileloadd tmm6, [{b0} + {line}*1]",
                $($line,)*
                "add {a0}, 64",
                "add {a1}, 64",
                "add {a2}, 64",
                "add {a3}, 64",
                "add {b0}, {step}",
                "dec {count}",
                "jnz 2b",
                a0 = inout(reg) o.a[0] => _,
                a1 = inout(reg) o.a[1] => _,
                a2 = inout(reg) o.a[2] => _,
                a3 = inout(reg) o.a[3] => _,
                b0 = inout(reg) o.b[0] => _,
                count = inout(reg) o.count => _,
                stride = in(reg) o.a_stride,
                line = in(reg) 64usize,
                step = in(reg) terms * TILE_BYTES,
                options(nostack, readonly),
            )
        };
    }
    // SAFETY: the operands are readable for `count` steps, the caller's promise.
    unsafe {
        if terms == 1 {
            run!(
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm4, [{a2} + {stride}*1]",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tileloadd tmm5, [{a3} + {stride}*1]",
                "tdpbf16ps tmm2, tmm4, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm6"
            );
        } else {
            run!(
                "tileloadd tmm7, [{b0} + {line}*1 + 1024]",
                "tileloadd tmm4, [{a0} + {stride}*1]",
                "tileloadd tmm5, [{a1} + {stride}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm5, tmm6",
                "tdpbf16ps tmm0, tmm4, tmm7",
                "tileloadd tmm4, [{a2} + {stride}*1]",
                "tdpbf16ps tmm1, tmm5, tmm7",
                "tileloadd tmm5, [{a3} + {stride}*1]",
                "tdpbf16ps tmm2, tmm4, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm6",
                "tdpbf16ps tmm2, tmm4, tmm7",
                "tdpbf16ps tmm3, tmm5, tmm7"
            );
        }
    }
}

/// A tile of sums: [16 weight rows, 16 rows of x].
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Sums([[f32; ROWS]; ROWS]);

/// Writes tmm0–3 to `out`.
unsafe fn store(out: &mut [Sums; 4]) {
    // SAFETY: four tiles of 1 KiB follow one another.
    unsafe {
        asm!(
            "tilestored [{out} + {line}*1], tmm0",
            "tilestored [{out} + {line}*1 + 1024], tmm1",
            "tilestored [{out} + {line}*1 + 2048], tmm2",
            "tilestored [{out} + {line}*1 + 3072], tmm3",
            out = in(reg) out.as_mut_ptr(),
            line = in(reg) 64usize,
            options(nostack),
        );
    }
}

#[derive(Default)]
struct Scratch {
    /// Weight rows, padded with zeros to whole tiles: the end of a matrix.
    rows: Vec<u8>,
}

thread_local! {
    static SCRATCH: Cell<Scratch> = Cell::default();
}

/// A block of weights whose rows are whole groups of sixteen, readable in whole steps but for the rest of K.
struct Weights<'a> {
    bytes: &'a [u8],
    /// Bytes from one row to the next.
    stride: usize,
    /// Rows that count.
    rows: usize,
    k: usize,
}

/// See [`super::column_sums`], which checks the lengths.
pub(super) fn sums(x: &Packed, rows: Range<usize>, view: MatrixView, cols: Range<usize>, out: &mut [f32]) {
    let k = view.cols();
    let width = cols.len();
    let whole = width - width % ROWS;
    let bytes = view.rows_bytes(cols.clone());
    let body = Weights { bytes: &bytes[..whole * 2 * k], stride: 2 * k, rows: whole, k };
    // SAFETY: this arithmetic is chosen only where tiles are permitted.
    let tiles = unsafe { Tiles::configure() };
    block(x, rows.clone(), &body, out, width);
    if whole < width {
        let mut scratch = SCRATCH.take();
        scratch.rows.clear();
        scratch.rows.extend_from_slice(&bytes[whole * 2 * k..]);
        scratch.rows.resize(ROWS * 2 * k, 0);
        let rest = Weights { bytes: &scratch.rows, stride: 2 * k, rows: width - whole, k };
        block(x, rows, &rest, &mut out[whole..], width);
        SCRATCH.set(scratch);
    }
    drop(tiles);
}

/// The sums of a block of weights; `out` is its first column, `width` elements a row.
fn block(x: &Packed, rows: Range<usize>, weights: &Weights, out: &mut [f32], width: usize) {
    let groups = weights.bytes.len() / (ROWS * weights.stride).max(1);
    // Groups of sixteen rows of x that hold the wanted ones.
    let first = rows.start / ROWS;
    let last = rows.end.div_ceil(ROWS);
    let a_step = if last - first == 1 { 4 } else { 2 };
    let mut tiles = [Sums([[0.0; ROWS]; ROWS]); 4];
    for a in (0..groups).step_by(a_step) {
        for b in (first..last).step_by(if a_step == 4 { 1 } else { 2 }) {
            // A missing group is represented by the last one, and its sums are left alone.
            let a_groups: [usize; 4] = std::array::from_fn(|i| (a + i).min(groups - 1));
            let b_groups: [usize; 2] = std::array::from_fn(|i| (b + i).min(last - 1));
            // SAFETY: tiles are configured; all groups are inside the block and the packed rows.
            unsafe { multiply(x, weights, a_groups, b_groups, a_step == 4, &mut tiles) };
            for (i, tile) in tiles.iter().enumerate() {
                let (ia, ib) = if a_step == 4 { (i, 0) } else { (i / 2, i % 2) };
                if a + ia < groups && b + ib < last {
                    let columns = (a + ia) * ROWS..weights.rows.min((a + ia + 1) * ROWS);
                    let from = rows.start.max((b + ib) * ROWS)..rows.end.min((b + ib + 1) * ROWS);
                    write(tile, (b + ib) * ROWS, from, rows.start, columns, out, width);
                }
            }
        }
    }
}

/// # Safety
/// Tiles must be configured, and every group inside the weights and the packed rows.
unsafe fn multiply(x: &Packed, weights: &Weights, a: [usize; 4], b: [usize; 2], is_tall: bool, out: &mut [Sums; 4]) {
    #[repr(C, align(64))]
    struct Rest([[u8; 64]; 4 * ROWS]);
    let (packed, terms, group_bytes) = x.amx_tiles();
    let run = if is_tall { four_by_one } else { two_by_two };
    let starts = a.map(|group| &weights.bytes[group * ROWS * weights.stride..]);
    let b = b.map(|group| packed[group * group_bytes..][..group_bytes].as_ptr());
    let count = weights.k / STEP;
    let operands = Operands { a: starts.map(<[u8]>::as_ptr), a_stride: weights.stride, b, count };
    // SAFETY: tiles are configured; each group has sixteen rows of K elements, each group of x a tile for every step.
    unsafe {
        zero();
        run(operands, terms);
    }
    let rest = 2 * (weights.k % STEP);
    if rest > 0 {
        // The last elements of K, padded with zeros: a load would otherwise read past the end.
        let mut padded = Rest([[0; 64]; 4 * ROWS]);
        for (i, padded) in padded.0.iter_mut().enumerate() {
            let at = i % ROWS * weights.stride + 2 * count * STEP;
            padded[..rest].copy_from_slice(&starts[i / ROWS][at..at + rest]);
        }
        let a = std::array::from_fn(|i| padded.0[i * ROWS].as_ptr());
        let b = b.map(|b| b.wrapping_add(count * terms * TILE_BYTES));
        // SAFETY: as above; the padded rows are 64 bytes each.
        unsafe { run(Operands { a, a_stride: 64, b, count: 1 }, terms) };
    }
    // SAFETY: tiles are configured.
    unsafe { store(out) };
}

/// Turns a tile over into `out`: the rows `from` of x (the tile's first is `tile_start`), the given columns.
fn write(
    tile: &Sums,
    tile_start: usize,
    from: Range<usize>,
    out_start: usize,
    columns: Range<usize>,
    out: &mut [f32],
    width: usize,
) {
    if columns.len() == ROWS && from.len() > 4 {
        // SAFETY: AVX-512 is part of what AMX needs here.
        let turned = unsafe { transposed(tile) };
        for t in from {
            let at = (t - out_start) * width + columns.start;
            out[at..at + ROWS].copy_from_slice(&turned.0[t - tile_start]);
        }
    } else {
        for t in from {
            for n in columns.clone() {
                out[(t - out_start) * width + n] = tile.0[n - columns.start][t - tile_start];
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn transposed(tile: &Sums) -> Sums {
    // SAFETY: sixteen rows of sixteen floats.
    let rows = std::array::from_fn(|i| unsafe { _mm512_castps_si512(_mm512_loadu_ps(tile.0[i].as_ptr())) });
    let mut out = Sums([[0.0; ROWS]; ROWS]);
    for (row, out) in transpose(rows).into_iter().zip(&mut out.0) {
        // SAFETY: sixteen floats.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_castsi512_ps(row)) };
    }
    out
}

/// Sixteen rows of sixteen 32-bit elements, turned over.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(r: [__m512i; 16]) -> [__m512i; 16] {
    // Pairs, then fours within each quarter, then the quarters.
    let pairs: [__m512i; 16] = std::array::from_fn(|i| {
        let (a, b) = (r[i & !1], r[i | 1]);
        if i & 1 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    let fours: [__m512i; 16] = std::array::from_fn(|i| {
        // Column i % 4 of each quarter, of the rows of the group i / 4.
        let (group, column) = (i & !3, i & 3);
        let (a, b) = (pairs[group + (column >> 1)], pairs[group + 2 + (column >> 1)]);
        if column & 1 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    std::array::from_fn(|i| {
        let (quarter, column) = (i >> 2, i & 3);
        let (a, b, c, d) = (fours[column], fours[4 + column], fours[8 + column], fours[12 + column]);
        let (low, high) = if quarter & 1 == 0 {
            (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d))
        } else {
            (_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d))
        };
        if quarter & 2 == 0 { _mm512_shuffle_i32x4::<0x88>(low, high) } else { _mm512_shuffle_i32x4::<0xdd>(low, high) }
    })
}

/// Elements (of 16 bits) that a group of sixteen rows of x takes.
pub(super) fn group_len(k: usize, terms: usize) -> usize {
    k.div_ceil(STEP) * terms * TILE_BYTES / 2
}

/// One term of sixteen rows of x: [16, K rounded up to whole steps], zeros where there is nothing.
pub(super) fn term_len(k: usize) -> usize {
    ROWS * k.next_multiple_of(STEP)
}

/// Splits a row into its terms; `i` is its place in the group, `terms` holds [`term_len`] elements a term.
pub(super) fn split_row(row: &[f32], i: usize, terms: &mut [u16]) {
    let stride = row.len().next_multiple_of(STEP);
    let (hi, lo) = terms.split_at_mut(ROWS * stride);
    let hi = &mut hi[i * stride..(i + 1) * stride];
    round_to_bf16(row, hi);
    if !lo.is_empty() {
        let lo = &mut lo[i * stride..(i + 1) * stride];
        let rest: Vec<f32> = row
            .iter()
            .zip(&*hi)
            .map(|(x, hi)| {
                let hi = f32::from_bits(u32::from(*hi) << 16);
                if hi.is_finite() { x - hi } else { 0.0 }
            })
            .collect();
        round_to_bf16(&rest, lo);
    }
}

/// Packs the terms of sixteen rows into tiles.
pub(super) fn pack_group(terms: &[u16], k: usize, out: &mut [u16]) {
    #[target_feature(enable = "avx512f")]
    fn on(terms: &[u16], stride: usize, count: usize, out: &mut [u16]) {
        for step in 0..stride / STEP {
            for term in 0..count {
                // SAFETY: each term is sixteen rows of `stride` elements; a tile is 512 elements of `out`.
                unsafe {
                    let at = term * ROWS * stride + step * STEP;
                    let rows = std::array::from_fn(|i| _mm512_loadu_si512(terms[at + i * stride..].as_ptr().cast()));
                    let tile = out[(step * count + term) * TILE_BYTES / 2..][..TILE_BYTES / 2].as_mut_ptr();
                    for (i, pairs) in transpose(rows).into_iter().enumerate() {
                        _mm512_storeu_si512(tile.add(i * STEP).cast(), pairs);
                    }
                }
            }
        }
    }
    let (stride, count) = (k.next_multiple_of(STEP), terms.len() / term_len(k).max(1));
    assert!(terms.len() == count * ROWS * stride && out.len() >= group_len(k, count));
    // SAFETY: AVX-512 is part of what AMX needs here.
    unsafe { on(terms, stride, count, out) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_turned_over() {
        if !is_x86_feature_detected!("avx512f") {
            eprintln!("SKIPPED: no AVX-512 here");
            return;
        }
        let tile = Sums(std::array::from_fn(|n| std::array::from_fn(|t| (n * 100 + t) as f32)));
        // SAFETY: the processor was asked.
        let turned = unsafe { transposed(&tile) };
        for t in 0..ROWS {
            for n in 0..ROWS {
                assert_eq!(turned.0[t][n], (n * 100 + t) as f32);
            }
        }
    }
}
