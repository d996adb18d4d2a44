//! The CPU executor: the twins, over weights that stay in the memory map.

mod adapters;
mod cores;
mod head;
mod limits;
mod pool;
mod weights;

use std::collections::HashSet;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use adapters::{Adapters, Fixed};
use cores::Cores;
pub use pool::Pool;
pub(crate) use pool::SMALL;
use weights::CpuLoader;
pub use weights::CpuWeights;

use super::{
    BlockCopy, Capacity, Cost, Costs, DeviceWeights, Executor, KernelTime, Limits, Loader, Memory, Output, Profile,
    Step, kernel_name,
};
use crate::error::{Error, ErrorKind, Result, checked_size, try_vec};
use crate::kernels::attention::{self, MAX_HEAD_DIM};
use crate::kernels::kv_write::{self, Cache};
use crate::kernels::linear::{self, Arithmetic, Hint, Norm, PackBuffer, Part, Precision, Source, Weight};
use crate::kernels::{Isa, KV_BLOCK, MatrixView, SharedMut, embed, gather_rows, rms_norm, rope};
use crate::model::{Buf, MatrixId, ModelSpec, Op, Plan, Projection, VectorId};
use crate::weights::{AdapterWeights, Tensor, WeightFormat, Weights};

/// Cores of this machine that nobody in the process computes on.
pub(crate) fn cores() -> &'static Cores {
    static CORES: OnceLock<Cores> = OnceLock::new();
    CORES.get_or_init(|| Cores::new(std::thread::available_parallelism().map_or(1, usize::from)))
}

/// How a model is held and computed.
#[derive(Clone)]
pub struct CpuOptions {
    /// The instruction set of the kernels.
    pub isa: Isa,
    /// The threads; models of a runtime share them, since it runs one step at a time.
    pub pool: Arc<Pool>,
    /// How products are computed.
    pub precision: Precision,
    /// Whether product weights are quantised.
    pub format: WeightFormat,
}

/// A model on the CPU.
pub struct CpuExecutor {
    options: CpuOptions,
    spec: ModelSpec,
    plan: Arc<Plan>,
    weights: Arc<CpuWeights>,
    /// Keys and values of each layer.
    kv: Vec<(Vec<f32>, Vec<f32>)>,
    buffers: Vec<Vec<f32>>,
    packed: PackBuffer,
    logits: Vec<f32>,
    adapters: Adapters,
    capacity: Capacity,
    profile: Profile,
    /// Of the call at hand, what has a line of its own in the profile.
    apart: Duration,
}

/// A product by its ids: what [`Then`] is with the weights at hand.
enum Product {
    Store(Projection),
    Add(Projection),
    Gated { gate: Projection, up: Projection },
}

impl Product {
    fn weights(&self) -> impl Iterator<Item = MatrixId> + use<> {
        let (first, second) = match self {
            Product::Store(p) | Product::Add(p) => (p.weight, None),
            Product::Gated { gate, up } => (gate.weight, Some(up.weight)),
        };
        std::iter::once(first).chain(second)
    }
}

