//! rrt_model_load, rrt_model_retain, rrt_model_free, rrt_get_model_info

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use runtime::model::Head;
use runtime::weights::{Dtype, WeightFormat};
use runtime::{Model, ModelOptions, Precision};

use crate::boundary::{Outcome, Sized32, array, enter, input, only, output, quietly, reference, text, write};
use crate::runtime::{Child, open_runtime, rrt_runtime, size};
use crate::status::{E_ARG, Failure, rrt_error};
use crate::structs::{rrt_model_info, rrt_model_opts};
use crate::update::tags_number;

const NO_MMAP: u32 = 1;

#[allow(non_camel_case_types)]
pub struct rrt_model {
    pub model: Model,
    pub child: Child,
    /// How often it still has to be freed.
    owners: AtomicUsize,
    /// Names, dtypes and shapes, in name order; names are borrowed by hosts.
    tensors: OnceLock<Vec<(String, Dtype, Vec<usize>)>>,
}

impl rrt_model {
    pub fn tensors(&self) -> &[(String, Dtype, Vec<usize>)] {
        self.tensors.get_or_init(|| self.model.tensors())
    }
}

/// # Safety
/// `p` is NULL or a live model.
pub unsafe fn live_model<'a>(p: *const rrt_model) -> Outcome<&'a rrt_model> {
    // SAFETY: the caller's promise.
    let model = unsafe { reference(p, "model") }?;
    model.child.0.owner.check()?;
    Ok(model)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_load(
    runtime: *mut rrt_runtime,
    opts: *const rrt_model_opts,
    out: *mut *mut rrt_model,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        // SAFETY: the header's condition on structs.
        let opts = unsafe { input(opts) }?;
        output(out, "out")?;
        runtime.shared.owner.check()?;
        only(opts.flags, NO_MMAP, "rrt_model_opts")?;
        // SAFETY: the header's condition on strings.
        let path = unsafe { text(opts.path, opts.path_len, "path") }?;
        let mut options = ModelOptions {
            precision: match opts.precision {
                0 => Precision::Auto,
                1 => Precision::F32,
                other => return Err(Failure::new(E_ARG, format!("precision is {other}, it must be 0 or 1"))),
            },
            weights: match opts.weights {
                0 => WeightFormat::Stored,
                1 => WeightFormat::Int8,
                2 => WeightFormat::Int4,
                other => return Err(Failure::new(E_ARG, format!("weights is {other}, it must be 0, 1 or 2"))),
            },
            max_batch_tokens: size(opts.max_batch_tokens.into(), "max_batch_tokens")?,
            kv_tokens: size(opts.kv_tokens, "kv_tokens")?,
            memory: (opts.memory > 0).then_some(opts.memory),
            max_context: size(opts.max_context, "max_context")?,
            steps_at_once: size(opts.steps_at_once.into(), "steps_at_once")?,
            weights_version: opts.weights_version,
            ..ModelOptions::default()
        };
        options.load.use_mmap = opts.flags & NO_MMAP == 0;
        let model = runtime.runtime.load_model(Path::new(path), &options)?;
        let (child, owners) = (Child::of(&runtime.shared), AtomicUsize::new(1));
        let handle = rrt_model { model, child, owners, tensors: OnceLock::new() };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_retain(model: *mut rrt_model, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        unsafe { live_model(model) }?.owners.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_free(model: *mut rrt_model) {
    // SAFETY: NULL, or made by rrt_model_load and freed as often as it was retained, and once more.
    let is_last = unsafe { model.as_ref() }.is_some_and(|m| m.owners.fetch_sub(1, Ordering::SeqCst) == 1);
    if is_last {
        // SAFETY: as above; nobody has it any more.
        quietly(|| drop(unsafe { Box::from_raw(model) }));
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_get_model_info(
    model: *const rrt_model,
    out: *mut rrt_model_info,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = &unsafe { live_model(model) }?.model;
        let (spec, memory, tokenizer) = (model.spec(), model.memory(), model.tokenizer().ok());
        // Every size in a spec is below 2^32 by the limits of its parser.
        let labels = match &spec.head {
            Head::LanguageModel { .. } => 0,
            Head::SequenceClassification { labels } => labels.len() as u32,
        };
        let info = rrt_model_info {
            head: i32::from(labels > 0),
            vocab_size: spec.vocab_size as u32,
            hidden_size: spec.hidden_size as u32,
            layers: spec.layers as u32,
            heads: spec.heads as u32,
            kv_heads: spec.kv_heads as u32,
            head_dim: spec.head_dim as u32,
            labels,
            has_tokenizer: tokenizer.is_some().into(),
            has_chat_template: tokenizer.is_some_and(|t| t.chat_template().is_some()).into(),
            max_context: model.max_context() as u64,
            kv_tokens: model.kv_tokens() as u64,
            bytes_allocated: memory.allocated(),
            bytes_mapped: memory.mapped,
            weights_version: model.weights_version(),
            asleep: tags_number(model.sleeping()),
            pad_id: spec.pad_token_id.map_or(-1, i64::from),
            eos_ids: array(&spec.eos_token_ids),
            eos_count: spec.eos_token_ids.len(),
            architecture: array(spec.architecture.as_bytes()).cast(),
            architecture_len: spec.architecture.len(),
            ..rrt_model_info::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &info) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
