//! What adapters add to the products of a step.
//!
//! Rows are grouped by adapter for A x, so that an adapter's factors are read once for all of its rows; B times that is
//! added where a product's sums are at hand, row by row. Neither depends on what else is in the step.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;

use super::Pool;
use crate::backend::cpu::SMALL;
use crate::backend::{Cost, NO_ADAPTER};
use crate::error::{Error, Result, try_vec};
use crate::kernels::linear::Source;
use crate::kernels::lora_down::lora_down;
use crate::kernels::lora_up::{Delta, Up};
use crate::kernels::rms_norm::rms_norm;
use crate::kernels::{Isa, SharedMut};
use crate::model::MatrixId;
use crate::weights::{AdapterWeights, LowRank};

/// Rows whose A x a task computes at most: their inputs stay in the cache.
const MOST_ROWS: usize = 32;
/// Products that share an input at most.
const PARTS: usize = 3;

/// The adapters of a model, and what a step takes of them.
#[derive(Default)]
pub(super) struct Adapters {
    /// By slot.
    loaded: Vec<Option<Arc<AdapterWeights>>>,
    groups: Vec<Group>,
    /// The step's rows that have an adapter, group by group.
    rows: Vec<u32>,
    /// The group of each row of the step, or [`NO_ADAPTER`]; empty in a step without adapters.
    group_of: Vec<u32>,
    /// scale · A x of the products at hand: [rows, stride].
    down: Vec<f32>,
    stride: usize,
}

/// The rows of an adapter in a step.
struct Group {
    adapter: Arc<AdapterWeights>,
    /// In `Adapters::rows`.
    rows: Range<usize>,
}

/// Some rows of a group times the first factor of one product.
struct Task<'a> {
    rows: Range<usize>,
    module: &'a LowRank,
    first: usize,
}

/// What the groups add to some products.
pub(super) struct Ups<'a> {
    /// By product.
    ups: Vec<Vec<Up<'a>>>,
    down: &'a [f32],
    stride: usize,
}

impl Ups<'_> {
    /// What is added to the i-th product.
    pub fn delta(&self, i: usize) -> Delta<'_> {
        Delta { ups: &self.ups[i], down: self.down, stride: self.stride }
    }
}

impl Adapters {
    /// As [`Executor::add_adapter`](crate::backend::Executor::add_adapter), for steps of up to `max_rows` rows whose
    /// products have inputs of up to `widest` elements.
    pub fn add(&mut self, slot: u32, adapter: Arc<AdapterWeights>, room: u64, fixed: Fixed) -> Result<()> {
        let slot = slot as usize;
        if self.loaded.get(slot).is_some_and(Option::is_some) {
            return Err(Error::internal(format!("slot {slot} has an adapter")));
        }
        let adapters = || self.loaded.iter().flatten().chain([&adapter]);
        let needed = bytes(adapters(), fixed);
        if needed > room {
            return Err(Error::limit(format!(
                "with this adapter all of them take {needed} bytes, and the model's memory budget leaves {room}"
            )));
        }
        self.loaded.resize(self.loaded.len().max(slot + 1), None);
        self.loaded[slot] = Some(adapter);
        Ok(())
    }

    pub fn remove(&mut self, slot: u32) {
        if let Some(place) = self.loaded.get_mut(slot as usize) {
            *place = None;
        }
        if self.loaded.iter().all(Option::is_none) {
            self.down = Vec::new();
        }
    }

    /// What the adapters take, with what steps need besides.
    pub fn bytes(&self, fixed: Fixed) -> u64 {
        bytes(self.loaded.iter().flatten(), fixed)
    }

    /// Groups the rows of a step.
    pub fn begin(&mut self, slots: &[u32]) -> Result<()> {
        self.groups.clear();
        self.rows.clear();
        self.group_of.clear();
        if slots.is_empty() {
            return Ok(());
        }
        self.rows.extend((0..).zip(slots).filter(|(_, slot)| **slot != NO_ADAPTER).map(|(row, _): (u32, _)| row));
        // A stable sort: rows stay in order.
        self.rows.sort_by_key(|row| slots[*row as usize]);
        self.group_of.resize(slots.len(), NO_ADAPTER);
        let mut start = 0;
        for rows in self.rows.chunk_by(|a, b| slots[*a as usize] == slots[*b as usize]) {
            let slot = slots[rows[0] as usize];
            let adapter = self.loaded.get(slot as usize).and_then(Option::as_ref);
            let adapter = adapter.ok_or_else(|| Error::internal(format!("slot {slot} has no adapter")))?.clone();
            for row in rows {
                self.group_of[*row as usize] = self.groups.len() as u32;
            }
            self.groups.push(Group { adapter, rows: start..start + rows.len() });
            start += rows.len();
        }
        self.stride = PARTS * self.groups.iter().map(|g| g.adapter.rank()).max().unwrap_or(0);
        let len = self.rows.len() * self.stride;
        if self.down.len() < len {
            self.down = Vec::new();
            self.down = try_vec("adapters", 0.0, len)?;
        }
        Ok(())
    }

