//! The CPU executor: the twins, over weights that stay in the memory map.

mod head;
mod pool;

use std::ops::Range;

pub use pool::Pool;

use super::{Capacity, Executor, Memory, Output, Step};
use crate::error::{Error, ErrorKind, Result, checked_size, try_vec};
use crate::kernels::attention::{self, MAX_HEAD_DIM};
use crate::kernels::kv_write::{self, Cache};
use crate::kernels::linear::{self, Product};
use crate::kernels::{Isa, KV_BLOCK, MatrixView, SharedMut, add, embed, gather_rows, rms_norm, rope, silu_mul};
use crate::model::{Buf, LinearPart, MatrixId, ModelSpec, Op, Plan, Rows, VectorId};
use crate::weights::{Tensor, Weights};

/// Multiply-adds below which a loop is not worth waking a thread for.
const SMALL: usize = 100_000;

/// A model on the CPU.
pub struct CpuExecutor {
    isa: Isa,
    pool: Pool,
    spec: ModelSpec,
    plan: std::sync::Arc<Plan>,
    matrices: Vec<Tensor>,
    vectors: Vec<Vec<f32>>,
    mapped: bool,
    /// Keys and values of each layer.
    kv: Vec<(Vec<f32>, Vec<f32>)>,
    buffers: Vec<Vec<f32>>,
    logits: Vec<f32>,
    capacity: Capacity,
}

