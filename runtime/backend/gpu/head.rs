//! What follows the final norm on the GPU. Log-probs alone leave no logits behind; draws and alternatives work on a block of
//! rows at a time, whatever T is. Everything stays on the device until the last step's results are read.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use super::blocks::{Block, Blocks, Class, TOKEN_TILE, most_edits};
use super::device::Gpu;
use super::layers::{Buffers, Builder, product, shapes, slice_bytes};
use super::pipelines::{Flags, Format, Pipelines};
use super::readback::{self, Pending, Place};
use super::record::{Bound, Dispatch, Params, Recorder, fold};
use crate::backend::{Output, OutputRow, Step, TokenStats, Want, top_logprobs};
use crate::error::Result;
use crate::kernels::adjust_logits::Edit;
use crate::kernels::log_sum_exp::RowStats;
use crate::kernels::top_k::{Candidate, MAX_K};
use crate::kernels::{adjust_logits, head, linear, log_sum_exp, sample, top_k};
use crate::model::{self, ModelSpec};
use crate::weights::Dtype;

/// Logits that exist at a time, in bytes.
const LOGIT_BYTES: usize = 160 << 20;

/// Rows whose logits exist at a time.
fn block_rows(vocab: usize, max_rows: usize) -> usize {
    (LOGIT_BYTES / (4 * vocab)).clamp(1, 256).min(max_rows)
}

/// Logits, statistics, edits, masks, alternatives and kept ids; what the host reads of them at a time.
pub(super) fn bytes(vocab: usize, max_rows: usize) -> u64 {
    let rows = block_rows(vocab, max_rows);
    let masks = rows * vocab.div_ceil(32) * (4 + 16);
    let each = size_of::<sample::Request>() + 2 * (size_of::<sample::Drawn>() + size_of::<RowStats>()) + 4;
    2 * readback::most_bytes(rows, vocab.next_multiple_of(TOKEN_TILE as usize))
        + (most_edits(vocab) * size_of::<Edit>() + masks + max_rows * each) as u64
}

/// A slice of the head's matrix, bound twice.
struct HeadSlice {
    /// To the pass over the vocabulary.
    pass: Option<Bound>,
    /// To the product alone: score heads, single tokens.
    alone: Bound,
    params: head::Params,
    bytes: u64,
}

/// The score head of an adapter.
struct OwnHead {
    bound: Bound,
    flags: Flags,
    stride: u32,
    bytes: u64,
}

pub(super) struct Head {
    slices: Vec<HeadSlice>,
    /// By the adapter's slot.
    own: BTreeMap<u32, OwnHead>,
    /// Of the pass, and of the product alone.
    flags: Flags,
    log_sum_exp: Bound,
    top_k: Bound,
    adjust_logits: Bound,
    sample: Bound,
    targets: wgpu::Buffer,
    requests: wgpu::Buffer,
    edits: wgpu::Buffer,
    masks: wgpu::Buffer,
    kept_ids: wgpu::Buffer,
    logits: wgpu::Buffer,
    /// Of tiles of the vocabulary, before they are joined.
    stats: wgpu::Buffer,
    joined: wgpu::Buffer,
    best: wgpu::Buffer,
    /// Grows to what a step needs.
    readback: Mutex<wgpu::Buffer>,
    /// Rows of a block, and of the masks.
    block: usize,
    /// Columns of the head.
    width: usize,
    /// Tiles of the vocabulary.
    tiles: u32,
}