impl CpuExecutor {
    /// Prepares `plan` for steps of up to `capacity`.
    ///
    /// # Errors
    /// `Unsupported` for a head size above [`MAX_HEAD_DIM`]; `HostMemory` if the KV cache or quantised weights cannot
    /// be had; `NonFinite` for a weight that cannot be quantised.
    pub fn new(
        spec: ModelSpec,
        plan: Arc<Plan>,
        weights: &Weights,
        capacity: Capacity,
        options: CpuOptions,
    ) -> Result<Self> {
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(Error::unsupported(format!("a head size of {}; at most {MAX_HEAD_DIM}", spec.head_dim)));
        }
        let loader = CpuLoader { spec: spec.clone(), plan: plan.clone(), options: options.clone() };
        let weights = Arc::new(loader.make(weights, None, &HashSet::new())?);
        let kv = cache(&spec, capacity)?;
        Ok(CpuExecutor {
            options,
            buffers: vec![Vec::new(); Buf::ALL.len()],
            packed: PackBuffer::default(),
            logits: Vec::new(),
            adapters: Adapters::default(),
            spec,
            plan,
            weights,
            kv,
            capacity,
            profile: Profile::default(),
            apart: Duration::ZERO,
        })
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
        let widest = widest(&self.spec);
        self.packed.reserve(rows.max(outputs), widest)
    }

    /// `after`: the weight that the next product begins with.
    fn execute(&mut self, op: &Op, after: MatrixId, step: &Step, picked: &[u32]) {
        let (t, m) = (step.rows.len(), picked.len());
        let isa = self.options.isa;
        match op {
            Op::Embed { table, out } => {
                let mut target = self.take(*out);
                let width = self.spec.hidden_size;
                let table = view(&self.weights.matrices[table.0]);
                let shared = SharedMut::new(&mut target);
                self.options.pool.over_rows(t, width, &|rows| {
                    // SAFETY: tasks have disjoint rows.
                    let out = unsafe { shared.slice(rows.start * width..rows.end * width) };
                    embed::embed(&step.rows[rows], table, out);
                });
                self.put(*out, target);
            }
            Op::Linear { x, norm, parts } => {
                let products = parts.iter().map(|(p, out)| (Product::Store(*p), *out)).collect();
                self.products(*x, *norm, products, t, after);
            }
            Op::LinearAdd { x, part, to } => self.products(*x, None, vec![(Product::Add(*part), *to)], t, after),
            Op::LinearGated { x, norm, gate, up, out } => {
                let product = Product::Gated { gate: *gate, up: *up };
                self.products(*x, Some(*norm), vec![(product, *out)], t, after);
            }
            Op::Rope { x, heads } => {
                let mut target = self.take(*x);
                let half = self.spec.head_dim / 2;
                let width = heads * 2 * half;
                let shared = SharedMut::new(&mut target);
                self.options.pool.over_rows(t, width, &|rows| {
                    let angles = &step.cos_sin[rows.start * 2 * half..rows.end * 2 * half];
                    // SAFETY: tasks have disjoint rows.
                    let x = unsafe { shared.slice(rows.start * width..rows.end * width) };
                    rope::rope(isa, angles, half, *heads, x);
                });
                self.put(*x, target);
            }
            Op::KvWrite { layer } => {
                let (keys, values) = &mut self.kv[*layer];
                let (kv_heads, head_dim) = (self.spec.kv_heads, self.spec.head_dim);
                let cache = Cache { keys: SharedMut::new(keys), values: SharedMut::new(values), kv_heads, head_dim };
                let width = kv_heads * head_dim;
                let (k, v) = (&self.buffers[Buf::K as usize], &self.buffers[Buf::V as usize]);
                // A key is scattered over as many cache lines as it has elements.
                self.options.pool.over_rows(t, 8 * width, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: the engine gives every row its own slot; attention runs after this loop.
                    unsafe { kv_write::kv_write(&step.rows[rows], &k[span.clone()], &v[span], cache) };
                });
            }
            Op::Attention { layer } => self.attention(*layer, step),
            Op::GatherRows { x, out } => {
                let mut target = self.take(*out);
                let width = x.width(&self.spec);
                gather_rows::gather_rows(picked, &self.buffers[*x as usize], width, &mut target[..m * width]);
                self.put(*out, target);
            }
            Op::RmsNorm { x, weight, out } => {
                let mut target = self.take(*out);
                let (eps, width) = (self.spec.rms_norm_eps, x.width(&self.spec));
                let shared = SharedMut::new(&mut target);
                let (x, weight) = (&self.buffers[*x as usize], &self.weights.vectors[weight.0][..]);
                self.options.pool.over_rows(m, width, &|rows| {
                    let span = rows.start * width..rows.end * width;
                    // SAFETY: tasks have disjoint rows.
                    let out = unsafe { shared.slice(span.clone()) };
                    rms_norm::rms_norm(isa, &x[span], weight, eps, out);
                });
                self.put(*out, target);
            }
        }
    }

    /// What steps with adapters are sized by.
    fn fixed(&self) -> Fixed {
        Fixed { max_rows: self.capacity.max_rows, widest: widest(&self.spec), threads: self.options.pool.threads() }
    }

    fn take(&mut self, buf: Buf) -> Vec<f32> {
        std::mem::take(&mut self.buffers[buf as usize])
    }

    fn put(&mut self, buf: Buf, buffer: Vec<f32>) {
        self.buffers[buf as usize] = buffer;
    }

    /// Products over the same rows: the input is packed once, then one parallel loop computes them all.
    fn products(
        &mut self,
        x: Buf,
        norm: Option<VectorId>,
        products: Vec<(Product, Buf)>,
        rows: usize,
        after: MatrixId,
    ) {
        let mut outs: Vec<Vec<f32>> = products.iter().map(|(_, out)| self.take(*out)).collect();
        let CpuOptions { isa, precision, pool, .. } = &self.options;
        let k = x.width(&self.spec);
        let norm = norm.map(|v| Norm { weight: &self.weights.vectors[v.0], eps: self.spec.rms_norm_eps });
        let held = &self.weights;
        let source = Source { x: &self.buffers[x as usize][..rows * k], rows, k, norm };
        let mut ups = None;
        if !self.adapters.is_idle() {
            let begin = Instant::now();
            let ids: Vec<MatrixId> = products.iter().flat_map(|(product, _)| product.weights()).collect();
            if let Some((down, cost)) = self.adapters.down(*isa, pool, &ids, source) {
                ups = Some(down);
                if self.profile.on {
                    self.apart = begin.elapsed();
                    self.profile.add("lora_down", self.apart, cost);
                }
            }
        }
        let mut first = 0;
        let mut parts: Vec<Part> = Vec::new();
        for ((product, _), out) in products.iter().zip(&mut outs) {
            let then = held.then(product, |i| ups.as_ref().map(|ups| ups.delta(first + i)));
            first += product.weights().count();
            parts.push(Part { then, out: SharedMut::new(out) });
        }
        let arithmetic = Arithmetic::of(*isa, *precision, parts.iter().flat_map(|p| p.then.weights()));
        let packed = self.packed.pack(*isa, pool, arithmetic, source);
        linear::run(*isa, pool, &packed, &parts, Hint::at(&held.weight(after), 0));
        for ((_, buf), out) in products.iter().zip(outs) {
            self.buffers[*buf as usize] = out;
        }
    }

    /// Adds a kernel's run, which began then, to the profile.
    fn note(&mut self, name: &str, begin: Instant, step: &Step, cost: impl Fn(&Costs) -> Cost) {
        let time = begin.elapsed().saturating_sub(std::mem::take(&mut self.apart));
        let CpuWeights { matrices, quantised, .. } = &*self.weights;
        let weight_bytes = |id: MatrixId| match &quantised[id.0] {
            Some(matrix) => matrix.bytes() as u64,
            None => matrices[id.0].bytes().len() as u64,
        };
        let shape = |id: MatrixId| [matrices[id.0].shape()[0], matrices[id.0].shape()[1]];
        let costs = Costs { spec: &self.spec, step, weight_bytes: &weight_bytes, shape: &shape };
        let cost = cost(&costs);
        self.profile.add(name, time, cost);
    }

    fn weight(&self, id: MatrixId) -> Weight<'_> {
        self.weights.weight(id)
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
        let (isa, kv_heads) = (self.options.isa, spec.kv_heads);
        let runs = attention::row_runs(step.rows);
        self.options.pool.run(runs.len() * kv_heads, &|task| {
            attention::attention(isa, call, runs[task / kv_heads].clone(), task % kv_heads);
        });
        self.put(Buf::Attn, target);
    }
}

