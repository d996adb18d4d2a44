//! out[t, n] = Σ_k x[t, k] · w[n, k] + bias[n], weights as stored, sums in f32.
//!
//! The CPU twin does more in the same pass, as the Plan asks: it takes x through an RMS norm on the way in
//! ([`input`]), and on the way out it adds to the residual stream or multiplies silu(gate) by up ([`finish`]).
//!
//! How an element is added up is its [`Arithmetic`], a function of the instruction set, the precision and the dtypes of
//! the weights that share the input; within one the order of additions depends on K alone. How many rows or columns share a tile changes nothing.

#[cfg(target_arch = "x86_64")]
mod amx;
mod arithmetic;
mod bf16;
mod blocks;
mod finish;
mod fma;
mod input;
mod int4;
mod int8;
mod tile;

use std::cell::RefCell;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::{permitted as amx_permitted, supported as amx_supported};
pub use arithmetic::{Arithmetic, Precision};
pub use blocks::{BlockFormat, BlockMatrix, BlockView};
pub(crate) use input::{Norm, PackBuffer, Packed, Source};
pub use int4::{BLOCK as INT4_BLOCK, Int4, Int4Matrix, Int4View};
pub use int8::{BLOCK as INT8_BLOCK, Int8, Int8Matrix, Int8View};

use super::lora_up::Delta;
use super::{Isa, MatrixView, SharedMut};
use crate::backend::cpu::{Pool, SMALL};
use crate::error::Result;
use crate::weights::WeightFormat;

/// Parameters of the shader, which sees one slice of the weight's rows at a time.
#[repr(C)]
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Params {
    /// T or M.
    pub rows: u32,
    /// K.
    pub k: u32,
    /// Elements from one row of the slice to the next.
    pub stride: u32,
    /// Weight rows in the slice.
    pub count: u32,
    /// First weight row of the slice: column of `out` and index into the bias.
    pub first: u32,
    /// N: elements a row of `out`.
    pub out_stride: u32,
    /// 1 if there is a bias.
    pub has_bias: u32,
    /// First row of the slice that is used; with weights in tiles, a whole tile of columns of every shape (a multiple of 64).
    pub slice_row: u32,
    /// First row of `x` that is used.
    pub x_first: u32,
    /// 1 to add to `out` what it would otherwise be set to.
    pub accumulate: u32,
    /// Multiplies the sums: a power of two.
    pub scale: f32,
}

super::kernel!(
    "linear",
    Params,
    [("x", Read), ("weight", Read), ("scales", Read), ("bias", Read), ("out", Write)],
    [("adapters", Read), ("down", Read)],
);

/// A weight [N, K].
#[derive(Clone, Copy)]
pub enum Weight<'a> {
    /// As stored in the checkpoint.
    Stored(MatrixView<'a>),
    /// Quantised to 8 bits on load.
    Int8(Int8View<'a>),
    /// Quantised to 4 bits on load.
    Int4(Int4View<'a>),
}

impl Weight<'_> {
    /// N.
    pub fn rows(&self) -> usize {
        match self {
            Weight::Stored(view) => view.rows(),
            Weight::Int8(view) => view.rows(),
            Weight::Int4(view) => view.rows(),
        }
    }

    /// K.
    pub fn cols(&self) -> usize {
        match self {
            Weight::Stored(view) => view.cols(),
            Weight::Int8(view) => view.cols(),
            Weight::Int4(view) => view.cols(),
        }
    }
}

impl<'a> From<MatrixView<'a>> for Weight<'a> {
    fn from(view: MatrixView<'a>) -> Self {
        Weight::Stored(view)
    }
}

/// A weight quantised on load.
pub enum Quantised {
    /// To 8 bits.
    Int8(Int8Matrix),
    /// To 4 bits.
    Int4(Int4Matrix),
}

impl Quantised {
    /// Bytes that a matrix [rows, cols] will take beside what is stored.
    pub fn bytes_for(format: WeightFormat, rows: usize, cols: usize) -> usize {
        match format {
            WeightFormat::Stored => 0,
            WeightFormat::Int8 => Int8Matrix::bytes_for(rows, cols),
            WeightFormat::Int4 => Int4Matrix::bytes_for(rows, cols),
        }
    }

    /// `view` in `format`, nothing for one that is used as stored.
    ///
    /// # Errors
    /// See [`BlockMatrix::quantise`].
    pub fn of(format: WeightFormat, view: MatrixView, pool: &Pool) -> Result<Option<Self>> {
        Ok(match format {
            WeightFormat::Stored => None,
            WeightFormat::Int8 => Some(Quantised::Int8(Int8Matrix::quantise(view, pool)?)),
            WeightFormat::Int4 => Some(Quantised::Int4(Int4Matrix::quantise(view, pool)?)),
        })
    }