impl Head {
    /// `old`: a head over the same buffers, whose own ones this takes over.
    pub(super) fn new(builder: &mut Builder, max_rows: usize, old: Option<&Head>) -> Result<Head> {
        let (gpu, spec) = (builder.gpu, builder.spec);
        let language_model = matches!(spec.head, model::Head::LanguageModel { .. });
        let matrix = builder.resident.head.clone();
        let width = matrix.rows as usize;
        let padded = width.next_multiple_of(TOKEN_TILE as usize);
        let fitting = usize::try_from(gpu.max_binding() / (4 * padded as u64)).unwrap_or(usize::MAX);
        let block = block_rows(width, max_rows).min(fitting.max(1));
        let flags = Flags { head: true, ..matrix.variant() };
        let [_, columns] = flags.workgroup_tile();
        let tiles = matrix.rows.div_ceil(columns);
        let (storage, copy) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        type Held = fn(&Head) -> &wgpu::Buffer;
        let buffer = |what: &str, each: usize, rows: usize, usage, held: Held| match old {
            Some(old) => Ok(held(old).clone()),
            None => gpu.buffer(what, (rows * each) as u64, usage),
        };
        let logits = buffer("logits", padded * 4, block, storage | copy, |h| &h.logits)?;
        let stats = buffer("statistics", tiles as usize * size_of::<RowStats>(), block, storage, |h| &h.stats)?;
        let targets = buffer("targets", 4, max_rows, storage, |h| &h.targets)?;
        let requests = buffer("requests", size_of::<sample::Request>(), max_rows, storage, |h| &h.requests)?;
        let edits = buffer("edits", size_of::<Edit>(), most_edits(spec.vocab_size), storage, |h| &h.edits)?;
        let masks = buffer("masks", spec.vocab_size.div_ceil(32) * 4, block, storage, |h| &h.masks)?;
        let kept_ids = buffer("kept ids", sample::MAX_KEPT_IDS * 4, block, storage | copy, |h| &h.kept_ids)?;
        let joined = buffer("statistics", size_of::<RowStats>(), max_rows, storage | copy, |h| &h.joined)?;
        let best = buffer("alternatives", MAX_K * size_of::<Candidate>(), block, storage | copy, |h| &h.best)?;
        let readback = match old {
            Some(old) => old.readback.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            None => gpu.buffer("read-back", 64 * max_rows as u64, wgpu::BufferUsages::MAP_READ)?,
        };
        let b = builder.buffers;
        let mut slices = Vec::new();
        for slice in &matrix.slices {
            let scales = slice.scales.as_ref().unwrap_or(&b.nothing);
            let bound = [&b.last, &slice.buffer, scales, &b.nothing, &targets, &logits, &stats];
            let pass = if language_model {
                let kernel = &head::KERNEL;
                Some(Bound::new(gpu, &mut builder.pipelines, kernel, flags, shapes(flags), &bound)?)
            } else {
                None
            };
            let alone = [&b.last, &slice.buffer, scales, &b.nothing, &logits];
            let plain = matrix.variant();
            let alone = Bound::new(gpu, &mut builder.pipelines, &linear::KERNEL, plain, shapes(plain), &alone)?;
            let params = head::Params {
                rows: 0,
                k: matrix.cols,
                stride: matrix.stride,
                count: slice.count,
                first: slice.first,
                slice_row: 0,
                x_first: 0,
                vocab: matrix.rows,
                tiles,
                keep: 0,
                first_target: 0,
            };
            slices.push(HeadSlice { pass, alone, params, bytes: slice_bytes(slice) });
        }
        let none = Flags::default();
        let pipelines = &mut builder.pipelines;
        Ok(Head {
            slices,
            own: BTreeMap::new(),
            flags,
            log_sum_exp: Bound::plain(gpu, pipelines, &log_sum_exp::KERNEL, none, &[&stats, &joined])?,
            top_k: Bound::plain(gpu, pipelines, &top_k::KERNEL, none, &[&logits, &best])?,
            adjust_logits: Bound::plain(
                gpu,
                pipelines,
                &adjust_logits::KERNEL,
                none,
                &[&requests, &masks, &edits, &logits],
            )?,
            sample: Bound::plain(
                gpu,
                pipelines,
                &sample::KERNEL,
                none,
                &[&logits, &requests, &edits, &b.drawn, &kept_ids],
            )?,
            targets,
            requests,
            edits,
            masks,
            kept_ids,
            logits,
            stats,
            joined,
            best,
            readback: Mutex::new(readback),
            block,
            width,
            tiles,
        })
    }