    /// True if no row of the step has an adapter.
    pub fn is_idle(&self) -> bool {
        self.groups.is_empty()
    }

    /// The score head of a row of the step, where its adapter has one.
    pub fn head(&self, row: u32) -> Option<&[f32]> {
        let group = *self.group_of.get(row as usize)?;
        self.groups.get(group as usize)?.adapter.head()
    }

    /// Computes A x for the products with these weights, which share x: the step's rows. `None` if no adapter of the step
    /// changes any of them; else also what it cost.
    pub fn down(&mut self, isa: Isa, pool: &Pool, weights: &[MatrixId], x: Source) -> Option<(Ups<'_>, Cost)> {
        let mut ups: Vec<Vec<Up>> = vec![Vec::new(); weights.len()];
        let mut tasks = Vec::new();
        let each = self.rows.len().div_ceil(4 * pool.threads()).clamp(1, MOST_ROWS);
        let (mut multiply_adds, mut bytes) = (0, 0);
        for group in &self.groups {
            let mut first = 0;
            for (weight, ups) in weights.iter().zip(&mut ups) {
                let Some(module) = group.adapter.get(*weight) else { continue };
                let (rows, at) = (&self.rows[group.rows.clone()], group.rows.start);
                ups.push(Up { b: &module.b, rank: module.rank, rows, at, first });
                for start in group.rows.clone().step_by(each) {
                    tasks.push(Task { rows: start..group.rows.end.min(start + each), module, first });
                }
                first += module.rank;
                multiply_adds += group.rows.len() * module.a.len();
                bytes += module.a.len() * 4;
            }
        }
        if tasks.is_empty() {
            return None;
        }
        let (rows, stride) = (&self.rows, self.stride);
        let out = SharedMut::new(&mut self.down);
        let run = |i: usize| {
            let task: &Task = &tasks[i];
            compute(isa, &rows[task.rows.clone()], task.module, x, |i, values| {
                let start = (task.rows.start + i) * stride + task.first;
                // SAFETY: a task has its own rows and columns.
                unsafe { out.slice(start..start + values.len()) }.copy_from_slice(values);
            });
        };
        if multiply_adds < 2 * SMALL {
            (0..tasks.len()).for_each(run);
        } else {
            pool.run(tasks.len(), &run);
        }
        let cost = Cost { bytes: (bytes + 4 * rows.len() * x.k) as u64, flops: 2 * multiply_adds as u64 };
        Some((Ups { ups, down: &self.down, stride }, cost))
    }
}

/// What the memory for steps with adapters depends on.
#[derive(Clone, Copy)]
pub(super) struct Fixed {
    pub max_rows: usize,
    /// The longest input of a product.
    pub widest: usize,
    pub threads: usize,
}

fn bytes<'a>(adapters: impl Iterator<Item = &'a Arc<AdapterWeights>> + Clone, fixed: Fixed) -> u64 {
    let Some(rank) = adapters.clone().map(|a| a.rank()).max() else { return 0 };
    let scratch = fixed.max_rows * PARTS * rank + fixed.threads * MOST_ROWS * (fixed.widest + rank);
    4 * scratch as u64 + adapters.map(|a| a.bytes()).sum::<u64>()
}

thread_local! {
    /// Inputs of a task after their norm, and its sums.
    static SCRATCH: RefCell<[Vec<f32>; 2]> = const { RefCell::new([Vec::new(), Vec::new()]) };
}

/// Hands scale · A x of each of the rows, with its place among them, to `put`.
fn compute(isa: Isa, rows: &[u32], module: &LowRank, x: Source, put: impl Fn(usize, &[f32])) {
    SCRATCH.with_borrow_mut(|[inputs, sums]| {
        inputs.resize(inputs.len().max(rows.len() * x.k), 0.0);
        sums.resize(sums.len().max(rows.len() * module.rank), 0.0);
        for (row, input) in rows.iter().zip(inputs.chunks_exact_mut(x.k)) {
            let row = &x.x[*row as usize * x.k..][..x.k];
            match x.norm {
                Some(norm) => rms_norm(isa, row, norm.weight, norm.eps, input),
                None => input.copy_from_slice(row),
            }
        }
        let (inputs, sums) = (&inputs[..rows.len() * x.k], &mut sums[..rows.len() * module.rank]);
        lora_down(isa, inputs, &module.a, module.rank, module.scale, sums);
        for (i, values) in sums.chunks_exact(module.rank).enumerate() {
            put(i, values);
        }
    });
}
