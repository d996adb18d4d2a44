//! Adapters on the device.
//!
//! Products that share an input (queries, keys and values; gate and up) have one buffer with the factors of all adapters,
//! each at a place of its own: one dispatch of `lora_down` serves every adapter of a step, and the products' variants with
//! adapters find the rest there. What an adapter leaves alone takes no place. Buffers grow when there is no gap for a new
//! adapter; a step without adapters runs the pipelines and bindings that a model without any has.

use super::device::Gpu;
use super::layers::{Call, Dims, HALF_BOUND, LEAST_SCALE};
use super::matrix::Order;
use super::pipelines::{Flags, Pipelines, TileShape};
use super::record::{Bound, Dispatch, Params};
use crate::backend::NO_ADAPTER;
use crate::error::{Error, Result};
use crate::kernels::{Kernel, lora_down};
use crate::model::MatrixId;
use crate::weights::{AdapterWeights, LowRank};

/// Products that share an input, as adapters see them.
pub(super) struct Product {
    /// In the order in which they are merged.
    pub weights: Vec<MatrixId>,
    pub order: Order,
    /// N of each.
    pub lengths: Vec<usize>,
    pub k: usize,
    /// The input.
    pub x: wgpu::Buffer,
    /// What the input was divided by to fit f16.
    pub scale: f32,
    pub half_in: bool,
    /// How large the results may become.
    pub bound: HalfBound,
}

/// What results have to fit, where they are f16.
#[derive(Clone, Copy)]
pub(super) enum HalfBound {
    /// They are f32.
    None,
    /// (length of an input · longest row + largest bias) · factor of the rotation.
    Rotated { length: f32, rest: f32, factor: f32 },
    /// The square of (length · longest row + largest bias), times the scale.
    Gated { length: f32, rest: f32, scale: f32 },
}

/// What the results of each product have to fit, with any adapter. Holds nothing of the device.
#[derive(Default)]
pub(super) struct Bounds(Vec<(Vec<MatrixId>, HalfBound)>);

impl Bounds {
    /// By product, what rows with this adapter are scaled by besides: what the gate's product divides its results by to fit
    /// f16, the next product multiplies with.
    ///
    /// # Errors
    /// `Unsupported` if results could be too large for f16.
    pub fn scales(&self, adapter: &AdapterWeights) -> Result<Vec<f32>> {
        let mut scales = vec![1.0; self.0.len()];
        for (i, (weights, bound)) in self.0.iter().enumerate() {
            match *bound {
                HalfBound::None => {}
                HalfBound::Rotated { length, rest, factor } => {
                    let largest = (rest + length * longest(weights, adapter)) * factor;
                    if largest > HALF_BOUND {
                        return Err(too_large("queries, keys and values", largest));
                    }
                }
                HalfBound::Gated { length, rest, scale } => {
                    let largest = (rest + length * longest(weights, adapter)).powi(2);
                    let mut own = 1.0f32;
                    while largest * scale * own > HALF_BOUND && scale * own >= LEAST_SCALE {
                        own /= 2.0;
                    }
                    if scale * own < LEAST_SCALE {
                        return Err(too_large("results of the MLP", largest));
                    }
                    scales[i] = own;
                    if let Some(next) = scales.get_mut(i + 1) {
                        *next = 1.0 / own;
                    }
                }
            }
        }
        Ok(scales)
    }
}

/// What a call needs to be bound once more, for rows with adapters.
pub(super) struct Adaptable {
    /// In the list of [`Product`]s.
    pub product: usize,
    pub kernel: &'static Kernel,
    pub flags: Flags,
    pub shapes: &'static [TileShape],
    pub storage: Vec<wgpu::Buffer>,
}

/// Where an adapter's factors of one product are.
#[derive(Clone, Copy)]
struct Extent {
    /// In words, after the table of slots.
    start: usize,
    words: usize,
    /// Of the part with the largest; 0: nothing is added.
    rank: usize,
    /// What its rows are scaled by besides, where results are f16: a power of two.
    scale: f32,
}

