//! rrt_rollout

use std::sync::Arc;

use runtime::{Advantage, Message, Reference, Reward, RolloutRequest, SampleRequest};

use crate::adapter::chosen;
use crate::boundary::{Outcome, elements, enter, input, null, only, output, reserved, text};
use crate::job::{Pending, Reports, same_runtime};
use crate::model::{live_model, rrt_model};
use crate::request::{bad, rule, sample_request, sequences};
use crate::runtime::{Child, open_runtime, rrt_runtime};
use crate::status::{E_ABI, Failure, rrt_error};
use crate::structs::{rrt_reward, rrt_rollout_req};
use crate::tokenizer::conversation;

const BASE_REFERENCE: u32 = 1;
const CLIP_REWARD: u32 = 2;
const STREAM: u32 = 2;
const MAX_REWARDS: usize = 256;

fn advantage(number: i32) -> Outcome<Advantage> {
    Ok(match number {
        0 => Advantage::Group,
        1 => Advantage::LeaveOneOut,
        2 => Advantage::Batch,
        3 => Advantage::None,
        4 => Advantage::Centred,
        other => return Err(bad(format!("advantage is {other}, it must be from 0 to 4"))),
    })
}

/// # Safety
/// The header's conditions on the handles and strings of rrt_reward.
unsafe fn reward(r: &rrt_reward, i: usize) -> Outcome<Reward> {
    only(r.flags, 0, "rrt_reward")?;
    // SAFETY: the caller's promise.
    unsafe {
        let mut reward = Reward::new(text(r.name, r.name_len, "name")?, live_model(r.model)?.model.clone());
        reward.weight = r.weight;
        reward.rule = rule(r.rule, r.rule_len)?;
        reward.label = r.label as usize;
        reward.adapter = chosen(r.adapter)?;
        if !r.question.is_null() {
            reward.question = Some(text(r.question, r.question_len, "question")?.to_owned());
        }
        if reward.name.is_empty() {
            reward.name = format!("reward {i}");
        }
        Ok(reward)
    }
}

/// # Safety
/// The header's condition on messages and message_offsets.
unsafe fn conversations(req: &rrt_rollout_req, prompts: usize) -> Outcome<Vec<Vec<Message>>> {
    if req.messages.is_null() {
        return Ok(Vec::new());
    }
    // SAFETY: the caller's promise.
    let offsets = unsafe { elements(req.message_offsets, prompts + 1, "message_offsets") }?;
    if offsets.windows(2).any(|w| w[0] > w[1]) {
        return Err(bad("message_offsets must not fall".into()));
    }
    let last = offsets[prompts].checked_mul(req.message_stride).filter(|bytes| isize::try_from(*bytes).is_ok());
    last.ok_or_else(|| bad(format!("message_offsets: {} messages do not fit in memory", offsets[prompts])))?;
    let of = |w: &[usize]| {
        // SAFETY: the caller's promise: messages reach to the last offset.
        unsafe { conversation(req.messages.byte_add(w[0] * req.message_stride), w[1] - w[0], req.message_stride) }
    };
    offsets.windows(2).map(of).collect()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_rollout(
    runtime: *mut rrt_runtime,
    req: *const rrt_rollout_req,
    job: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (runtime, req) = unsafe { (open_runtime(runtime)?, input(req)?) };
        output(job, "job")?;
        only(req.flags, BASE_REFERENCE | CLIP_REWARD, "rrt_rollout_req")?;
        reserved(req.reserved, "rrt_rollout_req")?;
        if req.sample.is_null() {
            return Err(null("sample"));
        }
        // SAFETY: the header's condition on structs.
        let sample = unsafe { input(req.sample) }?;
        if sample.flags & STREAM != 0 {
            return Err(bad("rrt_sample_req: a rollout does not stream".into()));
        }
        // SAFETY: the header's condition on handles.
        let policy = unsafe { live_model(sample.model) }?;
        same_runtime(runtime, policy)?;
        // SAFETY: the header's conditions on arrays and handles.
        let (prompts, sampling) = unsafe { (sequences(&sample.prompts, "prompts")?, sample_request(&sample)?) };
        // SAFETY: the header's condition on arrays.
        let conversations = unsafe { conversations(&req, prompts.len()) }?;
        let mut request = RolloutRequest::new(SampleRequest { prompts, ..sampling });
        request.conversations = conversations;
        request.advantage = advantage(req.advantage)?;
        request.clip_reward = (req.flags & CLIP_REWARD != 0).then_some((req.clip_low, req.clip_high));
        let mut others = Vec::new();
        let mut keep = |model: &rrt_model| {
            if !Arc::ptr_eq(&runtime.shared, &model.child.0) {
                others.push(Child::of(&model.child.0));
            }
        };
        let is_base = req.flags & BASE_REFERENCE != 0;
        if is_base && !req.reference.is_null() {
            return Err(bad("reference is set, and so is RRT_ROLLOUT_BASE_REFERENCE: choose one".into()));
        }
        if is_base {
            request.reference = Some(Reference::Base);
        } else if !req.reference.is_null() {
            // SAFETY: the header's condition on handles.
            let reference = unsafe { live_model(req.reference) }?;
            keep(reference);
            request.reference = Some(Reference::Model(reference.model.clone()));
        }
        if req.reward_count > MAX_REWARDS {
            return Err(bad(format!("reward_count is {}, at most {MAX_REWARDS} are allowed", req.reward_count)));
        }
        if req.reward_count > 0 && req.rewards.is_null() {
            return Err(null("rewards"));
        }
        if req.reward_count > 0 && req.reward_stride < size_of::<u32>() {
            return Err(Failure::new(E_ABI, format!("reward_stride is {}, that is no rrt_reward", req.reward_stride)));
        }
        for i in 0..req.reward_count {
            // SAFETY: the caller's array of `reward_count` structs, `reward_stride` bytes apart.
            let given = unsafe { input(req.rewards.byte_add(i * req.reward_stride)) }?;
            // SAFETY: the header's conditions on handles and strings.
            unsafe {
                request.rewards.push(reward(&given, i)?);
                keep(live_model(given.model)?);
            }
        }
        let reports = Reports::of(&request.sample);
        let pending = Pending::Rollout { job: policy.model.rollout(&request)?, reports, others };
        let id = runtime.shared.jobs.add(pending, sample.user_tag, None);
        // SAFETY: not NULL.
        unsafe { job.write(id) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
