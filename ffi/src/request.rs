//! rrt_sample_req and rrt_score_req as requests of the library.

use std::time::Duration;

use runtime::{Guide, LogprobRequest, Model, RequestLimits, Rule, SampleRequest, Scheduling, ScoreRequest, Steps};

use crate::adapter::chosen;
use crate::boundary::{Outcome, elements, null, only, pieces, reserved, strings, text};
use crate::status::{E_ARG, Failure};
use crate::structs::{rrt_sample_req, rrt_score_req, rrt_sequences};

const IGNORE_EOS: u32 = 1;
const STREAM: u32 = 2;
const REWARD: i32 = 1;
const LOGPROBS: i32 = 2;
const STEP_REWARDS: i32 = 3;

pub fn bad(message: String) -> Failure {
    Failure::new(E_ARG, message)
}

/// # Safety
/// The header's condition on rrt_sequences.
pub unsafe fn sequences(s: &rrt_sequences, what: &str) -> Outcome<Vec<Vec<u32>>> {
    if s.count == 0 {
        return Err(bad(format!("{what}: there are none")));
    }
    if s.count > runtime::MAX_SEQUENCES {
        return Err(bad(format!("{what}: {} sequences, at most {}", s.count, runtime::MAX_SEQUENCES)));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { pieces(s.ids, s.offsets, s.count, what) }?.map(<[u32]>::to_vec).collect())
}

fn scheduling(priority: i32, deadline_ns: u64) -> Scheduling {
    Scheduling { priority, deadline: (deadline_ns > 0).then(|| Duration::from_nanos(deadline_ns)) }
}

/// The request but for its prompts.
///
/// # Safety
/// The header's conditions on the arrays and handles of rrt_sample_req.
pub unsafe fn sample_request(req: &rrt_sample_req) -> Outcome<SampleRequest> {
    only(req.flags, IGNORE_EOS | STREAM, "rrt_sample_req")?;
    reserved(req.reserved, "rrt_sample_req")?;
    let most = RequestLimits::get().stops;
    // SAFETY: the caller's promise.
    unsafe {
        let streams = if req.streams.is_null() { &[] } else { elements(req.streams, req.prompts.count, "streams")? };
        let bias_ids = elements(req.bias_ids, req.bias_count, "bias_ids")?;
        let bias = elements(req.bias, req.bias_count, "bias")?;
        let allowed = || elements(req.allowed_ids, req.allowed_count, "allowed_ids");
        if req.allowed_ids.is_null() && req.allowed_count > 0 {
            return Err(null("allowed_ids"));
        }
        Ok(SampleRequest {
            prompts: Vec::new(),
            n: req.n_samples as usize,
            max_tokens: req.max_new_tokens as usize,
            temperature: req.temperature,
            top_k: req.top_k as usize,
            top_p: req.top_p,
            min_p: req.min_p,
            typical_p: req.typical_p,
            repetition_penalty: req.repetition_penalty,
            presence_penalty: req.presence_penalty,
            frequency_penalty: req.frequency_penalty,
            logit_bias: bias_ids.iter().copied().zip(bias.iter().copied()).collect(),
            banned_ids: elements(req.banned_ids, req.banned_count, "banned_ids")?.to_vec(),
            allowed_ids: if req.allowed_ids.is_null() { None } else { Some(allowed()?.to_vec()) },
            guide: guide(req)?,
            seed: req.seed,
            streams: streams.to_vec(),
            stop: strings(req.stop_text, req.stop_offsets, req.stop_count, "stop strings", most)?,
            stop_ids: elements(req.stop_ids, req.stop_id_count, "stop_ids")?.to_vec(),
            ignore_eos: req.flags & IGNORE_EOS != 0,
            min_tokens: req.min_new_tokens as usize,
            best_of: (req.best_of > 0).then_some(req.best_of as usize),
            top_logprobs: req.top_logprobs as usize,
            kept_ids: req.kept_ids as usize,
            speculate: req.speculate as usize,
            stream: req.flags & STREAM != 0,
            adapter: chosen(req.adapter)?,
            scheduling: scheduling(req.priority, req.deadline_ns),
        })
    }
}