impl Extent {
    fn changes(&self) -> bool {
        self.rank > 0 || self.scale != 1.0
    }
}

/// The factors of all adapters for one product.
struct Arena {
    buffer: wgpu::Buffer,
    /// After the table of slots.
    words: usize,
}

/// What there is once there are adapters.
struct State {
    /// Entries of the tables of slots.
    slots: usize,
    arenas: Vec<Arena>,
    /// The slot of each row of the steps at hand.
    rows: wgpu::Buffer,
    down: wgpu::Buffer,
    /// Words of a row of `down`.
    stride: usize,
    downs: Vec<Bound>,
    /// By call.
    calls: Vec<Option<Bound>>,
}

impl State {
    fn bytes(&self) -> u64 {
        self.arenas.iter().map(|a| a.buffer.size()).sum::<u64>() + self.rows.size() + self.down.size()
    }
}

pub(super) struct Adapters {
    products: Vec<Product>,
    bounds: Bounds,
    pipelines: Pipelines,
    max_rows: usize,
    /// By slot, then by product.
    loaded: Vec<Option<Vec<Extent>>>,
    state: Option<State>,
}

/// What a step with adapters computes besides.
pub(super) struct StepAdapters {
    /// Columns of `down` by product; `None`: no adapter of the step changes it.
    columns: Vec<Option<u32>>,
}

impl StepAdapters {
    pub fn changes(&self, product: usize) -> bool {
        self.columns[product].is_some()
    }
}

impl Adapters {
    pub fn new(products: Vec<Product>, pipelines: Pipelines, max_rows: usize) -> Self {
        let bounds = Bounds(products.iter().map(|p| (p.weights.clone(), p.bound)).collect());
        Adapters { products, bounds, pipelines, max_rows, loaded: Vec::new(), state: None }
    }

    /// What adapters have to fit, once these are gone.
    pub fn into_bounds(self) -> Bounds {
        self.bounds
    }

    pub fn pipelines(&mut self) -> &mut Pipelines {
        &mut self.pipelines
    }

    /// What was compiled, for the next build.
    pub fn pipelines_so_far(&self) -> Pipelines {
        self.pipelines.clone()
    }

    pub fn bytes(&self) -> u64 {
        self.state.as_ref().map_or(0, State::bytes)
    }

    /// Brings the factors to the device, unless all of them would then take more than `room` bytes.
    pub fn add(&mut self, gpu: &Gpu, calls: &[Call], slot: u32, adapter: &AdapterWeights, room: u64) -> Result<()> {
        let slot = slot as usize;
        if self.loaded.get(slot).is_some_and(Option::is_some) {
            return Err(Error::internal(format!("slot {slot} has an adapter")));
        }
        let scales = self.bounds.scales(adapter)?;
        // 1. Places, as far as the buffers have them.
        let slots = self.state.as_ref().map_or(0, |s| s.slots).max((slot + 1).next_power_of_two().max(8));
        let mut extents = Vec::new();
        let mut words = Vec::new();
        for (i, product) in self.products.iter().enumerate() {
            let (rank, needed) = product.words(adapter)?;
            let start = self.gap(i, needed);
            extents.push(Extent { start, words: needed, rank, scale: scales[i] });
            let held = self.state.as_ref().map_or(0, |s| s.arenas[i].words);
            words.push(held.max(start + needed));
        }
        let columns = |(product, extent): (&Product, &Extent)| product.weights.len() * extent.rank;
        let stride = 1 + self.products.iter().zip(&extents).map(columns).max().unwrap_or(0);
        let stride = stride.max(self.state.as_ref().map_or(0, |s| s.stride));
        // 2. Room.
        let header = lora_down::header_words(slots);
        let size = |words: usize| (4 * words as u64).max(64).next_multiple_of(16);
        let largest = words.iter().map(|w| size(header + w)).max().unwrap_or(0).max(size(stride * self.max_rows));
        if largest > gpu.max_binding() {
            return Err(Error::limit(format!(
                "adapters of {largest} bytes for one product exceed a binding of this device, which has {}",
                gpu.max_binding()
            )));
        }
        let arenas: u64 = words.iter().map(|w| size(header + w)).sum();
        let needed = arenas + size(self.max_rows) + size(stride * self.max_rows);
        if needed > room {
            return Err(Error::limit(format!(
                "with this adapter all of them take {needed} bytes, and the model's memory budget leaves {room}"
            )));
        }
        // 3. Buffers: the old ones where they are large enough, so that a failure leaves everything as it is.
        let state = self.grown(gpu, calls, slots, &words, stride)?;
        // 4. Contents. What is written here lies in no other adapter's place.
        if self.loaded.len() <= slot {
            self.loaded.resize_with(slot + 1, || None);
        }
        let old = self.loaded[slot].replace(extents);
        debug_assert!(old.is_none());
        let written = self.write(gpu, &state, slot, adapter);
        if written.is_err() {
            self.loaded[slot] = None;
        }
        self.state = Some(state);
        written
    }

