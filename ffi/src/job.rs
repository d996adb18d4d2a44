//! rrt_submit_sample, rrt_submit_score, rrt_wait, rrt_job_take, rrt_job_cancel

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use runtime::{
    Job, JobWatch, LogprobRequest, Rule, SampleRequest, SampledSequence, ScoreRequest, SequenceLogprobs, SequenceScore,
};

use crate::adapter::chosen;
use crate::boundary::{Outcome, elements, enter, input, null, output, text};
use crate::model::{live_model, rrt_model};
use crate::result::rrt_result;
use crate::runtime::{Child, open_runtime, rrt_runtime};
use crate::status::{E_ARG, E_NOT_FOUND, Failure, PENDING, TIMEOUT, rrt_error};
use crate::structs::{rrt_sample_req, rrt_score_req, rrt_sequences};

const IGNORE_EOS: u32 = 1;
const REWARD: i32 = 1;
const LOGPROBS: i32 = 2;
const WAIT_ANY: u32 = 1;

/// A job that nobody has taken yet.
pub enum Pending {
    Sample(Job<Vec<SampledSequence>>),
    Logprobs(Job<Vec<SequenceLogprobs>>),
    Score(Job<Vec<SequenceScore>>),
}

impl Pending {
    pub fn watch(&self) -> JobWatch {
        match self {
            Pending::Sample(job) => job.watch(),
            Pending::Logprobs(job) => job.watch(),
            Pending::Score(job) => job.watch(),
        }
    }
}

/// # Safety
/// The header's condition on rrt_sequences.
unsafe fn sequences(s: &rrt_sequences, what: &str) -> Outcome<Vec<Vec<u32>>> {
    if s.count == 0 {
        return Err(Failure::new(E_ARG, format!("{what}: there are none")));
    }
    if s.count > runtime::MAX_SEQUENCES {
        return Err(Failure::new(E_ARG, format!("{what}: {} sequences, at most {}", s.count, runtime::MAX_SEQUENCES)));
    }
    // SAFETY: the caller's promise.
    let offsets = unsafe { elements(s.offsets, s.count + 1, "offsets") }?;
    if offsets.windows(2).any(|w| w[0] > w[1]) {
        return Err(Failure::new(E_ARG, format!("{what}: offsets must not fall")));
    }
    // SAFETY: the caller's promise: ids reach to the last offset.
    let ids = unsafe { elements(s.ids, offsets[s.count], "ids") }?;
    Ok(offsets.windows(2).map(|w| ids[w[0]..w[1]].to_vec()).collect())
}