impl CpuExecutor {
    /// Prepares `plan` for steps of up to `capacity`.
    ///
    /// # Errors
    /// `Unsupported` for a head size above [`MAX_HEAD_DIM`]; `HostMemory` if the KV cache cannot be had.
    pub fn new(
        spec: ModelSpec,
        plan: std::sync::Arc<Plan>,
        weights: &Weights,
        mapped: bool,
        capacity: Capacity,
        threads: usize,
    ) -> Result<Self> {
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head size of {}; at most {MAX_HEAD_DIM}", spec.head_dim)));
        }
        let matrices = plan.matrices.iter().map(|m| weights.get(&m.name).cloned()).collect::<Result<_>>()?;
        let vectors = plan.vectors.iter().map(|v| Ok(weights.get(&v.name)?.to_f32())).collect::<Result<_>>()?;
        let per_layer = checked_size("the KV cache", &[capacity.kv_blocks, KV_BLOCK, spec.kv_width()])?;
        let kv = (0..spec.layers).map(|_| Ok((zeroed(per_layer)?, zeroed(per_layer)?))).collect::<Result<_>>()?;
        Ok(CpuExecutor {
            isa: Isa::detect(),
            pool: Pool::new(threads),
            buffers: vec![Vec::new(); Buf::ALL.len()],
            logits: Vec::new(),
            spec,
            plan,
            matrices,
            vectors,
            mapped,
            kv,
            capacity,
        })
    }

    fn matrix(&self, id: MatrixId) -> MatrixView<'_> {
        let tensor = &self.matrices[id.0];
        MatrixView::new(tensor.dtype(), tensor.bytes(), tensor.shape()[0], tensor.shape()[1])
    }

    fn vector(&self, id: VectorId) -> &[f32] {
        &self.vectors[id.0]
    }

    /// Makes room for T rows (M for the last two buffers).
    fn reserve(&mut self, rows: usize, outputs: usize) -> Result<()> {
        for buf in Buf::ALL {
            let rows = if matches!(buf, Buf::Picked | Buf::Final) { outputs } else { rows };
            let len = rows * buf.width(&self.spec);
            if self.buffers[buf as usize].len() < len {
                self.buffers[buf as usize] = try_vec("activations", 0.0, len)?;
            }
        }
        Ok(())
    }

    fn execute(&mut self, op: &Op, step: &Step, picked: &[u32]) {
        let (t, m) = (step.rows.len(), picked.len());
        match op {
            Op::Embed { table, out } => {
                let mut out = self.take(*out);
                let (width, table) = (self.spec.hidden_size, self.matrix(*table));
                embed::embed(step.rows, table, &mut out[..t * width]);
                self.put(Buf::Hidden, out);
            }
            Op::RmsNorm { x, weight, out, rows } => {
                let rows = if *rows == Rows::All { t } else { m };
                let mut target = self.take(*out);
                let (isa, eps, width) = (self.isa, self.spec.rms_norm_eps, x.width(&self.spec));
                let shared = SharedMut::new(&mut target);
                let (pool, x, weight) = (&mut self.pool, &self.buffers[*x as usize], &self.vectors[weight.0]);
                over_rows(pool, rows, width, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: tasks have disjoint rows.
                    let out = unsafe { shared.slice(span.clone()) };
                    rms_norm::rms_norm(isa, &x[span], weight, eps, out);
                });
                self.put(*out, target);
            }
            Op::Linear { x, parts } => self.linear(*x, parts, t),
            Op::Rope { x, heads } => {
                let mut target = self.take(*x);
                let half = self.spec.head_dim / 2;
                let width = heads * 2 * half;
                let shared = SharedMut::new(&mut target);
                over_rows(&mut self.pool, t, width, &|rows| {
                    let angles = &step.cos_sin[rows.start * 2 * half..rows.end * 2 * half];
                    // SAFETY: tasks have disjoint rows.
                    rope::rope(angles, half, *heads, unsafe { shared.slice(rows.start * width..rows.end * width) });
                });
                self.put(*x, target);
            }
            Op::KvWrite { layer } => {
                let (keys, values) = &mut self.kv[*layer];
                let (kv_heads, head_dim) = (self.spec.kv_heads, self.spec.head_dim);
                let cache = Cache { keys: SharedMut::new(keys), values: SharedMut::new(values), kv_heads, head_dim };
                let width = kv_heads * head_dim;
                let (k, v) = (&self.buffers[Buf::K as usize], &self.buffers[Buf::V as usize]);
                over_rows(&mut self.pool, t, width, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: the engine gives every row its own slot; attention runs after this loop.
                    unsafe { kv_write::kv_write(&step.rows[rows], &k[span.clone()], &v[span], cache) };
                });
            }
            Op::Attention { layer } => self.attention(*layer, step),
            Op::SiluMul { gate, up } => {
                let mut target = self.take(*up);
                let (isa, width) = (self.isa, self.spec.intermediate_size);
                let shared = SharedMut::new(&mut target);
                let gate = &self.buffers[*gate as usize];
                over_rows(&mut self.pool, t, width * 8, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: tasks have disjoint rows.
                    silu_mul::silu_mul(isa, &gate[span.clone()], unsafe { shared.slice(span) });
                });
                self.put(*up, target);
            }
            Op::Add { delta, to } => {
                let mut target = self.take(*to);
                let width = self.spec.hidden_size;
                let shared = SharedMut::new(&mut target);
                let delta = &self.buffers[*delta as usize];
                over_rows(&mut self.pool, t, width, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: tasks have disjoint rows.
                    add::add(&delta[span.clone()], unsafe { shared.slice(span) });
                });
                self.put(*to, target);
            }
            Op::GatherRows { x, out } => {
                let mut target = self.take(*out);
                let width = x.width(&self.spec);
                gather_rows::gather_rows(picked, &self.buffers[*x as usize], width, &mut target[..m * width]);
                self.put(*out, target);
            }
        }
    }

    fn take(&mut self, buf: Buf) -> Vec<f32> {
        std::mem::take(&mut self.buffers[buf as usize])
    }

    fn put(&mut self, buf: Buf, buffer: Vec<f32>) {
        self.buffers[buf as usize] = buffer;
    }

    /// All parts of an [`Op::Linear`] in one loop, cut into tasks of columns and rows.
    fn linear(&mut self, x: Buf, parts: &[LinearPart], rows: usize) {
        let mut outs: Vec<Vec<f32>> = parts.iter().map(|p| self.take(p.out)).collect();
        let mut pool = std::mem::replace(&mut self.pool, Pool::new(1));
        {
            let x = &self.buffers[x as usize][..];
            let products: Vec<Product> = parts
                .iter()
                .zip(&mut outs)
                .map(|(part, out)| Product {
                    x,
                    weight: self.matrix(part.weight),
                    bias: part.bias.map(|b| self.vector(b)),
                    out: SharedMut::new(out),
                })
                .collect();
            products_in_tasks(self.isa, &mut pool, &products, rows);
        }
        self.pool = pool;
        for (part, out) in parts.iter().zip(outs) {
            self.put(part.out, out);
        }
    }

    fn attention(&mut self, layer: usize, step: &Step) {
        let mut target = self.take(Buf::Attn);
        let spec = &self.spec;
        let (keys, values) = &self.kv[layer];
        let inputs = attention::Inputs {
            rows: step.rows,
            tables: step.tables,
            q: &self.buffers[Buf::Q as usize],
            keys,
            values,
            heads: spec.heads,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
            window: spec.sliding_window,
        };
        let call = attention::Call { inputs, out: SharedMut::new(&mut target) };
        let (isa, kv_heads) = (self.isa, spec.kv_heads);
        let runs = attention::row_runs(step.rows);
        self.pool.run(runs.len() * kv_heads, &|task| {
            attention::attention(isa, call, runs[task / kv_heads].clone(), task % kv_heads);
        });
        self.put(Buf::Attn, target);
    }
}