    /// Cuts the outputs of steps into blocks and uploads what they ask for.
    pub(super) fn prepare(
        &self,
        gpu: &Gpu,
        spec: &ModelSpec,
        steps: &[Step],
        orders: &[Vec<usize>],
    ) -> Result<Pending> {
        let mut builder = Blocks::new([self.block, self.width, spec.vocab_size]);
        for (s, (step, order)) in steps.iter().zip(orders).enumerate() {
            let wants: Vec<&Want> = order.iter().map(|&i| &step.outputs[i].want).collect();
            let own: Vec<Option<u32>> = order.iter().map(|&i| self.own_head(step, i)).collect();
            builder.add_step(s, &wants, &own);
        }
        let Blocks { blocks, targets, requests, .. } = builder;
        let padded = self.width.next_multiple_of(TOKEN_TILE as usize);
        let most = readback::most_bytes(self.block, padded);
        let mut pending = Pending::new(blocks, requests, most, |block| self.columns_of(block));
        let mut readback = self.readback.lock().unwrap_or_else(PoisonError::into_inner);
        if readback.size() < pending.bytes() {
            *readback = gpu.buffer("read-back", pending.bytes(), wgpu::BufferUsages::MAP_READ)?;
        }
        pending.use_buffer(readback.clone());
        gpu.checked("requests", || {
            if !pending.requests.is_empty() {
                gpu.queue.write_buffer(&self.targets, 0, bytemuck::cast_slice(&targets));
                gpu.queue.write_buffer(&self.requests, 0, bytemuck::cast_slice(&pending.requests));
            }
        })?;
        Ok(pending)
    }

    /// Whose score head computes an output, where it is not the model's.
    pub(super) fn own_head(&self, step: &Step, output: usize) -> Option<u32> {
        let OutputRow { row, want } = &step.outputs[output];
        let slot = step.adapters.get(*row as usize).filter(|_| matches!(want, Want::Score))?;
        self.own.contains_key(slot).then_some(*slot)
    }

    /// Elements of a row of a head on the device.
    fn own_stride(&self, head: &[f32]) -> usize {
        (head.len() / self.width.max(1)).next_multiple_of(8)
    }

    /// What an adapter's head takes.
    pub(super) fn bytes_of_own(&self, head: &[f32]) -> u64 {
        4 * (self.own_stride(head) * self.width) as u64
    }

    /// What the heads of all adapters take.
    pub(super) fn own_bytes(&self) -> u64 {
        self.own.values().map(|own| own.bytes).sum()
    }

    /// Brings an adapter's score head [labels, D] to the device.
    pub(super) fn add_own(
        &mut self,
        gpu: &Gpu,
        pipelines: &mut Pipelines,
        buffers: &Buffers,
        slot: u32,
        head: &[f32],
    ) -> Result<()> {
        let (d, stride) = (head.len() / self.width.max(1), self.own_stride(head));
        let mut padded = vec![0.0f32; stride * self.width];
        for (row, padded) in head.chunks_exact(d.max(1)).zip(padded.chunks_exact_mut(stride.max(1))) {
            padded[..d].copy_from_slice(row);
        }
        let bytes = self.bytes_of_own(head);
        let buffer = gpu.buffer("score head", bytes, wgpu::BufferUsages::STORAGE)?;
        gpu.checked("score head", || gpu.queue.write_buffer(&buffer, 0, bytemuck::cast_slice(&padded)))?;
        let format = Some(Format::Rows(Dtype::F32));
        let flags = Flags { format, vec4: d.is_multiple_of(4), ..Flags::default() };
        let storage = [&buffers.last, &buffer, &buffers.nothing, &buffers.nothing, &self.logits];
        let bound = Bound::new(gpu, pipelines, &linear::KERNEL, flags, shapes(flags), &storage)?;
        // Below the width of a model.
        self.own.insert(slot, OwnHead { bound, flags, stride: stride as u32, bytes });
        Ok(())
    }

    pub(super) fn remove_own(&mut self, slot: u32) {
        self.own.remove(&slot);
    }

