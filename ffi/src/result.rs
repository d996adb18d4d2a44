//! rrt_result_sequences, rrt_result_scores, rrt_result_free

use runtime::{Finish, SampledSequence, SequenceLogprobs};

use crate::boundary::{Outcome, enter, quietly, reference, write};
use crate::job::Pending;
use crate::runtime::Child;
use crate::status::{E_ARG, Failure, rrt_error};
use crate::structs::{rrt_scores_view, rrt_sequences_view};

#[allow(non_camel_case_types)]
pub struct rrt_result {
    data: Data,
    child: Child,
}

enum Data {
    Sequences(Box<Sequences>),
    Scores(Scores),
}

#[derive(Default)]
struct Sequences {
    offsets: Vec<usize>,
    ids: Vec<u32>,
    logprob: Vec<f32>,
    sample_logprob: Vec<f32>,
    entropy: Vec<f32>,
    kept: Vec<u32>,
    threshold: Vec<f32>,
    finish: Vec<i32>,
    prompt_index: Vec<u32>,
    sample_index: Vec<u32>,
    version: Vec<u64>,
    text_offsets: Vec<usize>,
    text: String,
    span_offsets: Vec<usize>,
    span_end: Vec<u32>,
    span_version: Vec<u64>,
    adapter_version: Vec<u64>,
}

#[derive(Default)]
struct Scores {
    offsets: Vec<usize>,
    values: Vec<f32>,
    version: Vec<u64>,
    adapter_version: Vec<u64>,
}

impl Sequences {
    fn new(list: Vec<SampledSequence>) -> Self {
        let mut all =
            Sequences { offsets: vec![0], text_offsets: vec![0], span_offsets: vec![0], ..Sequences::default() };
        for sequence in list {
            for token in &sequence.tokens {
                all.ids.push(token.id);
                all.logprob.push(token.model_logprob);
                all.sample_logprob.push(token.logprob);
                all.entropy.push(token.entropy);
                all.kept.push(token.kept);
                all.threshold.push(token.threshold);
            }
            all.offsets.push(all.ids.len());
            all.finish.push(match sequence.finish {
                Finish::Stop => 0,
                Finish::Length => 1,
                Finish::Cancelled => 2,
                Finish::Blocked => 3,
            });
            // Both are below the request's limits.
            all.prompt_index.push(sequence.prompt as u32);
            all.sample_index.push(sequence.sample as u32);
            all.version.push(sequence.weight_version);
            all.text.push_str(sequence.text.as_deref().unwrap_or_default());
            all.text_offsets.push(all.text.len());
            for span in &sequence.versions {
                // Below max_new_tokens.
                all.span_end.push(span.end as u32);
                all.span_version.push(span.version);
            }
            all.span_offsets.push(all.span_end.len());
            all.adapter_version.push(sequence.adapter_version.unwrap_or(0));
        }
        all
    }
}

impl Scores {
    fn new(rows: impl Iterator<Item = (Vec<f32>, u64, Option<u64>)>) -> Self {
        let mut all = Scores { offsets: vec![0], ..Scores::default() };
        for (values, version, adapter_version) in rows {
            all.values.extend(values);
            all.offsets.push(all.values.len());
            all.version.push(version);
            all.adapter_version.push(adapter_version.unwrap_or(0));
        }
        all
    }
}

impl rrt_result {
    /// Reads a job that is done.
    pub fn read(job: Pending, child: Child) -> Outcome<Self> {
        let data = match job {
            Pending::Sample(job) => Data::Sequences(Box::new(Sequences::new(job.wait()?))),
            Pending::Logprobs(job) => {
                let value = |l: Option<f32>| l.unwrap_or(f32::NAN);
                let rows = job.wait()?.into_iter();
                let row = |r: SequenceLogprobs| {
                    (r.logprobs.into_iter().map(value).collect(), r.weight_version, r.adapter_version)
                };
                Data::Scores(Scores::new(rows.map(row)))
            }
            Pending::Score(job) => {
                let rows = job.wait()?.into_iter();
                Data::Scores(Scores::new(rows.map(|r| (r.score.values, r.weight_version, r.adapter_version))))
            }
        };
        Ok(rrt_result { data, child })
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_result_sequences(
    result: *const rrt_result,
    out: *mut rrt_sequences_view,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let result = unsafe { reference(result, "result") }?;
        result.child.0.owner.check_process()?;
        let Data::Sequences(s) = &result.data else {
            return Err(Failure::new(E_ARG, "the result is that of a scoring job"));
        };
        let view = rrt_sequences_view {
            count: s.finish.len(),
            offsets: s.offsets.as_ptr(),
            ids: s.ids.as_ptr(),
            logprob: s.logprob.as_ptr(),
            sample_logprob: s.sample_logprob.as_ptr(),
            entropy: s.entropy.as_ptr(),
            kept: s.kept.as_ptr(),
            threshold: s.threshold.as_ptr(),
            finish: s.finish.as_ptr(),
            prompt_index: s.prompt_index.as_ptr(),
            sample_index: s.sample_index.as_ptr(),
            version: s.version.as_ptr(),
            text_offsets: s.text_offsets.as_ptr(),
            text: s.text.as_ptr().cast(),
            span_offsets: s.span_offsets.as_ptr(),
            span_end: s.span_end.as_ptr(),
            span_version: s.span_version.as_ptr(),
            adapter_version: s.adapter_version.as_ptr(),
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
        let result = unsafe { reference(result, "result") }?;
        result.child.0.owner.check_process()?;
        let Data::Scores(s) = &result.data else {
            return Err(Failure::new(E_ARG, "the result is that of a sampling job"));
        };
        let view = rrt_scores_view {
            count: s.version.len(),
            offsets: s.offsets.as_ptr(),
            values: s.values.as_ptr(),
            version: s.version.as_ptr(),
            adapter_version: s.adapter_version.as_ptr(),
            ..rrt_scores_view::initial()
        };
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
