//! The register tile that [`super::fma`] and [`super::bf16`] share: some weight rows times some rows of x, all sums in
//! registers, both read along K as they lie in memory.

use crate::kernels::lanes::Lanes;

/// Bytes of weights that a block of columns may take: they stay in the second-level cache while the rows of x pass.
pub(super) const WEIGHT_BLOCK_BYTES: usize = 192 << 10;

/// Bytes that a stream of weights is asked for ahead: what arrives while the memory answers.
pub(super) const AHEAD: usize = 8192;

/// Rows of x below which the weights are read in one stream instead of in tiles.
const STREAMED_BELOW: usize = 4;

/// A product of vectors along K.
pub(super) trait Multiply {
    /// The sums.
    type Sum: Lanes;
    type W: Copy;
    type X: Copy;
    /// Elements of K a step.
    const STEP: usize;
    /// Bytes of a weight.
    const W_SIZE: usize;
    /// Bytes of an input.
    const X_SIZE: usize;
    /// # Safety
    /// `STEP` readable weights.
    unsafe fn load_w(p: *const u8) -> Self::W;
    /// The first `n < STEP` weights, then zeros.
    ///
    /// # Safety
    /// `n` readable weights.
    unsafe fn load_w_part(p: *const u8, n: usize) -> Self::W;
    /// # Safety
    /// `STEP` readable inputs.
    unsafe fn load_x(p: *const u8) -> Self::X;
    /// The first `n < STEP` inputs, then zeros.
    ///
    /// # Safety
    /// `n` readable inputs.
    unsafe fn load_x_part(p: *const u8, n: usize) -> Self::X;
    fn mul_add(sum: Self::Sum, w: Self::W, x: Self::X) -> Self::Sum;
}

/// A block of a product: where its operands and its sums lie.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// [cols, K].
    pub w: *const u8,
    /// Bytes from one weight row to the next.
    pub w_stride: usize,
    /// [rows, K].
    pub x: *const u8,
    /// Bytes from one row of x to the next.
    pub x_stride: usize,
    pub k: usize,
    pub rows: usize,
    pub cols: usize,
    /// [rows, cols].
    pub out: *mut f32,
    /// Elements from one row of `out` to the next.
    pub out_stride: usize,
    /// The weights that will be wanted after this block: asked for ahead of time, never read here.
    pub next: *const u8,
}

/// Weights to ask for, some lines a tile, while the block before them is computed.
struct Ahead {
    line: *const u8,
    /// Passes over the block, which ask for as many bytes as it has itself.
    passes: usize,
}

impl Block {
    /// The part from column `n` on, `cols` wide.
    #[inline(always)]
    pub(super) fn columns(self, n: usize, cols: usize) -> Self {
        Block { w: self.w.wrapping_add(n * self.w_stride), out: self.out.wrapping_add(n), cols, ..self }
    }

    #[inline(always)]
    fn rows_at(self, t: usize, rows: usize) -> Self {
        let (x, out) = (self.x.wrapping_add(t * self.x_stride), self.out.wrapping_add(t * self.out_stride));
        Block { x, out, rows, ..self }
    }
}

/// All sums of the block.
///
/// # Safety
/// The pointers of the block must be good for its sizes.
#[inline(always)]
pub(super) unsafe fn sums<M: Multiply>(block: Block) {
    let most_rows = if M::Sum::REGISTERS >= 32 { 6 } else { 4 };
    if block.rows < STREAMED_BELOW {
        // SAFETY: the caller's promise.
        return unsafe { stream::<M>(block) };
    }
    let passes = block.rows.div_ceil(most_rows).max(2);
    let step = (WEIGHT_BLOCK_BYTES / block.w_stride.max(1) / 12).max(1) * 12;
    let mut n = 0;
    while n < block.cols {
        let mut columns = block.columns(n, step.min(block.cols - n));
        if n + step < block.cols {
            columns.next = block.columns(n + step, 0).w;
        }
        // Rows in tiles of nearly equal height: no lonely row at the end that would read all weights for itself.
        let mut t = 0;
        // Spread over all passes: the memory is busy all the time, and never asked for more than it can answer.
        let mut ahead = Ahead { line: columns.next, passes };
        for pass in 0..passes {
            let height = (block.rows - t).div_ceil(passes - pass);
            let tile = columns.rows_at(t, height);
            // SAFETY: a part of the block.
            unsafe { rows_tile::<M>(tile, &mut ahead) };
            t += height;
        }
        n += step;
    }
}