    /// The first place in the arena of a product that has so many words free; its end, if none has.
    fn gap(&self, product: usize, words: usize) -> usize {
        let mut taken: Vec<Extent> = self.loaded.iter().flatten().map(|extents| extents[product]).collect();
        taken.sort_by_key(|e| e.start);
        let mut start = 0;
        for extent in taken.iter().filter(|e| e.words > 0) {
            if extent.start >= start + words {
                break;
            }
            start = extent.start + extent.words;
        }
        start
    }

    /// The state with tables and arenas of these sizes. The adapters that are there stay where they are in their arenas.
    fn grown(&mut self, gpu: &Gpu, calls: &[Call], slots: usize, words: &[usize], stride: usize) -> Result<State> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let header = lora_down::header_words(slots);
        let old = self.state.take();
        let fits = |s: &State| {
            s.slots == slots && s.stride == stride && s.arenas.iter().zip(words).all(|(a, words)| a.words == *words)
        };
        let old = match old {
            Some(state) if fits(&state) => return Ok(state),
            other => other,
        };
        let result = (|| {
            let mut arenas = Vec::new();
            let mut copies = Vec::new();
            for (i, words) in words.iter().enumerate() {
                let held = old.as_ref().map(|s| (&s.arenas[i], s.slots));
                match held {
                    Some((arena, held_slots)) if held_slots == slots && arena.words == *words => {
                        arenas.push(Arena { buffer: arena.buffer.clone(), words: *words });
                    }
                    _ => {
                        let buffer = gpu.buffer("adapters", 4 * (header + words) as u64, usage)?;
                        if let Some((arena, held_slots)) = held.filter(|(a, _)| a.words > 0) {
                            let from = lora_down::header_words(held_slots);
                            copies.push((arena.buffer.clone(), from, buffer.clone(), arena.words));
                        }
                        arenas.push(Arena { buffer, words: *words });
                    }
                }
            }
            let storage = wgpu::BufferUsages::STORAGE;
            let rows = match &old {
                Some(state) => state.rows.clone(),
                None => gpu.buffer("slots of rows", 4 * self.max_rows as u64, storage)?,
            };
            let down = match &old {
                Some(state) if state.stride == stride => state.down.clone(),
                _ => gpu.buffer("first factors", 4 * (stride * self.max_rows) as u64, storage)?,
            };
            gpu.checked("adapters", || {
                let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
                for (from, start, to, words) in &copies {
                    encoder.copy_buffer_to_buffer(from, 4 * *start as u64, to, 4 * header as u64, 4 * *words as u64);
                }
                gpu.queue.submit([encoder.finish()]);
            })?;
            let mut state = State { slots, arenas, rows, down, stride, downs: Vec::new(), calls: Vec::new() };
            self.bind(gpu, calls, &mut state)?;
            Ok(state)
        })();
        match result {
            Ok(state) => Ok(state),
            Err(error) => {
                self.state = old;
                Err(error)
            }
        }
    }

    fn bind(&mut self, gpu: &Gpu, calls: &[Call], state: &mut State) -> Result<()> {
        for (product, arena) in self.products.iter().zip(&state.arenas) {
            let flags = Flags { half_in: product.half_in, ..Flags::default() };
            let storage = [&product.x, &state.rows, &arena.buffer, &state.down];
            state.downs.push(Bound::plain(gpu, &mut self.pipelines, &lora_down::KERNEL, flags, &storage)?);
        }
        for call in calls {
            let bound = match &call.adaptable {
                Some(a) => {
                    let arena = &state.arenas[a.product].buffer;
                    let storage: Vec<&wgpu::Buffer> = a.storage.iter().chain([arena, &state.down]).collect();
                    let flags = Flags { adapters: true, ..a.flags };
                    Some(Bound::new(gpu, &mut self.pipelines, a.kernel, flags, a.shapes, &storage)?)
                }
                None => None,
            };
            state.calls.push(bound);
        }
        Ok(())
    }

    /// Writes the tables, and the factors of the adapter in `slot`.
    fn write(&self, gpu: &Gpu, state: &State, slot: usize, adapter: &AdapterWeights) -> Result<()> {
        let header = lora_down::header_words(state.slots);
        for (i, (product, arena)) in self.products.iter().zip(&state.arenas).enumerate() {
            // Words are below 2^32: a binding has no more bytes.
            let mut table = vec![0u32; header];
            table[0] = state.stride as u32;
            for (entry, extents) in table[4..].chunks_exact_mut(4).zip(&self.loaded) {
                let Some(Extent { start, rank, scale, .. }) = extents.as_ref().map(|e| e[i]) else { continue };
                let (a, columns) = (header + start, product.weights.len() * rank);
                let [a, b, rank] = [a, a + columns * product.k, rank].map(|word| word as u32);
                entry.copy_from_slice(&[a, b, rank, scale.to_bits()]);
            }
            let Some(extent) = self.loaded[slot].as_ref().map(|e| e[i]) else { continue };
            let factors = if extent.words > 0 { product.factors(adapter, extent.rank) } else { Vec::new() };
            gpu.checked("adapters", || {
                gpu.queue.write_buffer(&arena.buffer, 0, bytemuck::cast_slice(&table));
                if !factors.is_empty() {
                    let place = 4 * (header + extent.start) as u64;
                    gpu.queue.write_buffer(&arena.buffer, place, bytemuck::cast_slice(&factors));
                }
            })?;
        }
        Ok(())
    }

    pub fn remove(&mut self, slot: u32) {
        if let Some(place) = self.loaded.get_mut(slot as usize) {
            *place = None;
        }
        if self.loaded.iter().all(Option::is_none) {
            self.state = None;
        }
    }

    /// Uploads the slots of the rows of all steps. Use it inside [`Gpu::checked`].
    pub fn upload(&self, gpu: &Gpu, rows: &[u32]) {
        if let Some(state) = &self.state {
            gpu.queue.write_buffer(&state.rows, 0, bytemuck::cast_slice(rows));
        }
    }

    /// What a step with rows of these slots computes besides; `None` if no row has an adapter.
    pub fn step(&self, slots: &[u32]) -> Result<Option<StepAdapters>> {
        let mut distinct: Vec<u32> = slots.iter().copied().filter(|slot| *slot != NO_ADAPTER).collect();
        distinct.sort_unstable();
        distinct.dedup();
        if distinct.is_empty() {
            return Ok(None);
        }
        let mut columns = vec![None; self.products.len()];
        for slot in distinct {
            let extents = self.loaded.get(slot as usize).and_then(Option::as_ref);
            let extents = extents.ok_or_else(|| Error::internal(format!("slot {slot} has no adapter")))?;
            for ((columns, product), extent) in columns.iter_mut().zip(&self.products).zip(extents) {
                let own = extent.changes().then_some((product.weights.len() * extent.rank) as u32);
                *columns = (*columns).max(own);
            }
        }
        Ok(Some(StepAdapters { columns }))
    }

    /// The dispatch that multiplies a product's input with the first factors.
    pub fn down(&self, step: &StepAdapters, product: usize, dims: &Dims) -> Option<(&Bound, Dispatch)> {
        let state = self.state.as_ref()?;
        let (Product { k, scale, half_in, weights, .. }, columns) = (&self.products[product], step.columns[product]?);
        let (k32, parts) = (*k as u32, weights.len() as u32);
        let params = lora_down::Params { rows: dims.rows, k: k32, first_meta: dims.first_row, parts, scale: *scale };
        let (rows, k) = (u64::from(dims.rows), *k as u64);
        let input = if *half_in { 2 } else { 4 };
        let dispatch = Dispatch {
            shape: TileShape::Narrow,
            params: Params::of(&params),
            // Where nothing is added the slots are written.
            groups: [dims.rows, columns.div_ceil(lora_down::COLS).max(1), 1],
            bytes: rows * (input * k + 4 * u64::from(columns)) + 4 * k * u64::from(columns),
            multiply_adds: rows * k * u64::from(columns),
        };
        Some((&state.downs[product], dispatch))
    }

    /// A call's pipelines and bindings for rows with adapters.
    pub fn call(&self, i: usize) -> Option<&Bound> {
        self.state.as_ref()?.calls.get(i)?.as_ref()
    }
}

