//! rrt_result_sequences, rrt_result_scores, rrt_result_topk, rrt_result_rollout, rrt_result_timing, rrt_result_free

use runtime::{Group, JobStats, Rollout, SampledSequence, SequenceLogprobs, SequenceScore};

use crate::boundary::{Outcome, Sized32, array, enter, quietly, reference, write};
use crate::job::{Pending, Reports};
use crate::numbers::nanoseconds;
use crate::runtime::Child;
use crate::status::{E_ARG, Failure, rrt_error};
use crate::stream::finish_number;
use crate::structs::{rrt_job_timing, rrt_rollout_view, rrt_scores_view, rrt_sequences_view, rrt_topk_view};

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
    Rollout(Box<Sequences>, Box<Rewards>),
}

impl Data {
    fn sequences(&self) -> Option<&Sequences> {
        match self {
            Data::Sequences(sequences) | Data::Rollout(sequences, _) => Some(sequences),
            Data::Scores(_) => None,
        }
    }
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

/// What a rollout adds to its sequences.
struct Rewards {
    reference: Option<Vec<f32>>,
    kl1: Vec<f32>,
    kl2: Vec<f32>,
    kl3: Vec<f32>,
    reward_count: usize,
    rewards: Vec<f32>,
    reward: Vec<f32>,
    advantage: Vec<f32>,
    mean: Vec<f32>,
    std: Vec<f32>,
    zero_variance: Vec<u32>,
    best: Vec<u32>,
    worst: Vec<u32>,
    reward_version: Vec<u64>,
    ref_version: Option<Vec<u64>>,
}

impl Rewards {
    fn new(rollout: &Rollout) -> Self {
        let number = |l: &Option<f32>| l.unwrap_or(f32::NAN);
        let reference =
            |list: &Vec<SequenceLogprobs>| list.iter().flat_map(|s| s.logprobs.iter().map(number)).collect();
        let groups = &rollout.groups;
        // Places of sequences are below the request's limits.
        let pair = |g: &Group| g.best_and_worst.map_or((u32::MAX, u32::MAX), |(b, w)| (b as u32, w as u32));
        Rewards {
            reference: rollout.reference.as_ref().map(reference),
            kl1: rollout.kl.iter().flat_map(|kl| &kl.k1).copied().collect(),
            kl2: rollout.kl.iter().flat_map(|kl| &kl.k2).copied().collect(),
            kl3: rollout.kl.iter().flat_map(|kl| &kl.k3).copied().collect(),
            reward_count: rollout.rewards.len(),
            rewards: rollout.rewards.concat(),
            reward: rollout.reward.clone(),
            advantage: rollout.advantages.clone(),
            mean: groups.iter().map(|g| g.mean).collect(),
            std: groups.iter().map(|g| g.std).collect(),
            zero_variance: groups.iter().map(|g| g.zero_variance.into()).collect(),
            best: groups.iter().map(|g| pair(g).0).collect(),
            worst: groups.iter().map(|g| pair(g).1).collect(),
            reward_version: rollout.reward_versions.concat(),
            ref_version: rollout.reference.as_ref().map(|list| list.iter().map(|s| s.weight_version).collect()),
        }
    }
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