#[inline(always)]
unsafe fn rows_tile<M: Multiply>(block: Block, ahead: &mut Ahead) {
    // SAFETY: the caller's promise.
    unsafe {
        if M::Sum::REGISTERS >= 32 {
            match block.rows {
                2 => columns::<M, 8, 2>(block, ahead),
                3 => columns::<M, 6, 3>(block, ahead),
                4 => columns::<M, 4, 4>(block, ahead),
                5 => columns::<M, 4, 5>(block, ahead),
                _ => columns::<M, 4, 6>(block, ahead),
            }
        } else {
            match block.rows {
                2 => columns::<M, 4, 2>(block, ahead),
                3 => columns::<M, 3, 3>(block, ahead),
                _ => columns::<M, 3, 4>(block, ahead),
            }
        }
    }
}

/// All columns for so few rows that the weights come from memory: they are read in the order in which they lie there,
/// which memory answers half as fast again as eight rows side by side. The sums are those of [`columns`] to the bit.
#[inline(always)]
unsafe fn stream<M: Multiply>(block: Block) {
    // SAFETY: the caller's promise.
    unsafe {
        match block.rows {
            1 => stream_rows::<M, 16, 1>(block),
            2 => stream_rows::<M, 8, 2>(block),
            _ => stream_rows::<M, 5, 3>(block),
        }
    }
}

#[inline(always)]
unsafe fn stream_rows<M: Multiply, const NR: usize, const TR: usize>(block: Block) {
    let Block { w, w_stride, x, x_stride, k, .. } = block;
    let total = block.cols * w_stride;
    let whole = k - k % M::STEP;
    let rest = k - whole;
    let mut n = 0;
    while n < block.cols {
        let count = NR.min(block.cols - n);
        let mut sums = [[M::Sum::zero(); NR]; TR];
        for r in 0..count {
            let start = (n + r) * w_stride;
            let mut row = [M::Sum::zero(); TR];
            let mut i = 0;
            while i < whole {
                let at = start + i * M::W_SIZE;
                let far = at + AHEAD;
                M::Sum::prefetch(if far < total { w.wrapping_add(far) } else { block.next.wrapping_add(far - total) });
                // SAFETY: i + STEP ≤ k, the length of every row; n + r < cols.
                unsafe {
                    let w = M::load_w(w.add(at));
                    for (t, sum) in row.iter_mut().enumerate() {
                        *sum = M::mul_add(*sum, w, M::load_x(x.add(t * x_stride + i * M::X_SIZE)));
                    }
                }
                i += M::STEP;
            }
            if rest > 0 {
                // SAFETY: `rest` elements are left in every row.
                unsafe {
                    let w = M::load_w_part(w.add(start + whole * M::W_SIZE), rest);
                    for (t, sum) in row.iter_mut().enumerate() {
                        *sum = M::mul_add(*sum, w, M::load_x_part(x.add(t * x_stride + whole * M::X_SIZE), rest));
                    }
                }
            }
            for (sums, sum) in sums.iter_mut().zip(row) {
                sums[r] = sum;
            }
        }
        // SAFETY: out is [rows, cols]; the tile that is written is `count` wide.
        unsafe { write_some::<M::Sum, NR, TR>(&sums, count, block.out.add(n), block.out_stride) };
        n += count;
    }
}

/// [`write_sums`] for the first `count` of NR columns.
///
/// # Safety
/// `out` has room for TR rows of `count` elements.
#[inline(always)]
unsafe fn write_some<L: Lanes, const NR: usize, const TR: usize>(
    sums: &[[L; NR]; TR],
    count: usize,
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the caller's promise, or memory of our own.
    unsafe {
        if count == NR {
            return write_sums(sums, out, stride);
        }
        let mut all = [[0.0; NR]; TR];
        write_sums(sums, all.as_mut_ptr().cast(), NR);
        for (t, row) in all.iter().enumerate() {
            for (n, value) in row.iter().enumerate().take(count) {
                *out.add(t * stride + n) = *value;
            }
        }
    }
}

