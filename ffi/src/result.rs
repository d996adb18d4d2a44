//! rrt_result_sequences, rrt_result_scores, rrt_result_topk, rrt_result_timing, rrt_result_free

use runtime::{JobStats, SampledSequence, SequenceLogprobs, SequenceScore};

use crate::boundary::{Outcome, Sized32, enter, quietly, reference, write};
use crate::job::{Pending, Reports};
use crate::numbers::nanoseconds;
use crate::runtime::Child;
use crate::status::{E_ARG, Failure, rrt_error};
use crate::stream::finish_number;
use crate::structs::{rrt_job_timing, rrt_scores_view, rrt_sequences_view, rrt_topk_view};

#[allow(non_camel_case_types)]
pub struct rrt_result {
    data: Data,
    top: Option<Top>,
    cost: JobStats,
    child: Child,
}

enum Data {
    Sequences(Box<Sequences>),
    Scores(Box<Scores>),
}

/// Lists of different lengths, end to end.
struct Lists<T> {
    offsets: Vec<usize>,
    items: Vec<T>,
}

impl<T> Default for Lists<T> {
    fn default() -> Self {
        Lists { offsets: vec![0], items: Vec::new() }
    }
}

impl<T> Lists<T> {
    fn push(&mut self, list: impl IntoIterator<Item = T>) {
        self.items.extend(list);
        self.offsets.push(self.items.len());
    }
}

#[derive(Default)]
struct Sequences {
    ids: Lists<u32>,
    logprob: Vec<f32>,
    sample_logprob: Vec<f32>,
    entropy: Vec<f32>,
    kept: Vec<u32>,
    threshold: Vec<f32>,
    ceiling: Vec<f32>,
    kept_ids: Option<Lists<u32>>,
    finish: Vec<i32>,
    prompt_index: Vec<u32>,
    sample_index: Vec<u32>,
    version: Vec<u64>,
    text: Lists<u8>,
    span_end: Lists<u32>,
    span_version: Vec<u64>,
    adapter_version: Vec<u64>,
    queued: Vec<u64>,
    prefill: Vec<u64>,
    decode: Vec<u64>,
}

#[derive(Default)]
struct Scores {
    values: Lists<f32>,
    version: Vec<u64>,
    adapter_version: Vec<u64>,
    score: Vec<f32>,
    labels: Lists<u8>,
    position: Option<Vec<u32>>,
    entropy: Option<Vec<f32>>,
}

/// The most likely tokens of each place.
#[derive(Default)]
struct Top {
    ids: Lists<u32>,
    logprob: Vec<f32>,
}

impl Top {
    fn new<'a>(places: impl Iterator<Item = &'a Vec<(u32, f32)>>) -> Self {
        let mut all = Top::default();
        for place in places {
            all.ids.push(place.iter().map(|(id, _)| *id));
            all.logprob.extend(place.iter().map(|(_, logprob)| *logprob));
        }
        all
    }
}

impl Sequences {
    fn new(list: &[SampledSequence], reports: Reports) -> Self {
        let mut all = Sequences { kept_ids: reports.kept.then(Lists::default), ..Sequences::default() };
        for sequence in list {
            let tokens = &sequence.tokens;
            all.ids.push(tokens.iter().map(|t| t.id));
            all.logprob.extend(tokens.iter().map(|t| t.model_logprob));
            all.sample_logprob.extend(tokens.iter().map(|t| t.logprob));
            all.entropy.extend(tokens.iter().map(|t| t.entropy));
            all.kept.extend(tokens.iter().map(|t| t.kept));
            all.threshold.extend(tokens.iter().map(|t| t.threshold));
            all.ceiling.extend(tokens.iter().map(|t| t.ceiling));
            if let Some(kept_ids) = &mut all.kept_ids {
                tokens.iter().for_each(|t| kept_ids.push(t.kept_ids.iter().copied()));
            }
            all.finish.push(finish_number(sequence.finish));
            // Both are below the request's limits.
            all.prompt_index.push(sequence.prompt as u32);
            all.sample_index.push(sequence.sample as u32);
            all.version.push(sequence.weight_version);
            all.text.push(sequence.text.as_deref().unwrap_or_default().bytes());
            // Below max_new_tokens.
            all.span_end.push(sequence.versions.iter().map(|span| span.end as u32));
            all.span_version.extend(sequence.versions.iter().map(|span| span.version));
            all.adapter_version.push(sequence.adapter_version.unwrap_or(0));
            all.queued.push(nanoseconds(sequence.timing.queued));
            all.prefill.push(nanoseconds(sequence.timing.prefill));
            all.decode.push(nanoseconds(sequence.timing.decode));
        }
        all
    }
}

