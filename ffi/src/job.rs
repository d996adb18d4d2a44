//! The table of jobs; rrt_submit_sample, rrt_submit_score, rrt_job_take, rrt_job_cancel, rrt_job_drop, rrt_job_progress

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use runtime::{Job, Model, RolloutJob, SampleRequest, SampledSequence, SequenceLogprobs, SequenceScore};

use crate::boundary::{Outcome, enter, input, output};
use crate::events::Ready;
use crate::model::{live_model, rrt_model};
use crate::request::{Scoring, sample_request, scoring, sequences};
use crate::result::rrt_result;
use crate::runtime::{Child, Shared, open_runtime, rrt_runtime};
use crate::status::{E_ARG, E_NOT_FOUND, Failure, PENDING, rrt_error};
use crate::stream::Flow;
use crate::structs::{rrt_sample_req, rrt_score_req};
use crate::watch::Watch;

/// A job that nobody has taken yet, and what its result has to say.
pub enum Pending {
    Sample {
        job: Job<Vec<SampledSequence>>,
        reports: Reports,
    },
    Logprobs {
        job: Job<Vec<SequenceLogprobs>>,
        reports: Reports,
    },
    Score {
        job: Job<Vec<SequenceScore>>,
        label: usize,
        steps: bool,
    },
    /// With what it uses of other runtimes, which must not be closed meanwhile.
    Rollout {
        job: RolloutJob,
        reports: Reports,
        others: Vec<Child>,
    },
}

/// What a request asked for beside the usual.
#[derive(Clone, Copy)]
pub struct Reports {
    pub top: bool,
    pub kept: bool,
}

impl Reports {
    pub fn of(request: &SampleRequest) -> Self {
        Reports { top: request.top_logprobs > 0, kept: request.kept_ids > 0 }
    }
}

impl Pending {
    fn watch(&self) -> Watch {
        match self {
            Pending::Sample { job, .. } => Watch::Job(job.watch()),
            Pending::Logprobs { job, .. } => Watch::Job(job.watch()),
            Pending::Score { job, .. } => Watch::Job(job.watch()),
            Pending::Rollout { job, .. } => Watch::Rollout(job.watch()),
        }
    }
}

/// A job in the table.
pub struct Entry {
    /// `None` once it was taken or dropped.
    pending: Mutex<Option<Pending>>,
    pub watch: Watch,
    pub tag: u64,
    /// Of a job that streams.
    pub flow: Option<Flow>,
    /// Its last event was told.
    pub told: AtomicBool,
}

/// Every job of a runtime that nobody has taken.
#[derive(Default)]
pub struct Jobs {
    entries: Mutex<HashMap<u64, Arc<Entry>>>,
    pub ready: Arc<Ready>,
}

impl Jobs {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn get(&self, job: u64) -> Option<Arc<Entry>> {
        self.lock().get(&job).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Entry>> {
        self.lock().values().cloned().collect()
    }

    /// Takes a job in and gives it a number.
    pub fn add(&self, pending: Pending, tag: u64, flow: Option<Flow>) -> u64 {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let watch = pending.watch();
        let entry =
            Entry { pending: Mutex::new(Some(pending)), watch: watch.clone(), tag, flow, told: AtomicBool::new(false) };
        self.lock().insert(id, Arc::new(entry));
        self.ready.enlist(id);
        let ready = self.ready.clone();
        // Only now, so that whoever is woken finds it in the table.
        watch.on_change(move || ready.mark(id));
        id
    }

    /// Takes a job out, if it is `fit` for that.
    fn remove(&self, id: u64, fit: impl FnOnce(&Entry) -> Outcome<()>) -> Outcome<Pending> {
        let mut entries = self.lock();
        let entry = entries.get(&id).ok_or_else(|| unknown(id))?;
        fit(entry)?;
        let entry = entries.remove(&id).ok_or_else(|| unknown(id))?;
        drop(entries);
        // Whoever marks it later marks nothing.
        self.ready.forget(id);
        let pending = entry.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        pending.ok_or_else(|| unknown(id))
    }
}

pub fn unknown(job: u64) -> Failure {
    Failure::new(E_NOT_FOUND, format!("{job} is no job, or was taken"))
}

pub fn same_runtime(runtime: &rrt_runtime, model: &rrt_model) -> Outcome<()> {
    if Arc::ptr_eq(&runtime.shared, &model.child.0) {
        return Ok(());
    }
    Err(Failure::new(E_ARG, "the model was loaded on another runtime"))
}

/// Submits a sampling request by `submit` and puts the job into the table.
pub fn queue_samples(
    shared: &Shared,
    request: &SampleRequest,
    tag: u64,
    submit: impl FnOnce(&SampleRequest) -> runtime::Result<Job<Vec<SampledSequence>>>,
) -> Outcome<u64> {
    let job = submit(request)?;
    let (_, answers) = job.progress();
    let flow = request.stream.then(|| Flow::new(answers, request.best_of.unwrap_or(request.n)));
    Ok(shared.jobs.add(Pending::Sample { job, reports: Reports::of(request) }, tag, flow))
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
        // SAFETY: the header's conditions on arrays and handles.
        let (prompts, request) = unsafe { (sequences(&req.prompts, "prompts")?, sample_request(&req)?) };
        let request = SampleRequest { prompts, ..request };
        let id = queue_samples(&runtime.shared, &request, req.user_tag, |request| model.model.sample(request))?;
        // SAFETY: not NULL.
        unsafe { job.write(id) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

fn submit_scores(model: &Model, scoring: Scoring) -> Outcome<Pending> {
    Ok(match scoring {
        Scoring::Logprobs(request) => {
            let reports = Reports { top: request.top_logprobs > 0, kept: false };
            Pending::Logprobs { job: model.logprobs(&request)?, reports }
        }
        Scoring::Reward(request, label) => {
            Pending::Score { job: model.score(&request)?, label, steps: request.steps.is_some() }
        }
    })
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
        // SAFETY: the header's conditions on arrays and handles.
        let scoring = unsafe { scoring(&req, &model.model) }?;
        let id = runtime.shared.jobs.add(submit_scores(&model.model, scoring)?, req.user_tag, None);
        // SAFETY: not NULL.
        unsafe { job.write(id) };
        Ok(())
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
        let is_done = |entry: &Entry| match entry.watch.is_done() {
            true => Ok(()),
            false => Err(Failure::new(PENDING, "the job is not done")),
        };
        let pending = runtime.shared.jobs.remove(job, is_done)?;
        let result = rrt_result::read(pending, Child::of(&runtime.shared))?;
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
        runtime.shared.jobs.get(job).ok_or_else(|| unknown(job))?.watch.cancel();
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_drop(runtime: *mut rrt_runtime, job: u64, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        // Dropping it cancels it.
        drop(runtime.shared.jobs.remove(job, |_| Ok(()))?);
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_job_progress(
    runtime: *mut rrt_runtime,
    job: u64,
    finished: *mut usize,
    total: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(finished, "finished")?;
        output(total, "total")?;
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        let (done, all) = runtime.shared.jobs.get(job).ok_or_else(|| unknown(job))?.watch.progress();
        // SAFETY: not NULL.
        unsafe {
            finished.write(done);
            total.write(all);
        }
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