    /// Columns of the logits that a block of single tokens or scores has.
    fn columns_of(&self, block: &Block) -> usize {
        if block.columns.is_empty() { self.width } else { block.columns.len() * TOKEN_TILE as usize }
    }

    /// Records the blocks of step `s`.
    pub(super) fn record(&self, gpu: &Gpu, recorder: &mut Recorder, pending: &mut Pending, s: usize) -> Result<()> {
        let mut begun = false;
        for i in 0..pending.blocks.len() {
            if pending.blocks[i].step != s {
                continue;
            }
            pending.make_room(recorder, i)?;
            if let Some((edits, masks)) = pending.blocks[i].upload.take() {
                // What is recorded reads what was uploaded before it is submitted.
                if begun {
                    recorder.submit()?;
                }
                for (buffer, bytes) in
                    [(&self.edits, bytemuck::cast_slice::<_, u8>(&edits)), (&self.masks, bytemuck::cast_slice(&masks))]
                {
                    if !bytes.is_empty() {
                        gpu.queue.write_buffer(buffer, 0, bytes);
                    }
                }
            }
            begun = true;
            let (block, place, readback) = (&pending.blocks[i], pending.place(i), pending.buffer()?);
            match block.class {
                Class::Columns => self.record_columns(recorder, block, &place, readback)?,
                _ => self.record_vocabulary(recorder, block, &place, readback)?,
            }
        }
        Ok(())
    }

    fn record_vocabulary(
        &self,
        recorder: &mut Recorder,
        block: &Block,
        place: &Place,
        readback: &wgpu::Buffer,
    ) -> Result<()> {
        let rows = block.len() as u32;
        let vocab = self.width as u32;
        let keep = u32::from(block.class == Class::Logits);
        for slice in &self.slices {
            let Some(pass) = &slice.pass else { continue };
            let x_first = block.start as u32;
            let params = head::Params { rows, x_first, keep, first_target: block.first, ..slice.params };
            let sizes = [rows, params.count, params.k];
            let mut dispatch = product(self.flags, sizes, slice.bytes, &params);
            if keep == 0 {
                dispatch.bytes -= u64::from(rows) * 4 * u64::from(params.count);
            }
            recorder.dispatch(pass, &dispatch)?;
        }
        let by_row = |params: Params, bytes: u64| Dispatch {
            shape: super::pipelines::TileShape::Narrow,
            params,
            groups: fold(rows),
            bytes: u64::from(rows) * bytes,
            multiply_adds: 0,
        };
        let row = 4 * u64::from(vocab);
        let join = log_sum_exp::Params { rows, tiles: self.tiles, first: block.first };
        recorder.dispatch(&self.log_sum_exp, &by_row(Params::of(&join), 16 * u64::from(self.tiles)))?;
        if block.k > 0 {
            let k = block.k as u32;
            recorder.dispatch(&self.top_k, &by_row(Params::of(&top_k::Params { rows, vocab, k }), row))?;
        }
        recorder.copy(&self.best, readback, place.best.clone());
        if block.changes {
            let params = adjust_logits::Params { rows, vocab, first: block.first };
            recorder.dispatch(&self.adjust_logits, &by_row(Params::of(&params), 0))?;
        }
        if block.samples {
            let params = sample::Params { rows, vocab, first: block.first };
            recorder.dispatch(&self.sample, &by_row(Params::of(&params), row))?;
        }
        recorder.copy(&self.kept_ids, readback, place.kept.clone());
        Ok(())
    }