fn view(tensor: &Tensor) -> MatrixView<'_> {
    MatrixView::new(tensor.dtype(), tensor.bytes(), tensor.shape()[0], tensor.shape()[1])
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
        self.adapters.begin(step.adapters)?;
        let _turn = cores().take(self.options.pool.threads());
        let order = head::Order::new(step.outputs);
        let plan = self.plan.clone();
        for (i, op) in plan.ops.iter().enumerate() {
            let begin = self.profile.on.then(Instant::now);
            self.execute(op, plan.first_weight(i + 1), step, &order.rows);
            if let Some(begin) = begin {
                self.note(kernel_name(op), begin, step, |costs| costs.of(op));
            }
        }
        let begin = self.profile.on.then(Instant::now);
        let outputs = self.head(step, &order)?;
        if let Some(begin) = begin
            && !step.outputs.is_empty()
        {
            self.note("head", begin, step, |costs| costs.head(plan.head));
        }
        Ok(outputs)
    }

    fn copy_blocks(&mut self, copies: &[BlockCopy]) -> Result<()> {
        let size = KV_BLOCK * self.spec.kv_width();
        for cache in self.kv.iter_mut().flat_map(|(keys, values)| [keys, values]) {
            for copy in copies {
                let from = copy.from as usize * size;
                cache.copy_within(from..from + size, copy.to as usize * size);
            }
        }
        Ok(())
    }

    fn loader(&self) -> Arc<dyn Loader> {
        let (spec, plan, options) = (self.spec.clone(), self.plan.clone(), self.options.clone());
        Arc::new(CpuLoader { spec, plan, options })
    }

    fn weights(&self) -> Option<DeviceWeights> {
        Some(DeviceWeights::Cpu(self.weights.clone()))
    }

    fn install(&mut self, weights: DeviceWeights) -> Result<bool> {
        let DeviceWeights::Cpu(weights) = weights else { return Err(Error::internal("weights of another device")) };
        self.weights = weights;
        Ok(false)
    }

    fn unload(&mut self) {
        self.weights = Arc::default();
    }

    fn free_cache(&mut self) {
        self.kv = Vec::new();
    }

    fn restore_cache(&mut self) -> Result<()> {
        if self.kv.is_empty() {
            self.kv = cache(&self.spec, self.capacity)?;
        }
        Ok(())
    }

    fn add_adapter(&mut self, slot: u32, adapter: Arc<AdapterWeights>, room: u64) -> Result<()> {
        self.adapters.add(slot, adapter, room, self.fixed())
    }

    fn remove_adapter(&mut self, slot: u32) {
        self.adapters.remove(slot);
    }

    fn memory(&self) -> Memory {
        let (weights, mapped) = self.weights.bytes();
        Memory {
            weights,
            mapped,
            kv_cache: self.kv.iter().map(|(k, v)| (k.len() + v.len()) as u64 * 4).sum(),
            scratch: scratch_bytes(&self.spec, self.capacity.max_rows, self.options.pool.threads()),
            host: 0,
            adapters: self.adapters.bytes(self.fixed()),
        }
    }

    fn set_profiling(&mut self, on: bool) -> Result<()> {
        self.profile.on = on;
        Ok(())
    }

    fn take_profile(&mut self) -> Vec<KernelTime> {
        self.profile.take()
    }

    fn limits(&mut self) -> Result<Limits> {
        if self.weights.matrices.is_empty() {
            let text = "the model's weights are not there: it sleeps, or an update writes them in place";
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        let _turn = cores().take(self.options.pool.threads());
        limits::measure(&self.options, &self.weight(self.plan.first_weight(0)))
    }
}