impl Product {
    fn parts<'a>(&'a self, adapter: &'a AdapterWeights) -> impl Iterator<Item = Option<&'a LowRank>> {
        self.weights.iter().map(|id| adapter.get(*id))
    }

    /// The largest rank of the parts, and words of their factors.
    fn words(&self, adapter: &AdapterWeights) -> Result<(usize, usize)> {
        let rank = self.parts(adapter).flatten().map(|m| m.rank).max().unwrap_or(0);
        let columns = self.weights.len() * self.k + self.lengths.iter().sum::<usize>();
        Ok((rank, crate::error::checked_size("an adapter", &[rank, columns])?))
    }

    /// a [parts · rank, K] of the parts one after the other, then scale · b [rank, N] in the order of the merged rows. What
    /// a part has not is zero.
    fn factors(&self, adapter: &AdapterWeights, rank: usize) -> Vec<f32> {
        let parts: Vec<Option<&LowRank>> = self.parts(adapter).collect();
        let mut out = Vec::new();
        for part in &parts {
            let a = part.map_or(&[][..], |m| &m.a);
            out.extend_from_slice(a);
            out.resize(out.len() + rank * self.k - a.len(), 0.0);
        }
        for j in 0..rank {
            let rows: Vec<Option<Vec<f32>>> = parts
                .iter()
                .zip(&self.lengths)
                .map(|(part, n)| {
                    let m = part.filter(|m| j < m.rank)?;
                    Some(m.b[j * n..(j + 1) * n].iter().map(|b| b * m.scale).collect())
                })
                .collect();
            let rows: Vec<Option<&[f32]>> = rows.iter().map(Option::as_deref).collect();
            out.extend(self.order.merge(&rows, &self.lengths));
        }
        out
    }
}

/// No row of s · B · A of any of these weights is longer than this.
fn longest(weights: &[MatrixId], adapter: &AdapterWeights) -> f32 {
    let of_part = |m: &LowRank| {
        let n = m.b.len() / m.rank;
        let lengths: Vec<f32> = m.a.chunks_exact(m.a.len() / m.rank).map(|row| length(row) * m.scale.abs()).collect();
        let of = |i: usize| lengths.iter().enumerate().map(|(j, l)| l * m.b[j * n + i].abs()).sum::<f32>();
        (0..n).map(of).fold(0.0f32, f32::max)
    };
    weights.iter().filter_map(|id| adapter.get(*id)).map(of_part).fold(0.0, f32::max)
}

fn too_large(what: &str, largest: f32) -> Error {
    Error::unsupported(format!(
        "with this adapter {what} can be as large as {largest:e}, too much for f16, in which this model is computed; load the model with precision f32"
    ))
}

fn length(row: &[f32]) -> f32 {
    row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32
}