#[inline(always)]
unsafe fn columns<M: Multiply, const NR: usize, const TR: usize>(block: Block, ahead: &mut Ahead) {
    let mut n = 0;
    while n < block.cols {
        for _ in 0..(NR * block.w_stride / 64).div_ceil(ahead.passes) {
            M::Sum::prefetch_far(ahead.line);
            ahead.line = ahead.line.wrapping_add(64);
        }
        // SAFETY: parts of the block, by the caller's promise.
        unsafe {
            if n + NR <= block.cols {
                tile::<M, NR, TR>(block.columns(n, NR));
                n += NR;
            } else {
                tile::<M, 1, TR>(block.columns(n, 1));
                n += 1;
            }
        }
    }
}

/// NR weight rows times TR rows of x.
#[inline(always)]
unsafe fn tile<M: Multiply, const NR: usize, const TR: usize>(block: Block) {
    let Block { w, w_stride, x, x_stride, k, .. } = block;
    let mut sums = [[M::Sum::zero(); NR]; TR];
    let whole = k - k % M::STEP;
    let mut i = 0;
    while i < whole {
        // SAFETY: i + STEP ≤ k, the length of every row.
        unsafe {
            let ws: [M::W; NR] = std::array::from_fn(|r| M::load_w(w.add(r * w_stride + i * M::W_SIZE)));
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = M::load_x(x.add(t * x_stride + i * M::X_SIZE));
                for (sum, w) in sums.iter_mut().zip(ws) {
                    *sum = M::mul_add(*sum, w, x);
                }
            }
        }
        i += M::STEP;
    }
    let rest = k - whole;
    if rest > 0 {
        // SAFETY: `rest` elements are left in every row.
        unsafe {
            let ws: [M::W; NR] = std::array::from_fn(|r| M::load_w_part(w.add(r * w_stride + whole * M::W_SIZE), rest));
            for (t, sums) in sums.iter_mut().enumerate() {
                let x = M::load_x_part(x.add(t * x_stride + whole * M::X_SIZE), rest);
                for (sum, w) in sums.iter_mut().zip(ws) {
                    *sum = M::mul_add(*sum, w, x);
                }
            }
        }
    }
    // SAFETY: out is [rows, cols] with room for the tile.
    unsafe { write_sums(&sums, block.out, block.out_stride) };
}

/// Adds the lanes of each sum and writes them, sixteen sums at a time.
///
/// # Safety
/// `out` has room for TR rows of NR elements.
#[inline(always)]
pub(super) unsafe fn write_sums<L: Lanes, const NR: usize, const TR: usize>(
    sums: &[[L; NR]; TR],
    out: *mut f32,
    stride: usize,
) {
    const { assert!(NR * TR <= 32) };
    // Written out: an index that is not known when compiling would keep the sums in memory all along.
    // SAFETY: the caller's promise.
    unsafe {
        write_sixteen::<L, NR, TR, 0>(sums, out, stride);
        if NR * TR > 16 {
            write_sixteen::<L, NR, TR, 16>(sums, out, stride);
        }
    }
}

#[inline(always)]
unsafe fn write_sixteen<L: Lanes, const NR: usize, const TR: usize, const FIRST: usize>(
    sums: &[[L; NR]; TR],
    out: *mut f32,
    stride: usize,
) {
    let mut group = [L::zero(); 16];
    for (i, sum) in group.iter_mut().enumerate() {
        if FIRST + i < NR * TR {
            *sum = sums[(FIRST + i) / NR][(FIRST + i) % NR];
        }
    }
    let values = L::sums(group);
    for (i, value) in values.into_iter().enumerate() {
        if FIRST + i < NR * TR {
            let (t, n) = ((FIRST + i) / NR, (FIRST + i) % NR);
            // SAFETY: t < TR, n < NR.
            unsafe { *out.add(t * stride + n) = value };
        }
    }
}
