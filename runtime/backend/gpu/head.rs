//! What follows the final norm on the GPU: a bounded block of rows at a time.

use bytemuck::{bytes_of, pod_collect_to_vec};

use super::executor::{Builder, GpuExecutor, SLOT, block_rows, fold, linear_shape, slice_params};
use super::pipelines::Flags;
use super::upload::Matrix;
use crate::backend::{Output, OutputRow, Step, TokenStats, Want, logit_rows, top_logprobs};
use crate::error::{Error, Result};
use crate::kernels::adjust_logits::Edit;
use crate::kernels::log_sum_exp::RowStats;
use crate::kernels::top_k::{Candidate, MAX_K, NO_TOKEN};
use crate::kernels::{adjust_logits, linear, log_sum_exp, sample, top_k};
use crate::model::{Buf, ModelSpec};

/// Parameter slots that the head needs beyond one per slice of its matrix.
pub(super) const SLOTS: usize = 4 + TOKEN_SLOTS;
/// Different tokens whose rows of the head are multiplied one by one; with more, the whole head is.
const TOKEN_SLOTS: usize = 64;
/// Edits of logits in a block of rows at most; a row has at most V.
fn most_edits(vocab: usize) -> usize {
    vocab.max(1 << 16)
}

/// Edits, masks and kept ids of a block of rows.
pub(super) fn sampling_bytes(vocab: usize) -> u64 {
    let row = vocab.div_ceil(32) * 4 + 2 * sample::MAX_KEPT_IDS * 4;
    (most_edits(vocab) * size_of::<Edit>() + logit_rows(vocab) * row) as u64
}

type Bound = (wgpu::ComputePipeline, wgpu::BindGroup);
/// What is bound (owned or borrowed), the bytes of its parameters, and its workgroups.
type Dispatch<B> = (B, Vec<u8>, [u32; 3]);

/// A slice of the head's matrix.
struct HeadSlice {
    bound: Bound,
    weight: wgpu::Buffer,
    scales: wgpu::Buffer,
    params: linear::Params,
}

pub(super) struct Head {
    slices: Vec<HeadSlice>,
    log_sum_exp: Bound,
    top_k: Bound,
    adjust_logits: Bound,
    sample: Bound,
    first_slot: usize,
    targets: wgpu::Buffer,
    requests: wgpu::Buffer,
    edits: wgpu::Buffer,
    masks: wgpu::Buffer,
    kept_ids: wgpu::Buffer,
    logits: wgpu::Buffer,
    stats: wgpu::Buffer,
    best: wgpu::Buffer,
    drawn: wgpu::Buffer,
    readback: wgpu::Buffer,
    /// Rows of a block.
    block: usize,
    /// Columns of the head.
    width: usize,
}

/// Indices of the outputs, those that need the whole vocabulary first.
pub(super) fn order(outputs: &[OutputRow]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..outputs.len()).collect();
    order.sort_by_key(|&i| !outputs[i].want.needs_vocabulary());
    order
}