/// # Safety
/// The header's condition on the strings of rrt_sample_req.
unsafe fn guide(req: &rrt_sample_req) -> Outcome<Option<Guide>> {
    /// Choices of a guide; their text is bounded by `guide_bytes`.
    const MAX_CHOICES: usize = 1 << 16;
    if req.guide_kind == 0 {
        return match req.guide.is_null() && req.choice_count == 0 {
            true => Ok(None),
            false => Err(bad("guide is set, but guide_kind is RRT_GUIDE_NONE".into())),
        };
    }
    // SAFETY: the caller's promise.
    let source = || unsafe { text(req.guide, req.guide_len, "guide") }.map(str::to_owned);
    if req.guide_kind != 4 && req.choice_count > 0 {
        return Err(bad(format!("choice_count is {}, but guide_kind is not RRT_GUIDE_CHOICES", req.choice_count)));
    }
    Ok(Some(match req.guide_kind {
        1 => Guide::JsonSchema(source()?),
        2 => Guide::Regex(source()?),
        3 => Guide::Grammar(source()?),
        4 => {
            // SAFETY: the caller's promise.
            let list = unsafe { strings(req.guide, req.choice_offsets, req.choice_count, "choices", MAX_CHOICES) }?;
            Guide::choices(&list)?
        }
        other => return Err(bad(format!("guide_kind is {other}, it must be from 0 to 4"))),
    }))
}

/// # Safety
/// The header's condition on strings.
pub unsafe fn rule(p: *const std::ffi::c_char, len: usize) -> Outcome<Option<Rule>> {
    if p.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    Ok(Some(Rule::parse(unsafe { text(p, len, "rule") }?)?))
}

/// What a scoring job is.
pub enum Scoring {
    Logprobs(LogprobRequest),
    /// And the label that is the sequence's score.
    Reward(ScoreRequest, usize),
}

/// # Safety
/// The header's conditions on the arrays and handles of rrt_score_req.
pub unsafe fn scoring(req: &rrt_score_req, model: &Model) -> Outcome<Scoring> {
    only(req.flags, 0, "rrt_score_req")?;
    reserved(req.reserved, "rrt_score_req")?;
    // SAFETY: the caller's promise.
    let (sequences, adapter) = unsafe { (sequences(&req.sequences, "sequences")?, chosen(req.adapter)?) };
    let prompt_lens = if req.prompt_lens.is_null() {
        Vec::new()
    } else {
        // SAFETY: the caller's promise.
        unsafe { elements(req.prompt_lens, sequences.len(), "prompt_lens") }?.to_vec()
    };
    let scheduling = scheduling(req.priority, req.deadline_ns);
    let has_positions = !req.positions.is_null() || !req.position_offsets.is_null();
    let unused = |set: bool, field: &str, kind: &str| match set {
        true => Err(bad(format!("{field} is set, but {kind} has no use for it"))),
        false => Ok(()),
    };
    match req.kind {
        LOGPROBS => {
            unused(!req.rule.is_null(), "rule", "RRT_SCORE_LOGPROBS")?;
            unused(has_positions, "positions", "RRT_SCORE_LOGPROBS")?;
            unused(req.label != 0, "label", "RRT_SCORE_LOGPROBS")?;
            let top_logprobs = req.top_logprobs as usize;
            return Ok(Scoring::Logprobs(LogprobRequest { sequences, prompt_lens, top_logprobs, adapter, scheduling }));
        }
        REWARD | STEP_REWARDS => unused(req.top_logprobs != 0, "top_logprobs", "a reward")?,
        other => return Err(bad(format!("kind is {other}, it must be {REWARD}, {LOGPROBS} or {STEP_REWARDS}"))),
    }
    let steps = if req.kind == REWARD {
        unused(has_positions, "positions", "RRT_SCORE_REWARD")?;
        unused(!prompt_lens.is_empty(), "prompt_lens", "RRT_SCORE_REWARD")?;
        None
    } else if has_positions {
        unused(!prompt_lens.is_empty(), "prompt_lens", "RRT_SCORE_STEP_REWARDS with positions")?;
        // SAFETY: the caller's promise.
        let places = unsafe { pieces(req.positions, req.position_offsets, sequences.len(), "positions") }?;
        Some(Steps::At(places.map(<[usize]>::to_vec).collect()))
    } else {
        Some(Steps::After { id: req.step_id, prompt_lens })
    };
    // SAFETY: the caller's promise.
    let rule = match unsafe { rule(req.rule, req.rule_len) }? {
        Some(rule) => rule,
        None => Rule::for_model(model.spec())?,
    };
    let (label, labels) = (req.label as usize, model.rule_labels(&rule)?);
    if label >= labels.len() {
        return Err(bad(format!("label is {label}, the rule has {} labels: {labels:?}", labels.len())));
    }
    Ok(Scoring::Reward(ScoreRequest { sequences, rule: Some(rule), steps, adapter, scheduling }, label))
}
