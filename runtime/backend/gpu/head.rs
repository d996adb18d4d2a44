//! What follows the final norm on the GPU: a bounded block of rows at a time.

use bytemuck::{bytes_of, pod_collect_to_vec};

use super::executor::{Builder, GpuExecutor, SLOT, block_rows, fold, linear_shape, slice_params};
use super::pipelines::Flags;
use super::upload::Matrix;
use crate::backend::{Output, OutputRow, Step, TokenStats, Want, top_logprobs};
use crate::error::{Error, Result};
use crate::kernels::log_sum_exp::RowStats;
use crate::kernels::top_k::{Candidate, MAX_K, NO_TOKEN};
use crate::kernels::{linear, log_sum_exp, sample, top_k};
use crate::model::{Buf, ModelSpec};

/// Parameter slots that the head needs beyond one per slice of its matrix.
pub(super) const SLOTS: usize = 3 + TOKEN_SLOTS;
/// Different tokens whose rows of the head are multiplied one by one; with more, the whole head is.
const TOKEN_SLOTS: usize = 64;

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
    sample: Bound,
    first_slot: usize,
    targets: wgpu::Buffer,
    requests: wgpu::Buffer,
    seen: wgpu::Buffer,
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
        let seen = size("seen", spec.vocab_size.div_ceil(32) * 4, storage)?;
        let stats = size("stats", size_of::<RowStats>(), storage | copy)?;
        let best = size("best", MAX_K * size_of::<Candidate>(), storage | copy)?;
        let drawn = size("drawn", size_of::<sample::Drawn>(), storage | copy)?;
        // The logits themselves are read back for score heads and single tokens only.
        let readback = gpu.buffer(
            "readback",
            stats.size() + best.size() + drawn.size() + logits.size(),
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
        let sample = builder.bind(&sample::KERNEL, plain, &[&logits, &requests, &seen, &drawn], slot + 2)?;
        Ok(Head {
            slices,
            log_sum_exp,
            top_k,
            sample,
            first_slot,
            targets,
            requests,
            seen,
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
            let end = limit.min(start + self.head.block);
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
        let (mut targets, mut requests, mut seen) = (Vec::new(), Vec::new(), Vec::<u32>::new());
        for want in wants {
            targets.push(if let Want::Logprob { target, .. } = want { *target } else { NO_TOKEN });
            let mut request = bytemuck::Zeroable::zeroed();
            if let Want::Sample { request: asked, seen: mask, .. } = want {
                request = *asked;
                if let Some(mask) = mask {
                    request.seen_row = (seen.len() / words) as u32;
                    seen.extend_from_slice(mask);
                }
            }
            requests.push(request);
        }
        let samples = requests.iter().any(|r: &sample::Request| r.active == 1);
        self.write(&head.targets, bytemuck::cast_slice(&targets))?;
        self.write(&head.requests, bytemuck::cast_slice(&requests))?;
        self.write(&head.seen, bytemuck::cast_slice(&seen))?;

        let mut dispatches = self.head_products(start, rows);
        let stats = log_sum_exp::Params { rows, vocab };
        dispatches.push((&head.log_sum_exp, bytes_of(&stats).to_vec(), fold(rows)));
        let best = top_k::Params { rows, vocab, k: k as u32 };
        dispatches.push((&head.top_k, bytes_of(&best).to_vec(), fold(if k > 0 { rows } else { 0 })));
        let draw = sample::Params { rows, vocab, seen_words: words as u32 };
        dispatches.push((&head.sample, bytes_of(&draw).to_vec(), fold(if samples { rows } else { 0 })));

        let sizes = [
            (&head.stats, wants.len() * size_of::<RowStats>()),
            (&head.best, wants.len() * k * size_of::<Candidate>()),
            (&head.drawn, if samples { wants.len() * size_of::<sample::Drawn>() } else { 0 }),
        ];
        let [stats, best, drawn] = self.submit_and_read(dispatches, sizes)?;
        let stats: Vec<RowStats> = pod_collect_to_vec(&stats);
        let best: Vec<Candidate> = pod_collect_to_vec(&best);
        let drawn: Vec<sample::Drawn> = pod_collect_to_vec(&drawn);
        let read = |(i, want): (usize, &&Want)| {
            let RowStats { stats, target_logit } = stats[i];
            let best = &best[i * k..i * k + want.top()];
            let of = |logit: f32| TokenStats {
                logprob: stats.logprob(logit),
                entropy: stats.entropy(),
                top: top_logprobs(best, |l| stats.logprob(l)),
            };
            match want {
                Want::Sample { .. } => Output::Sampled { drawn: drawn[i], stats: of(drawn[i].logit) },
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
        let sizes = [(&self.head.logits, wants.len() * width * 4), nothing, nothing];
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

    /// Runs the head's dispatches, which take its slots in order, and reads the given lengths of three buffers.
    fn submit_and_read(
        &self,
        dispatches: Vec<Dispatch<&Bound>>,
        sizes: [(&wgpu::Buffer, usize); 3],
    ) -> Result<[Vec<u8>; 3]> {
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
        let mut parts = [Vec::new(), Vec::new(), Vec::new()];
        for (part, ((_, len), padded)) in parts.iter_mut().zip(sizes.iter().zip(padded)) {
            let end = at + len;
            part.extend_from_slice(bytes.get(at..end).ok_or_else(|| Error::internal("a short read-back"))?);
            at += padded as usize;
        }
        Ok(parts)
    }
}