    fn of_samples(list: &[SampledSequence], reports: Reports) -> Option<Self> {
        reports.top.then(|| Top::new(list.iter().flat_map(|s| s.tokens.iter().map(|t| &t.top))))
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
        let (data, top, cost) = match job {
            Pending::Sample { job, reports } => {
                let (cost, list) = (job.stats(), job.wait()?);
                (Data::Sequences(Box::new(Sequences::new(&list, reports))), Top::of_samples(&list, reports), cost)
            }
            Pending::Logprobs { job, reports } => {
                let (cost, list) = (job.stats(), job.wait()?);
                let top = reports.top.then(|| Top::new(list.iter().flat_map(|s| s.top.iter())));
                (Data::Scores(Box::new(Scores::of_logprobs(&list))), top, cost)
            }
            Pending::Score { job, label, steps } => {
                let (cost, list) = (job.stats(), job.wait()?);
                (Data::Scores(Box::new(Scores::of_rewards(&list, label, steps))), None, cost)
            }
            Pending::Rollout { job, reports, others } => {
                let rollout = job.wait()?;
                drop(others);
                let sequences = Box::new(Sequences::new(&rollout.samples, reports));
                let cost = JobStats { elapsed: rollout.elapsed, ..rollout.sampling };
                let top = Top::of_samples(&rollout.samples, reports);
                (Data::Rollout(sequences, Box::new(Rewards::new(&rollout))), top, cost)
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

/// An array that a result need not have.
fn optional<T>(list: Option<&Vec<T>>) -> *const T {
    array(list.map_or(&[], Vec::as_slice))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_sequences(
    result: *const rrt_result,
    out: *mut rrt_sequences_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let Some(s) = unsafe { live_result(result) }?.data.sequences() else {
            return Err(Failure::new(E_ARG, "the result is that of a scoring job"));
        };
        let view = rrt_sequences_view {
            count: s.finish.len(),
            offsets: array(&s.ids.offsets),
            ids: array(&s.ids.items),
            logprob: array(&s.logprob),
            sample_logprob: array(&s.sample_logprob),
            entropy: array(&s.entropy),
            kept: array(&s.kept),
            threshold: array(&s.threshold),
            finish: array(&s.finish),
            prompt_index: array(&s.prompt_index),
            sample_index: array(&s.sample_index),
            version: array(&s.version),
            text_offsets: array(&s.text.offsets),
            text: array(&s.text.items).cast(),
            span_offsets: array(&s.span_end.offsets),
            span_end: array(&s.span_end.items),
            span_version: array(&s.span_version),
            adapter_version: array(&s.adapter_version),
            ceiling: array(&s.ceiling),
            kept_offsets: optional(s.kept_ids.as_ref().map(|k| &k.offsets)),
            kept_ids: optional(s.kept_ids.as_ref().map(|k| &k.items)),
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
            offsets: array(&s.values.offsets),
            values: array(&s.values.items),
            version: array(&s.version),
            adapter_version: array(&s.adapter_version),
            score: array(&s.score),
            label_count: s.labels.offsets.len() - 1,
            label_offsets: array(&s.labels.offsets),
            label_text: array(&s.labels.items).cast(),
            position: optional(s.position.as_ref()),
            entropy: optional(s.entropy.as_ref()),
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
            offsets: array(&top.ids.offsets),
            ids: array(&top.ids.items),
            logprob: array(&top.logprob),
            ..rrt_topk_view::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &view) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_rollout(
    result: *const rrt_result,
    out: *mut rrt_rollout_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let Data::Rollout(_, r) = &unsafe { live_result(result) }?.data else {
            return Err(Failure::new(E_ARG, "the result is not that of a rollout"));
        };
        let with_reference = |list| optional(r.reference.as_ref().map(|_| list));
        let view = rrt_rollout_view {
            count: r.reward.len(),
            ref_logprob: optional(r.reference.as_ref()),
            kl1: with_reference(&r.kl1),
            kl2: with_reference(&r.kl2),
            kl3: with_reference(&r.kl3),
            reward_count: r.reward_count,
            rewards: array(&r.rewards),
            reward: array(&r.reward),
            advantage: array(&r.advantage),
            group_count: r.mean.len(),
            group_mean: array(&r.mean),
            group_std: array(&r.std),
            group_zero_variance: array(&r.zero_variance),
            group_best: array(&r.best),
            group_worst: array(&r.worst),
            reward_version: array(&r.reward_version),
            ref_version: optional(r.ref_version.as_ref()),
            ..rrt_rollout_view::initial()
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
        if let Some(s) = result.data.sequences() {
            view.count = s.queued.len();
            view.sequence_queued_ns = array(&s.queued);
            view.sequence_prefill_ns = array(&s.prefill);
            view.sequence_decode_ns = array(&s.decode);
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