/// The longest input of a product.
fn widest(spec: &ModelSpec) -> usize {
    Buf::ALL.iter().map(|b| b.width(spec)).max().unwrap_or(0)
}

/// Activations for steps of up to `max_rows` rows, packed inputs, the bounded block of logits and the statistics of the
/// vocabulary, and what each thread keeps (sums, widened weights, a row that is sampled).
pub(crate) fn scratch_bytes(spec: &ModelSpec, max_rows: usize, threads: usize) -> u64 {
    let widths: usize = Buf::ALL.iter().map(|b| b.width(spec)).sum();
    let activations = 4 * widths as u64 * max_rows as u64 + PackBuffer::bytes_for(max_rows, widest(spec)) as u64;
    activations + head::scratch_bytes(spec.vocab_size, max_rows) + threads as u64 * head::thread_bytes(spec.vocab_size)
}

/// Keys and values of each layer.
fn cache(spec: &ModelSpec, capacity: Capacity) -> Result<Vec<(Vec<f32>, Vec<f32>)>> {
    let per_layer = checked_size("the KV cache", &[capacity.kv_blocks, KV_BLOCK, spec.kv_width()])?;
    (0..spec.layers).map(|_| Ok((zeroed(per_layer)?, zeroed(per_layer)?))).collect()
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