impl Head {
    pub(super) fn new(
        builder: &mut Builder,
        spec: &ModelSpec,
        matrix: &Matrix,
        max_rows: usize,
        first_slot: usize,
    ) -> Result<Head> {
        let gpu = builder.gpu;
        let width = matrix.rows as usize;
        let block = block_rows(gpu, width).min(max_rows);
        let (storage, copy) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
        let size = |what: &str, each: usize, usage| gpu.buffer(what, (block * each) as u64, usage);
        let logits = size("logits", width * 4, storage | copy)?;
        let targets = size("targets", 4, storage)?;
        let requests = size("requests", size_of::<sample::Request>(), storage)?;
        let edits = gpu.buffer("edits", (most_edits(spec.vocab_size) * size_of::<Edit>()) as u64, storage)?;
        let masks = size("masks", spec.vocab_size.div_ceil(32) * 4, storage)?;
        let kept_ids = size("kept ids", sample::MAX_KEPT_IDS * 4, storage | copy)?;
        let stats = size("stats", size_of::<RowStats>(), storage | copy)?;
        let best = size("best", MAX_K * size_of::<Candidate>(), storage | copy)?;
        let drawn = size("drawn", size_of::<sample::Drawn>(), storage | copy)?;
        // The logits themselves are read back for score heads and single tokens only.
        let readback = gpu.buffer(
            "readback",
            stats.size() + best.size() + drawn.size() + kept_ids.size() + logits.size(),
            wgpu::BufferUsages::MAP_READ,
        )?;
        let mut slices = Vec::new();
        for slice in &matrix.slices {
            let x = builder.buffers.activation(Buf::Final);
            let nothing = &builder.buffers.nothing;
            let scales = slice.scales.clone().unwrap_or_else(|| nothing.clone());
            let bound = [x, &slice.buffer, &scales, nothing, &logits];
            let slot = first_slot + slices.len();
            let bound = builder.bind(&linear::KERNEL, matrix.variant(), &bound, slot)?;
            let params = slice_params(matrix, slice, false);
            slices.push(HeadSlice { bound, weight: slice.buffer.clone(), scales, params });
        }
        let slot = first_slot + slices.len();
        let plain = Flags::default();
        let log_sum_exp = builder.bind(&log_sum_exp::KERNEL, plain, &[&logits, &targets, &stats], slot)?;
        let top_k = builder.bind(&top_k::KERNEL, plain, &[&logits, &best], slot + 1)?;
        let adjusted = [&requests, &masks, &edits, &logits];
        let adjust_logits = builder.bind(&adjust_logits::KERNEL, plain, &adjusted, slot + 2)?;
        let sampled = [&logits, &requests, &edits, &drawn, &kept_ids];
        let sample = builder.bind(&sample::KERNEL, plain, &sampled, slot + 3)?;
        Ok(Head {
            slices,
            log_sum_exp,
            top_k,
            adjust_logits,
            sample,
            first_slot,
            targets,
            requests,
            edits,
            masks,
            kept_ids,
            logits,
            stats,
            best,
            drawn,
            readback,
            block,
            width,
        })
    }
}

impl GpuExecutor {
    pub(super) fn run_head(&self, step: &Step, order: &[usize]) -> Result<Vec<Output>> {
        let mut results: Vec<Option<Output>> = vec![None; step.outputs.len()];
        let wants: Vec<&Want> = order.iter().map(|&i| &step.outputs[i].want).collect();
        let vocabulary = wants.iter().take_while(|w| w.needs_vocabulary()).count();
        let mut start = 0;
        while start < wants.len() {
            let limit = if start < vocabulary { vocabulary } else { wants.len() };
            let mut end = limit.min(start + self.head.block);
            // As many rows as their edits have room for; one row always has.
            let mut edits = 0;
            let fits = |want: &&&Want| {
                edits += if let Want::Sample(sampling) = **want { sampling.edits.len() } else { 0 };
                edits <= most_edits(self.spec.vocab_size)
            };
            end = end.min(start + wants[start..end].iter().take_while(fits).count().max(1));
            let outputs = if start < vocabulary {
                self.vocabulary_block(start, &wants[start..end])?
            } else {
                self.logits_block(start, &wants[start..end])?
            };
            for (i, output) in (start..end).zip(outputs) {
                results[order[i]] = Some(output);
            }
            start = end;
        }
        if wants.is_empty() {
            // Nothing to read back: wait for the step itself.
            let submission = self.gpu.checked("a step", || self.gpu.queue.submit([]))?;
            self.gpu.wait(submission)?;
        }
        Ok(results.into_iter().flatten().collect())
    }