    /// A view of all of it.
    pub fn weight(&self) -> Weight<'_> {
        match self {
            Quantised::Int8(matrix) => Weight::Int8(matrix.view()),
            Quantised::Int4(matrix) => Weight::Int4(matrix.view()),
        }
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        match self {
            Quantised::Int8(matrix) => matrix.bytes(),
            Quantised::Int4(matrix) => matrix.bytes(),
        }
    }
}

/// A weight and its bias.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    /// [N, K].
    pub weight: Weight<'a>,
    /// [N].
    pub bias: Option<&'a [f32]>,
    /// What adapters add before the bias.
    pub delta: Option<Delta<'a>>,
}

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(crate) enum Then<'a> {
    /// out = sums.
    Store(Columns<'a>),
    /// out = out + sums.
    Add(Columns<'a>),
    /// out = silu(gate) · up.
    Gated { gate: Columns<'a>, up: Columns<'a> },
}

impl<'a> Then<'a> {
    /// The weights it needs.
    pub(crate) fn weights(&self) -> impl Iterator<Item = Weight<'a>> + use<'a> {
        let (first, second) = match self {
            Then::Store(c) | Then::Add(c) => (c.weight, None),
            Then::Gated { gate, up } => (gate.weight, Some(up.weight)),
        };
        std::iter::once(first).chain(second)
    }

    /// The first weights of the column `n`.
    fn hint(&self, n: usize) -> Hint {
        match self {
            Then::Store(c) | Then::Add(c) | Then::Gated { gate: c, .. } => Hint::at(&c.weight, n),
        }
    }

    fn width(&self) -> usize {
        match self {
            Then::Store(c) | Then::Add(c) | Then::Gated { gate: c, .. } => c.weight.rows(),
        }
    }
}

/// One product of several over the same rows.
#[derive(Clone, Copy)]
pub(crate) struct Part<'a> {
    pub then: Then<'a>,
    /// [rows, N].
    pub out: SharedMut<'a>,
}

/// Rows whose sums are held at a time: with the columns of a task they stay in the second-level cache.
pub(crate) const ROW_BLOCK: usize = 64;

/// Weights that are likely wanted after those at hand: asked for ahead of time, never read.
#[derive(Clone, Copy)]
pub(crate) struct Hint(*const u8);

// SAFETY: an address that is only ever given to prefetch instructions.
unsafe impl Send for Hint {}
// SAFETY: as above.
unsafe impl Sync for Hint {}

impl Hint {
    pub(crate) const NONE: Hint = Hint(std::ptr::null());

    /// The rows of `weight` from `row` on.
    pub(crate) fn at(weight: &Weight, row: usize) -> Hint {
        Hint(match weight {
            Weight::Stored(view) => view.rows_bytes(row..row).as_ptr(),
            Weight::Int8(view) => view.quants_from(row).as_ptr(),
            Weight::Int4(view) => view.quants_from(row).as_ptr(),
        })
    }
}

/// Runs all `parts` over the rows of `x` in one parallel loop; `after` is what the next product begins with.
pub(crate) fn run(isa: Isa, pool: &Pool, x: &Packed, parts: &[Part], after: Hint) {
    let (rows, k) = (x.rows(), x.k());
    let tasks = tasks(rows, k, pool.threads(), parts);
    pool.run(tasks.len(), &|i| {
        let (part, rows, cols) = &tasks[i];
        // Threads take tasks in turns, as long as they take equally long.
        let next = tasks.get(i + pool.threads()).map_or(after, |(part, _, cols)| parts[*part].then.hint(cols.start));
        compute(isa, x, &parts[*part], rows.clone(), cols.clone(), next);
    });
}

/// Cuts the parts into tasks of some columns and up to 256 rows.
fn tasks(rows: usize, k: usize, threads: usize, parts: &[Part]) -> Vec<(usize, Range<usize>, Range<usize>)> {
    const ROWS: usize = 4 * ROW_BLOCK;
    const MOST_COLS: usize = 240;
    let total: usize = parts.iter().map(|p| p.then.width()).sum();
    let row_tasks = rows.div_ceil(ROWS).max(1);
    // Several tasks a thread even out what else the machine does, and the end of the loop; few rows are read from memory,
    // which likes long streams.
    let few = rows < 4;
    let wanted = if threads == 1 {
        1
    } else if few {
        2 * threads
    } else {
        (16 * threads).div_ceil(row_tasks)
    };
    let small = SMALL.div_ceil((k * rows.min(ROWS)).max(1));
    // 24 columns are whole tiles of every instruction set but AMX, which likes 48.
    let cols = total.div_ceil(wanted).max(small).clamp(24, if few { 4096 } else { MOST_COLS });
    let cols = cols.next_multiple_of(if cols > 24 { 48 } else { 24 });
    let mut tasks = Vec::new();
    for (p, part) in parts.iter().enumerate() {
        let n = part.then.width();
        // Columns outside, rows inside: neighbours in time share a block of weights.
        for start in (0..n).step_by(cols) {
            for first in (0..rows).step_by(ROWS) {
                tasks.push((p, first..rows.min(first + ROWS), start..n.min(start + cols)));
            }
        }
    }
    tasks
}