fn queue(runtime: &rrt_runtime, job: Pending, out: *mut u64) {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    runtime.jobs().insert(id, job);
    // SAFETY: checked by the caller of this function.
    unsafe { out.write(id) };
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_submit_sample(
    runtime: *mut rrt_runtime,
    req: *const rrt_sample_req,
    job: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (runtime, req) = unsafe { (open_runtime(runtime)?, input(req)?) };
        output(job, "job")?;
        // SAFETY: the header's condition on handles.
        let model = unsafe { live_model(req.model) }?;
        same_runtime(runtime, model)?;
        if req.flags & !IGNORE_EOS != 0 || req.reserved != 0 {
            return Err(Failure::new(E_ARG, format!("rrt_sample_req: unknown flags {:#x}", req.flags)));
        }
        // SAFETY: the header's conditions on arrays.
        let (prompts, stop_ids, streams) = unsafe {
            let streams =
                if req.streams.is_null() { &[] } else { elements(req.streams, req.prompts.count, "streams")? };
            (sequences(&req.prompts, "prompts")?, elements(req.stop_ids, req.stop_id_count, "stop_ids")?, streams)
        };
        let request = SampleRequest {
            prompts,
            n: req.n_samples as usize,
            max_tokens: req.max_new_tokens as usize,
            temperature: req.temperature,
            top_k: req.top_k as usize,
            top_p: req.top_p,
            min_p: req.min_p,
            repetition_penalty: req.repetition_penalty,
            seed: req.seed,
            streams: streams.to_vec(),
            // SAFETY: the header's condition on arrays.
            stop: unsafe { stop_strings(&req) }?,
            stop_ids: stop_ids.to_vec(),
            ignore_eos: req.flags & IGNORE_EOS != 0,
            // SAFETY: the header's condition on handles.
            adapter: unsafe { chosen(req.adapter) }?,
            ..SampleRequest::default()
        };
        queue(runtime, Pending::Sample(model.model.sample(&request)?), job);
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

/// # Safety
/// The header's condition on stop_text and stop_offsets.
unsafe fn stop_strings(req: &rrt_sample_req) -> Outcome<Vec<String>> {
    if req.stop_count == 0 {
        return Ok(Vec::new());
    }
    if req.stop_count > 1024 {
        return Err(Failure::new(E_ARG, format!("stop_count is {}", req.stop_count)));
    }
    // SAFETY: the caller's promise.
    let offsets = unsafe { elements(req.stop_offsets, req.stop_count + 1, "stop_offsets") }?;
    // SAFETY: the caller's promise: the text reaches to the last offset.
    let all = unsafe { text(req.stop_text, offsets[req.stop_count], "stop_text") }?;
    let part = |w: &[usize]| all.get(w[0]..w[1]).map(str::to_owned);
    let parts: Option<Vec<String>> = offsets.windows(2).map(part).collect();
    parts.ok_or_else(|| Failure::new(E_ARG, "stop_offsets must not fall, nor cut a character"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_submit_score(
    runtime: *mut rrt_runtime,
    req: *const rrt_score_req,
    job: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (runtime, req) = unsafe { (open_runtime(runtime)?, input(req)?) };
        output(job, "job")?;
        // SAFETY: the header's condition on handles.
        let model = unsafe { live_model(req.model) }?;
        same_runtime(runtime, model)?;
        if req.flags != 0 || req.reserved != 0 {
            return Err(Failure::new(E_ARG, "rrt_score_req: flags and reserved must be 0"));
        }
        // SAFETY: the header's conditions on arrays and handles.
        let (sequences, adapter) = unsafe { (sequences(&req.sequences, "sequences")?, chosen(req.adapter)?) };
        let pending = match req.kind {
            REWARD => {
                let rule = if req.rule.is_null() {
                    None
                } else {
                    // SAFETY: the header's condition on strings.
                    Some(unsafe { text(req.rule, req.rule_len, "rule") }?)
                };
                let rule = rule.map(Rule::parse).transpose()?;
                Pending::Score(model.model.score(&ScoreRequest {
                    sequences,
                    rule,
                    adapter,
                    ..ScoreRequest::default()
                })?)
            }
            LOGPROBS => {
                let prompt_lens = if req.prompt_lens.is_null() {
                    Vec::new()
                } else {
                    // SAFETY: the header's condition on arrays.
                    unsafe { elements(req.prompt_lens, sequences.len(), "prompt_lens") }?.to_vec()
                };
                let request = LogprobRequest { sequences, prompt_lens, adapter, ..LogprobRequest::default() };
                Pending::Logprobs(model.model.logprobs(&request)?)
            }
            other => return Err(Failure::new(E_ARG, format!("kind is {other}, it must be {REWARD} or {LOGPROBS}"))),
        };
        queue(runtime, pending, job);
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

fn same_runtime(runtime: &rrt_runtime, model: &rrt_model) -> Outcome<()> {
    if std::sync::Arc::ptr_eq(&runtime.shared, &model.child.0) {
        return Ok(());
    }
    Err(Failure::new(E_ARG, "the model was loaded on another runtime"))
}

fn unknown(job: u64) -> Failure {
    Failure::new(E_NOT_FOUND, format!("{job} is no job, or was taken"))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_wait(
    runtime: *mut rrt_runtime,
    jobs: *const u64,
    count: usize,
    flags: u32,
    timeout_ns: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        if jobs.is_null() {
            return Err(null("jobs"));
        }
        if flags & !WAIT_ANY != 0 {
            return Err(Failure::new(E_ARG, format!("unknown flags {flags:#x}")));
        }
        // SAFETY: the header's condition on arrays.
        let ids = unsafe { elements(jobs, count, "jobs") }?;
        let pending: Vec<JobWatch> = {
            let known = runtime.jobs();
            ids.iter()
                .map(|id| known.get(id).map(Pending::watch).ok_or_else(|| unknown(*id)))
                .collect::<Outcome<_>>()?
        };
        let start = Instant::now();
        let limit = (timeout_ns != u64::MAX).then(|| Duration::from_nanos(timeout_ns));
        let any = flags & WAIT_ANY != 0 && !pending.is_empty();
        loop {
            let mut done = pending.iter().map(|job| job.wait_timeout(Duration::ZERO));
            if if any { done.any(|d| d) } else { done.all(|d| d) } {
                return Ok(());
            }
            let left = limit.map_or(Duration::MAX, |l| l.saturating_sub(start.elapsed()));
            if left.is_zero() {
                return Err(Failure::new(TIMEOUT, "the jobs are not done"));
            }
            // In slices, since one wait watches one job.
            if let Some(job) = pending.iter().find(|job| !job.wait_timeout(Duration::ZERO)) {
                job.wait_timeout(left.min(Duration::from_millis(if any { 2 } else { 500 })));
            }
        }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_take(
    runtime: *mut rrt_runtime,
    job: u64,
    out: *mut *mut rrt_result,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        output(out, "out")?;
        let taken = {
            let mut jobs = runtime.jobs();
            let pending = jobs.get(&job).ok_or_else(|| unknown(job))?;
            if !pending.watch().wait_timeout(Duration::ZERO) {
                return Err(Failure::new(PENDING, "the job is not done"));
            }
            jobs.remove(&job).ok_or_else(|| unknown(job))?
        };
        let result = rrt_result::read(taken, Child::of(&runtime.shared))?;
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(result))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_cancel(runtime: *mut rrt_runtime, job: u64, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        runtime.jobs().get(&job).ok_or_else(|| unknown(job))?.watch().cancel();
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