    /// Log-probs and samples of the rows from `start` on.
    fn vocabulary_block(&self, start: usize, wants: &[&Want]) -> Result<Vec<Output>> {
        let head = &self.head;
        let rows = wants.len() as u32;
        let vocab = head.width as u32;
        let words = self.spec.vocab_size.div_ceil(32);
        let k = wants.iter().map(|w| w.top()).max().unwrap_or(0);
        let (mut targets, mut requests) = (Vec::new(), Vec::new());
        let (mut edits, mut masks) = (Vec::<Edit>::new(), Vec::<u32>::new());
        for want in wants {
            targets.push(if let Want::Logprob { target, .. } = want { *target } else { NO_TOKEN });
            let mut request = sample::Request { active: 0, ..sample::Request::default() };
            if let Want::Sample(sampling) = want {
                // Both are bounded by the buffers' sizes, which are below 2^32.
                request = sample::Request {
                    first_edit: edits.len() as u32,
                    edit_count: sampling.edits.len() as u32,
                    ..sampling.request
                };
                edits.extend_from_slice(&sampling.edits);
                if let Some(mask) = &sampling.mask {
                    request.mask_row = (masks.len() / words) as u32;
                    masks.extend_from_slice(mask);
                }
            }
            requests.push(request);
        }
        let samples = requests.iter().any(|r| r.active == 1);
        let changes = !edits.is_empty() || !masks.is_empty();
        let reports = requests.iter().any(|r| r.kept_ids > 0);
        self.write(&head.targets, bytemuck::cast_slice(&targets))?;
        self.write(&head.requests, bytemuck::cast_slice(&requests))?;
        self.write(&head.edits, bytemuck::cast_slice(&edits))?;
        self.write(&head.masks, bytemuck::cast_slice(&masks))?;

        let mut dispatches = self.head_products(start, rows);
        let groups = |needed: bool| fold(if needed { rows } else { 0 });
        let stats = log_sum_exp::Params { rows, vocab };
        dispatches.push((&head.log_sum_exp, bytes_of(&stats).to_vec(), fold(rows)));
        let best = top_k::Params { rows, vocab, k: k as u32 };
        dispatches.push((&head.top_k, bytes_of(&best).to_vec(), groups(k > 0)));
        let adjust = adjust_logits::Params { rows, vocab };
        dispatches.push((&head.adjust_logits, bytes_of(&adjust).to_vec(), groups(changes)));
        let draw = sample::Params { rows, vocab };
        dispatches.push((&head.sample, bytes_of(&draw).to_vec(), groups(samples)));

        let sizes = [
            (&head.stats, wants.len() * size_of::<RowStats>()),
            (&head.best, wants.len() * k * size_of::<Candidate>()),
            (&head.drawn, if samples { wants.len() * size_of::<sample::Drawn>() } else { 0 }),
            (&head.kept_ids, if reports { wants.len() * sample::MAX_KEPT_IDS * 4 } else { 0 }),
        ];
        let [stats, best, drawn, kept_ids] = self.submit_and_read(dispatches, sizes)?;
        let stats: Vec<RowStats> = pod_collect_to_vec(&stats);
        let best: Vec<Candidate> = pod_collect_to_vec(&best);
        let drawn: Vec<sample::Drawn> = pod_collect_to_vec(&drawn);
        let kept_ids: Vec<u32> = pod_collect_to_vec(&kept_ids);
        let kept = |i: usize| match (drawn[i].kept, requests[i]) {
            (kept, request) if kept == 0 || kept > request.kept_ids => Vec::new(),
            (_, request) if request.inverse_temperature < 0.0 => vec![drawn[i].token],
            (kept, _) => kept_ids[i * sample::MAX_KEPT_IDS..][..kept as usize].to_vec(),
        };
        let read = |(i, want): (usize, &&Want)| {
            let RowStats { stats, target_logit } = stats[i];
            let best = &best[i * k..i * k + want.top()];
            let of = |logit: f32| TokenStats {
                logprob: stats.logprob(logit),
                entropy: stats.entropy(),
                top: top_logprobs(best, |l| stats.logprob(l)),
            };
            match want {
                Want::Sample(_) => Output::Sampled { drawn: drawn[i], stats: of(drawn[i].logit), kept_ids: kept(i) },
                _ => Output::Logprob(of(target_logit)),
            }
        };
        Ok(wants.iter().enumerate().map(read).collect())
    }

    /// The logits themselves: all columns for a score head, for single tokens only theirs.
    fn logits_block(&self, start: usize, wants: &[&Want]) -> Result<Vec<Output>> {
        let mut tokens: Vec<u32> = Vec::new();
        for want in wants {
            if let Want::Tokens(list) = want {
                tokens.extend_from_slice(list);
            }
        }
        tokens.sort_unstable();
        tokens.dedup();
        let few = !tokens.is_empty() && tokens.len() <= TOKEN_SLOTS;
        let rows = wants.len() as u32;
        let bounds;
        let (dispatches, width) = if few {
            bounds = self.token_products(start, rows, &tokens)?;
            (bounds.iter().map(|(bound, bytes, groups)| (bound, bytes.clone(), *groups)).collect(), tokens.len())
        } else {
            (self.head_products(start, rows), self.head.width)
        };
        let nothing = (&self.head.stats, 0);
        let sizes = [(&self.head.logits, wants.len() * width * 4), nothing, nothing, nothing];
        let [logits, ..] = self.submit_and_read(dispatches, sizes)?;
        let logits: Vec<f32> = pod_collect_to_vec(&logits);
        let column = |token: &u32| if few { tokens.binary_search(token).unwrap_or(0) } else { *token as usize };
        let read = |(row, want): (&[f32], &&Want)| match want {
            Want::Tokens(tokens) => Output::Logits(tokens.iter().map(|t| row[column(t)]).collect()),
            _ => Output::Logits(row.to_vec()),
        };
        Ok(logits.chunks_exact(width).zip(wants).map(read).collect())
    }