impl Scores {
    fn of_logprobs(list: &[SequenceLogprobs]) -> Self {
        let number = |l: &Option<f32>| l.unwrap_or(f32::NAN);
        let mut all = Scores::default();
        for sequence in list {
            all.values.push(sequence.logprobs.iter().map(number));
            all.version.push(sequence.weight_version);
            all.adapter_version.push(sequence.adapter_version.unwrap_or(0));
            all.score.push(sequence.sum() as f32);
        }
        all.entropy = Some(list.iter().flat_map(|s| s.entropies.iter().map(number)).collect());
        all
    }

    fn of_rewards(list: &[SequenceScore], label: usize, steps: bool) -> Self {
        let mut all = Scores::default();
        for sequence in list {
            let values = &sequence.score.values;
            if steps {
                all.values.push(sequence.steps.iter().flat_map(|step| step.score.values.iter().copied()));
            } else {
                all.values.push(values.iter().copied());
            }
            all.version.push(sequence.weight_version);
            all.adapter_version.push(sequence.adapter_version.unwrap_or(0));
            all.score.push(values.get(label).copied().unwrap_or(f32::NAN));
        }
        let positions = list.iter().flat_map(|s| s.steps.iter().map(|step| step.position as u32));
        all.position = steps.then(|| positions.collect());
        for name in list.first().into_iter().flat_map(|s| s.labels.iter()) {
            all.labels.push(name.bytes());
        }
        all
    }
}

impl rrt_result {
    /// Reads a job that is done.
    pub fn read(job: Pending, child: Child) -> Outcome<Self> {
        let cost = job.watch().stats();
        let (data, top) = match job {
            Pending::Sample { job, reports } => {
                let list = job.wait()?;
                let top = reports.top.then(|| Top::new(list.iter().flat_map(|s| s.tokens.iter().map(|t| &t.top))));
                (Data::Sequences(Box::new(Sequences::new(&list, reports))), top)
            }
            Pending::Logprobs { job, reports } => {
                let list = job.wait()?;
                let top = reports.top.then(|| Top::new(list.iter().flat_map(|s| s.top.iter())));
                (Data::Scores(Box::new(Scores::of_logprobs(&list))), top)
            }
            Pending::Score { job, label, steps } => {
                (Data::Scores(Box::new(Scores::of_rewards(&job.wait()?, label, steps))), None)
            }
        };
        Ok(rrt_result { data, top, cost, child })
    }
}

/// # Safety
/// `p` is NULL or a live result.
unsafe fn live_result<'a>(p: *const rrt_result) -> Outcome<&'a rrt_result> {
    // SAFETY: the caller's promise.
    let result = unsafe { reference(p, "result") }?;
    result.child.0.owner.check_process()?;
    Ok(result)
}