thread_local! {
    /// The sums of a block of rows and columns, twice where a gate needs its partner.
    static SUMS: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// The elements `rows` × `cols` of a part.
///
/// They must be this task's own (the condition of [`SharedMut::slice`]).
fn compute(isa: Isa, x: &Packed, part: &Part, rows: Range<usize>, cols: Range<usize>, next: Hint) {
    SUMS.with_borrow_mut(|[first, second]| {
        for start in rows.clone().step_by(ROW_BLOCK) {
            let rows = start..rows.end.min(start + ROW_BLOCK);
            let sums_of = |columns: &Columns, sums: &mut Vec<f32>, next: Hint| {
                sums.resize(sums.len().max(rows.len() * cols.len()), 0.0);
                column_sums(isa, x, rows.clone(), &columns.weight, cols.clone(), sums, next);
                if let Some(delta) = &columns.delta {
                    delta.add(isa, rows.clone(), cols.clone(), columns.weight.rows(), sums);
                }
            };
            let block =
                finish::Block { rows: rows.clone(), cols: cols.clone(), width: part.then.width(), out: part.out };
            match &part.then {
                Then::Store(columns) => {
                    sums_of(columns, first, next);
                    finish::store(isa, &block, first, columns.bias);
                }
                Then::Add(columns) => {
                    sums_of(columns, first, next);
                    finish::add(isa, &block, first, columns.bias);
                }
                Then::Gated { gate, up } => {
                    sums_of(gate, first, Hint::at(&up.weight, cols.start));
                    sums_of(up, second, next);
                    finish::gated(isa, &block, [first, second], [gate.bias, up.bias]);
                }
            }
        }
    });
}

/// sums[t, n] = Σ_k x[rows.start + t, k] · w[cols.start + n, k]; `sums` is [rows, cols]. `next`: what is wanted after.
pub(crate) fn column_sums(
    isa: Isa,
    x: &Packed,
    rows: Range<usize>,
    weight: &Weight,
    cols: Range<usize>,
    sums: &mut [f32],
    next: Hint,
) {
    assert!(rows.end <= x.rows() && cols.end <= weight.rows() && weight.cols() == x.k());
    assert!(sums.len() >= rows.len() * cols.len());
    if rows.is_empty() || cols.is_empty() {
        return;
    }
    match (x.arithmetic(), weight) {
        (Arithmetic::Int8, Weight::Int8(view)) => int8::sums(isa, x, rows, *view, cols, sums, next.0),
        (Arithmetic::Int4, Weight::Int4(view)) => int4::sums(isa, x, rows, *view, cols, sums, next.0),
        #[cfg(target_arch = "x86_64")]
        (Arithmetic::Bf16, Weight::Stored(view)) => bf16::sums(x, rows, *view, cols, sums, next.0),
        #[cfg(target_arch = "x86_64")]
        (Arithmetic::Amx { .. }, Weight::Stored(view)) => amx::sums(x, rows, *view, cols, sums),
        _ => fma::sums(isa, x, rows, weight, cols, sums, next.0),
    }
}

/// The whole product on one thread: for tests and benches. `x` is [rows, K], `out` [rows, N].
///
/// # Panics
/// If the lengths do not fit.
pub fn linear_alone(isa: Isa, precision: Precision, x: &[f32], weight: Weight, bias: Option<&[f32]>, out: &mut [f32]) {
    let k = weight.cols();
    let rows = x.len() / k;
    assert_eq!((x.len(), out.len()), (rows * k, rows * weight.rows()));
    let mut buffer = PackBuffer::default();
    buffer.reserve(rows, k).unwrap_or_else(|e| panic!("{e}"));
    #[cfg(target_arch = "x86_64")]
    assert!(isa != Isa::Amx || amx::permitted(), "this process may not use AMX");
    let arithmetic = Arithmetic::of(isa, precision, [weight]);
    let pool = Pool::new(1);
    let packed = buffer.pack(isa, &pool, arithmetic, Source { x, rows, k, norm: None });
    let part = Part { then: Then::Store(Columns { weight, bias, delta: None }), out: SharedMut::new(out) };
    run(isa, &pool, &packed, &[part], Hint::NONE);
}