    fn record_columns(
        &self,
        recorder: &mut Recorder,
        block: &Block,
        place: &Place,
        readback: &wgpu::Buffer,
    ) -> Result<()> {
        let rows = block.len() as u32;
        let width = self.columns_of(block) as u32;
        for slice in &self.slices {
            let s = &slice.params;
            let base = linear::Params {
                rows,
                k: s.k,
                stride: s.stride,
                count: s.count,
                first: s.first,
                out_stride: width,
                has_bias: 0,
                slice_row: 0,
                x_first: block.start as u32,
                accumulate: 0,
                scale: 1.0,
            };
            let flags = Flags { head: false, ..self.flags };
            if let Some(own) = block.own_head.and_then(|slot| self.own.get(&slot)) {
                // One slice, whatever the model's head has.
                let params = linear::Params { count: width, first: 0, stride: own.stride, ..base };
                recorder.dispatch(&own.bound, &product(own.flags, [rows, width, s.k], own.bytes, &params))?;
                break;
            }
            if block.columns.is_empty() {
                recorder.dispatch(&slice.alone, &product(flags, [rows, s.count, s.k], slice.bytes, &base))?;
                continue;
            }
            for (&column, i) in block.columns.iter().zip(0u32..) {
                if column < s.first || column >= s.first + s.count {
                    continue;
                }
                let slice_row = column - s.first;
                let count = TOKEN_TILE.min(s.count - slice_row);
                let params = linear::Params { slice_row, count, first: i * TOKEN_TILE, ..base };
                let bytes = slice.bytes / u64::from(s.count) * u64::from(count);
                recorder.dispatch(&slice.alone, &product(flags, [rows, count, s.k], bytes, &params))?;
            }
        }
        recorder.copy(&self.logits, readback, place.logits.clone());
        Ok(())
    }

    /// Records the copies of what every output has.
    pub(super) fn record_results(&self, recorder: &mut Recorder, buffers: &Buffers, pending: &Pending) -> Result<()> {
        let count = pending.requests.len() as u64;
        let stats = count * size_of::<RowStats>() as u64;
        let drawn = count * size_of::<sample::Drawn>() as u64;
        recorder.copy(&self.joined, pending.buffer()?, 0..stats);
        recorder.copy(&buffers.drawn, pending.buffer()?, stats..stats + drawn);
        Ok(())
    }

    /// Waits for the last step and reads every output.
    pub(super) fn results(
        &self,
        gpu: &Gpu,
        mut pending: Pending,
        last: wgpu::SubmissionIndex,
        steps: &[Step],
        orders: &[Vec<usize>],
    ) -> Result<Vec<Vec<Output>>> {
        if pending.requests.is_empty() {
            gpu.wait(last)?;
            return Ok(steps.iter().map(|_| Vec::new()).collect());
        }
        let bytes = gpu.read(pending.buffer()?, pending.bytes(), last)?;
        pending.take(&bytes, pending.blocks.len())?;
        let (stats, drawn) = pending.common(&bytes)?;
        let mut results: Vec<Vec<Option<Output>>> = steps.iter().map(|s| vec![None; s.outputs.len()]).collect();
        for (block, answers) in pending.blocks.iter().zip(pending.answers()) {
            for row in 0..block.len() {
                let i = orders[block.step][block.start + row];
                let place = block.first as usize + row;
                let want = &steps[block.step].outputs[i].want;
                let RowStats { stats, target_logit } = stats[place];
                let of = |logit: f32| TokenStats {
                    logprob: stats.logprob(logit),
                    entropy: stats.entropy(),
                    top: top_logprobs(&answers.best[row * block.k..][..want.top()], |l| stats.logprob(l)),
                };
                results[block.step][i] = Some(match want {
                    Want::Sample(_) => {
                        let drawn = drawn[place];
                        let kept_ids = match (drawn.kept, pending.requests[place]) {
                            (kept, request) if kept == 0 || kept > request.kept_ids => Vec::new(),
                            (_, request) if request.inverse_temperature < 0.0 => vec![drawn.token],
                            (count, _) => answers.kept[row * sample::MAX_KEPT_IDS..][..count as usize].to_vec(),
                        };
                        Output::Sampled { drawn, stats: of(drawn.logit), kept_ids }
                    }
                    Want::Logprob { .. } => Output::Logprob(of(target_logit)),
                    Want::Score | Want::Tokens(_) => Output::Logits(answers.logits[row].clone()),
                });
            }
        }
        Ok(results.into_iter().map(|step| step.into_iter().flatten().collect()).collect())
    }
}