impl Executor for CpuExecutor {
    fn step(&mut self, step: &Step) -> Result<Vec<Output>> {
        if step.rows.len() > self.capacity.max_rows {
            return Err(Error::internal(format!(
                "a step of {} rows, built for {}",
                step.rows.len(),
                self.capacity.max_rows
            )));
        }
        self.reserve(step.rows.len(), step.outputs.len())?;
        let order = head::Order::new(step.outputs);
        let plan = self.plan.clone();
        for op in &plan.ops {
            self.execute(op, step, &order.rows);
        }
        self.head(step, &order)
    }

    fn memory(&self) -> Memory {
        let floats = |vecs: &[Vec<f32>]| vecs.iter().map(|v| v.len() as u64 * 4).sum::<u64>();
        let matrices: u64 = self.matrices.iter().map(|m| m.bytes().len() as u64).sum();
        let (weights, mapped) = if self.mapped { (0, matrices) } else { (matrices, 0) };
        Memory {
            weights: weights + floats(&self.vectors),
            mapped,
            kv_cache: self.kv.iter().map(|(k, v)| (k.len() + v.len()) as u64 * 4).sum(),
            scratch: scratch_bytes(&self.spec, self.capacity.max_rows),
        }
    }
}

/// Activations for steps of up to `max_rows` rows, and the bounded block of logits.
pub(crate) fn scratch_bytes(spec: &ModelSpec, max_rows: usize) -> u64 {
    let widths: usize = Buf::ALL.iter().map(|b| b.width(spec)).sum();
    let logits = super::logit_rows(spec.vocab_size) * spec.vocab_size;
    4 * (widths as u64 * max_rows as u64 + logits as u64)
}

/// Cuts `rows` rows of `cost` multiply-adds each into tasks.
fn over_rows(pool: &mut Pool, rows: usize, cost: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
    let per_task = rows.div_ceil(4 * pool.threads()).max(SMALL.div_ceil(4 * cost.max(1)));
    pool.run(rows.div_ceil(per_task.max(1)), &|i| body(i * per_task..rows.min((i + 1) * per_task)));
}

/// Cuts products over the same rows into tasks of some columns and up to 64 rows.
fn products_in_tasks(isa: Isa, pool: &mut Pool, products: &[Product], rows: usize) {
    const ROWS: usize = 64;
    let total: usize = products.iter().map(|p| p.weight.rows()).sum();
    let k = products.first().map_or(0, |p| p.weight.cols());
    let row_tasks = rows.div_ceil(ROWS);
    let wanted = (4 * pool.threads()).div_ceil(row_tasks.max(1));
    let small = SMALL.div_ceil((k * rows.min(ROWS)).max(1));
    let cols = total.div_ceil(wanted).max(small).next_multiple_of(24);
    let mut tasks = Vec::new();
    for (p, product) in products.iter().enumerate() {
        let n = product.weight.rows();
        // Columns outside, rows inside: neighbours in time share a block of weights.
        for start in (0..n).step_by(cols) {
            for first in (0..rows).step_by(ROWS) {
                tasks.push((p, first..rows.min(first + ROWS), start..n.min(start + cols)));
            }
        }
    }
    pool.run(tasks.len(), &|i| {
        let (p, rows, cols) = tasks[i].clone();
        linear::linear(isa, products[p], rows, cols);
    });
}

/// Zeroed memory that the system commits only when it is touched.
fn zeroed(len: usize) -> Result<Vec<f32>> {
    let fail = || Error::new(ErrorKind::HostMemory, format!("the KV cache: no memory for {} bytes", len * 4));
    if len == 0 {
        return Ok(Vec::new());
    }
    let layout = std::alloc::Layout::array::<f32>(len).map_err(|_| fail())?;
    // SAFETY: the layout has a size above 0.
    let start = unsafe { std::alloc::alloc_zeroed(layout) }.cast::<f32>();
    if start.is_null() {
        return Err(fail());
    }
    // SAFETY: from the global allocator with this layout; zero bytes are valid floats.
    Ok(unsafe { Vec::from_raw_parts(start, len, len) })
}