    /// A product with one row of the head for each token; column i of the result is token i.
    fn token_products(&self, start: usize, rows: u32, tokens: &[u32]) -> Result<Vec<Dispatch<Bound>>> {
        let mut products = Vec::new();
        for (i, &token) in tokens.iter().enumerate() {
            let slice =
                self.head.slices.iter().find(|s| token >= s.params.first && token < s.params.first + s.params.count);
            let slice = slice.ok_or_else(|| Error::internal(format!("token {token} is not a row of the head")))?;
            let slot = self.head.first_slot + i;
            let params = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &self.buffers.params,
                offset: slot as u64 * SLOT,
                size: std::num::NonZeroU64::new(SLOT),
            });
            let storage = [
                self.buffers.activation(Buf::Final),
                &slice.weight,
                &slice.scales,
                &self.buffers.nothing,
                &self.head.logits,
            ];
            let mut entries = vec![wgpu::BindGroupEntry { binding: 0, resource: params }];
            for (i, buffer) in storage.into_iter().enumerate() {
                entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource: buffer.as_entire_binding() });
            }
            let pipeline = slice.bound.0.clone();
            let group = self.gpu.checked("a token's logit", || {
                let layout = pipeline.get_bind_group_layout(0);
                let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries };
                self.gpu.device.create_bind_group(&descriptor)
            })?;
            let (bytes, groups) = linear_shape(linear::Params {
                rows,
                count: 1,
                slice_row: token - slice.params.first,
                first: i as u32,
                out_stride: tokens.len() as u32,
                x_first: start as u32,
                ..slice.params
            });
            products.push(((pipeline, group), bytes, groups));
        }
        Ok(products)
    }

    /// The product with every slice of the head, for `rows` rows of the final norm from `start` on.
    fn head_products(&self, start: usize, rows: u32) -> Vec<Dispatch<&Bound>> {
        self.head
            .slices
            .iter()
            .map(|slice| {
                let (bytes, groups) = linear_shape(linear::Params { rows, x_first: start as u32, ..slice.params });
                (&slice.bound, bytes, groups)
            })
            .collect()
    }

    /// Runs the head's dispatches, which take its slots in order, and reads the given lengths of four buffers.
    fn submit_and_read(
        &self,
        dispatches: Vec<Dispatch<&Bound>>,
        sizes: [(&wgpu::Buffer, usize); 4],
    ) -> Result<[Vec<u8>; 4]> {
        let mut params = vec![0u8; dispatches.len() * SLOT as usize];
        for (slot, (_, bytes, _)) in params.chunks_exact_mut(SLOT as usize).zip(&dispatches) {
            slot[..bytes.len()].copy_from_slice(bytes);
        }
        let padded = sizes.map(|(_, len)| (len as u64).next_multiple_of(8));
        let submission = self.gpu.checked("the head", || {
            let offset = self.head.first_slot as u64 * SLOT;
            self.gpu.queue.write_buffer(&self.buffers.params, offset, &params);
            let mut encoder = self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            for (bound, _, [x, y, z]) in &dispatches {
                if x * y * z > 0 {
                    pass.set_pipeline(&bound.0);
                    pass.set_bind_group(0, &bound.1, &[]);
                    pass.dispatch_workgroups(*x, *y, *z);
                }
            }
            drop(pass);
            let mut at = 0;
            for ((buffer, len), padded) in sizes.iter().zip(padded) {
                if *len > 0 {
                    encoder.copy_buffer_to_buffer(buffer, 0, &self.head.readback, at, padded);
                }
                at += padded;
            }
            self.gpu.queue.submit([encoder.finish()])
        })?;
        let bytes = self.gpu.read(&self.head.readback, padded.iter().sum(), submission)?;
        let mut at = 0;
        let mut parts = [const { Vec::new() }; 4];
        for (part, ((_, len), padded)) in parts.iter_mut().zip(sizes.iter().zip(padded)) {
            let end = at + len;
            part.extend_from_slice(bytes.get(at..end).ok_or_else(|| Error::internal("a short read-back"))?);
            at += padded as usize;
        }
        Ok(parts)
    }
}