fn pointer<T>(list: Option<&Vec<T>>) -> *const T {
    list.map_or(std::ptr::null(), Vec::as_ptr)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_sequences(
    result: *const rrt_result,
    out: *mut rrt_sequences_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let Data::Sequences(s) = &unsafe { live_result(result) }?.data else {
            return Err(Failure::new(E_ARG, "the result is that of a scoring job"));
        };
        let view = rrt_sequences_view {
            count: s.finish.len(),
            offsets: s.ids.offsets.as_ptr(),
            ids: s.ids.items.as_ptr(),
            logprob: s.logprob.as_ptr(),
            sample_logprob: s.sample_logprob.as_ptr(),
            entropy: s.entropy.as_ptr(),
            kept: s.kept.as_ptr(),
            threshold: s.threshold.as_ptr(),
            finish: s.finish.as_ptr(),
            prompt_index: s.prompt_index.as_ptr(),
            sample_index: s.sample_index.as_ptr(),
            version: s.version.as_ptr(),
            text_offsets: s.text.offsets.as_ptr(),
            text: s.text.items.as_ptr().cast(),
            span_offsets: s.span_end.offsets.as_ptr(),
            span_end: s.span_end.items.as_ptr(),
            span_version: s.span_version.as_ptr(),
            adapter_version: s.adapter_version.as_ptr(),
            ceiling: s.ceiling.as_ptr(),
            kept_offsets: pointer(s.kept_ids.as_ref().map(|k| &k.offsets)),
            kept_ids: pointer(s.kept_ids.as_ref().map(|k| &k.items)),
            ..rrt_sequences_view::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &view) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_scores(
    result: *const rrt_result,
    out: *mut rrt_scores_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let Data::Scores(s) = &unsafe { live_result(result) }?.data else {
            return Err(Failure::new(E_ARG, "the result is that of a sampling job"));
        };
        let view = rrt_scores_view {
            count: s.version.len(),
            offsets: s.values.offsets.as_ptr(),
            values: s.values.items.as_ptr(),
            version: s.version.as_ptr(),
            adapter_version: s.adapter_version.as_ptr(),
            score: s.score.as_ptr(),
            label_count: s.labels.offsets.len() - 1,
            label_offsets: s.labels.offsets.as_ptr(),
            label_text: s.labels.items.as_ptr().cast(),
            position: pointer(s.position.as_ref()),
            entropy: pointer(s.entropy.as_ref()),
            ..rrt_scores_view::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &view) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_topk(
    result: *const rrt_result,
    out: *mut rrt_topk_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let Some(top) = &unsafe { live_result(result) }?.top else {
            return Err(Failure::new(E_ARG, "the request did not ask for top_logprobs"));
        };
        let view = rrt_topk_view {
            count: top.ids.offsets.len() - 1,
            offsets: top.ids.offsets.as_ptr(),
            ids: top.ids.items.as_ptr(),
            logprob: top.logprob.as_ptr(),
            ..rrt_topk_view::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &view) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_timing(
    result: *const rrt_result,
    out: *mut rrt_job_timing,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let result = unsafe { live_result(result) }?;
        let cost = &result.cost;
        let mut view = rrt_job_timing {
            queued_ns: nanoseconds(cost.queued),
            elapsed_ns: nanoseconds(cost.elapsed),
            prefill_rows: cost.rows.prefill,
            decode_rows: cost.rows.decode,
            drafted_rows: cost.rows.drafted,
            accepted_rows: cost.rows.accepted,
            recomputed_rows: cost.rows.recomputed,
            cached_rows: cost.rows.cached,
            sampled_tokens: cost.sampled_tokens,
            preemptions: cost.preemptions,
            ..rrt_job_timing::initial()
        };
        if let Data::Sequences(s) = &result.data {
            view.count = s.queued.len();
            view.sequence_queued_ns = s.queued.as_ptr();
            view.sequence_prefill_ns = s.prefill.as_ptr();
            view.sequence_decode_ns = s.decode.as_ptr();
        }
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &view) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_free(result: *mut rrt_result) {
    if !result.is_null() {
        // SAFETY: made by rrt_job_take, freed once.
        quietly(|| drop(unsafe { Box::from_raw(result) }));
    }
}
