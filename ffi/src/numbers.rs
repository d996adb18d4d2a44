//! rrt_model_memory, rrt_memory_stats, rrt_model_timing, rrt_timing_stats, rrt_stats_reset, rrt_trim

use std::time::Duration;

use runtime::Model;

use crate::boundary::{Sized32, enter, reference, write};
use crate::model::rrt_model;
use crate::runtime::{open_runtime, rrt_runtime};
use crate::status::rrt_error;
use crate::structs::{rrt_memory, rrt_timing};

/// Nanoseconds; more than 584 years are not told apart.
pub fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl rrt_memory {
    fn add(&mut self, model: &Model) {
        let memory = model.memory();
        self.models += 1;
        self.allocated += memory.allocated();
        self.mapped += memory.mapped;
        self.weights += memory.weights;
        self.kv_cache += memory.kv_cache;
        self.scratch += memory.scratch;
        self.host += memory.host;
        self.adapters += memory.adapters;
        self.budget = self.budget.saturating_add(model.memory_budget().unwrap_or(u64::MAX));
    }
}

impl rrt_timing {
    fn add(&mut self, model: &Model) {
        let stats = model.stats();
        self.steps += stats.steps;
        self.step_ns += nanoseconds(stats.step_time);
        self.prefill_rows += stats.rows.prefill;
        self.decode_rows += stats.rows.decode;
        self.drafted_rows += stats.rows.drafted;
        self.accepted_rows += stats.rows.accepted;
        self.recomputed_rows += stats.rows.recomputed;
        self.cached_rows += stats.rows.cached;
        self.sampled_tokens += stats.sampled_tokens;
        self.preemptions += stats.preemptions;
        self.longest_wait_ns = self.longest_wait_ns.max(nanoseconds(stats.longest_wait));
        self.kv_evictions += stats.kv_evictions;
        self.kv_copies += stats.kv_copies;
        self.jobs += stats.jobs as u64;
        self.running += stats.running as u64;
        self.waiting += stats.waiting as u64;
        self.kv_blocks += stats.kv_blocks as u64;
        self.kv_used += stats.kv_used as u64;
        self.kv_cached += stats.kv_cached as u64;
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_memory(model: *const rrt_model, out: *mut rrt_memory, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = unsafe { reference(model, "model") }?;
        model.child.0.owner.check_process()?;
        let mut memory = rrt_memory::initial();
        memory.add(&model.model);
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &memory) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_memory_stats(
    runtime: *const rrt_runtime,
    out: *mut rrt_memory,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        let mut memory = rrt_memory::initial();
        runtime.runtime.models().iter().for_each(|model| memory.add(model));
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &memory) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_timing(model: *const rrt_model, out: *mut rrt_timing, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = unsafe { reference(model, "model") }?;
        model.child.0.owner.check_process()?;
        let mut timing = rrt_timing::initial();
        timing.add(&model.model);
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &timing) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_timing_stats(
    runtime: *const rrt_runtime,
    out: *mut rrt_timing,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = &unsafe { open_runtime(runtime) }?.runtime;
        let mut timing = rrt_timing::initial();
        runtime.models().iter().for_each(|model| timing.add(model));
        let stats = runtime.stats();
        timing.submitted = stats.submitted;
        timing.refused = stats.refused;
        timing.jobs = stats.jobs as u64;
        timing.queued_tokens = stats.queued_tokens as u64;
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &timing) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_stats_reset(runtime: *mut rrt_runtime, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        Ok(unsafe { open_runtime(runtime) }?.runtime.reset_stats()?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_trim(runtime: *mut rrt_runtime, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let models = unsafe { open_runtime(runtime) }?.runtime.models();
        // One that fails keeps none of the others from giving back what it can.
        let failed: Vec<_> = models.iter().filter_map(|model| model.trim().err()).collect();
        failed.into_iter().next().map_or(Ok(()), |first| Err(first.into()))
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
