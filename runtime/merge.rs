//! An adapter's factors added into the base weights, and taken out again.

use crate::adapter::Adapter;
use crate::error::{Error, ErrorKind, Result};
use crate::exchange::Exchange;
use crate::loaded_model::Model;
use crate::model::Head;
use crate::update::{Require, Storage, UpdateOptions};
use crate::weights::{AdapterWeights, LowRank, Tensor};

/// The score head's tensor, which an adapter may replace.
const SCORE: &str = "score.weight";

/// An adapter that was merged; it knows the weights that were there before.
pub struct MergedAdapter {
    model: Model,
    /// What was replaced.
    originals: Vec<(String, Tensor)>,
    /// The generation of the weights with the adapter in them.
    generation: u64,
}

impl Adapter {
    /// Makes W + scale · B · A the model's weights, under a version of their own: computed in f32 and rounded to the
    /// stored dtype, as PEFT's `merge_and_unload` does. Requests without an adapter use them then, at no cost a token; those
    /// with this one would add it twice. An adapter's own score head takes the place of the model's.
    ///
    /// It is an update in shadow of the tensors that the adapter changes: of `options` all but `storage` and `require` count.
    ///
    /// # Errors
    /// As [`Model::update`] and [`Update::commit`](crate::Update::commit); `Argument` for [`Storage::InPlace`]. Nothing has
    /// changed then.
    pub fn merge(&self, version: u64, options: &UpdateOptions) -> Result<MergedAdapter> {
        if options.storage == Storage::InPlace {
            return Err(Error::argument("storage is InPlace; an adapter is merged in shadow, which unmerging needs"));
        }
        let (model, adapter) = (self.model(), self.weights());
        let mut names: Vec<String> = adapter.tensors().map(str::to_owned).collect();
        if adapter.head().is_some() && matches!(model.spec().head, Head::SequenceClassification { .. }) {
            names.push(SCORE.into());
        }
        let mut update = model.update(&UpdateOptions { require: Require::Subset, ..*options })?;
        let originals = update.derive(&names, |name, tensor, out| add(&adapter, name, tensor, out))?;
        let generation = update.next_generation();
        update.commit(version)?;
        Ok(MergedAdapter { model: model.clone(), originals, generation })
    }
}

impl MergedAdapter {
    /// True while the model's weights are those that the merge made: what [`unmerge`](MergedAdapter::unmerge) needs.
    pub fn is_current(&self) -> bool {
        let state = self.model.weights().lock();
        state.generation == self.generation && !state.is_broken
    }

    /// Puts the weights back that were there before, to the bit, under a version of their own.
    ///
    /// # Errors
    /// `Conflict` if the model's weights have changed since the merge; otherwise as [`Adapter::merge`]. The adapter stays
    /// merged then.
    pub fn unmerge(&self, version: u64, options: &UpdateOptions) -> Result<()> {
        if options.storage == Storage::InPlace {
            return Err(Error::argument("storage is InPlace; an adapter is unmerged in shadow"));
        }
        let state = self.model.weights().lock();
        let (generation, present) = (state.generation, state.version);
        // What an update in place left half-written is nobody's generation.
        let weights = state.weights.clone().filter(|_| !state.is_broken);
        drop(state);
        if let Some(expected) = options.expect_version.filter(|v| *v != present) {
            let text = format!("the model's weights have version {present}, unmerging expects {expected}");
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        let (Some(mut weights), true) = (weights, generation == self.generation) else {
            let text =
                "the model's weights have changed since the adapter was merged; nothing can be taken out of them";
            return Err(Error::new(ErrorKind::Conflict, text));
        };
        if version == present {
            return Err(Error::argument(format!("version {version} is the one that the model has now")));
        }
        for (name, tensor) in &self.originals {
            weights.replace(name, tensor.clone());
        }
        self.model.exchange(Exchange {
            weights,
            changed: &self.originals.iter().map(|(name, _)| name.clone()).collect(),
            version,
            base: generation,
            in_flight: options.in_flight,
            timeout: options.timeout,
        })
    }
}

/// Writes what the adapter makes of a tensor.
fn add(adapter: &AdapterWeights, name: &str, tensor: &Tensor, out: &mut [u8]) -> Result<()> {
    let dtype = tensor.dtype();
    let Some(LowRank { rank, scale, a, b }) = adapter.of_tensor(name) else {
        let head = adapter.head().filter(|head| head.len() * dtype.size() == out.len());
        let head = head.ok_or_else(|| Error::internal(format!("tensor {name:?} is not one of the adapter's")))?;
        out.copy_from_slice(&dtype.from_f32(head));
        return Ok(());
    };
    let (rows, cols) = (tensor.shape()[0], tensor.shape()[1]);
    let stride = cols * dtype.size();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let each = rows.div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (part, out) in out.chunks_mut(each * stride).enumerate() {
            scope.spawn(move || {
                let (mut delta, mut row) = (vec![0.0f32; cols], vec![0.0f32; cols]);
                for (i, out) in out.chunks_exact_mut(stride).enumerate() {
                    let n = part * each + i;
                    delta.fill(0.0);
                    for (r, a) in a.chunks_exact(cols).enumerate().take(*rank) {
                        let factor = b[r * rows + n];
                        delta.iter_mut().zip(a).for_each(|(d, a)| *d += factor * a);
                    }
                    dtype.read_f32(&tensor.bytes()[n * stride..(n + 1) * stride], &mut row);
                    row.iter_mut().zip(&delta).for_each(|(w, d)| *w += scale * d);
                    out.copy_from_slice(&dtype.from_f32(&row));
                }
            });
        }
    });
    Ok(())
}
