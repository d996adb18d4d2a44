//! `rewardrt rollout`

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rewardrt::{
    Error, ErrorKind, Group, Model, Reference, Result, Reward, Rollout, RolloutRequest, Rule, Runtime, SampledSequence,
};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::answer::Answer;
use crate::args;
use crate::record::{id_of, read};
use crate::sink::Sink;

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    answer: Answer<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ref_logprobs: Option<&'a [Option<f32>]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kl: Option<Value>,
    rewards: Map<String, Value>,
    reward: Value,
    advantage: f32,
    group: Value,
}

/// JSON has no NaN: what could not be scored is null.
fn number(value: f32) -> Value {
    if value.is_finite() { json!(value) } else { Value::Null }
}

fn group(group: &Group, index: usize) -> Value {
    let place = match group.best_and_worst {
        Some((best, _)) if best == index => json!("best"),
        Some((_, worst)) if worst == index => json!("worst"),
        _ => Value::Null,
    };
    json!({"mean": number(group.mean), "std": number(group.std), "zero_variance": group.zero_variance, "place": place})
}

fn line<'a>(prompts: &'a [(Value, Vec<u32>)], names: &[String], rollout: &'a Rollout, index: usize) -> Line<'a> {
    let answer: &SampledSequence = &rollout.samples[index];
    let kl = rollout.kl.get(index);
    Line {
        answer: Answer::new(&prompts[answer.prompt], answer, true),
        ref_logprobs: rollout.reference.as_ref().map(|r| r[index].logprobs.as_slice()),
        kl: kl.map(|kl| json!({"k1": kl.k1, "k2": kl.k2, "k3": kl.k3})),
        rewards: names.iter().cloned().zip(rollout.rewards.iter().map(|r| number(r[index]))).collect(),
        reward: number(rollout.reward[index]),
        advantage: rollout.advantages[index],
        group: group(&rollout.groups[answer.prompt], index),
    }
}

fn rewards(args: &args::Rollout, runtime: &Runtime, policy: &Model) -> Result<Vec<Reward>> {
    let (given, wanted) = (args.reward_weights.len(), args.reward.len());
    if given != 0 && given != wanted {
        let text = format!("--reward-weights has {given} numbers for {wanted} rewards");
        return Err(Error::new(ErrorKind::Argument, text));
    }
    let load = |(i, reward): (usize, &args::RewardArg)| {
        let model = loaded(args, runtime, policy, &reward.model)?;
        let folder = || reward.model.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let name = reward.name.clone().unwrap_or_else(folder);
        let is_judge = matches!(reward.rule, Some(Rule::Judge { .. }));
        Ok(Reward {
            weight: args.reward_weights.get(i).copied().unwrap_or(1.0),
            rule: reward.rule.clone(),
            question: args.question.clone().filter(|_| is_judge),
            ..Reward::new(name, model)
        })
    };
    args.reward.iter().enumerate().map(load).collect()
}

/// A judge or reference that is the policy's own folder is the policy: nothing changes it here.
fn loaded(args: &args::Rollout, runtime: &Runtime, policy: &Model, folder: &Path) -> Result<Model> {
    if folder == args.policy { Ok(policy.clone()) } else { args.loading.load(runtime, folder, args.loading.kv_tokens) }
}

pub fn run(args: &args::Rollout) -> Result<()> {
    let records = read(&args.prompts)?;
    let mut sample = args.sampling.request(args.n)?;
    let runtime = args.loading.open()?;
    let policy = args.loading.load(&runtime, &args.policy, args.loading.kv_tokens)?;
    sample.adapter = args.adapter.load(&policy)?;
    let mut prompts = Vec::new();
    let mut conversations = Vec::new();
    for (i, (place, record)) in records.iter().enumerate() {
        prompts.push((id_of(record, i), record.prompt(&policy).map_err(|e| e.at(place))?));
        conversations.push(record.conversation().unwrap_or_default());
    }
    sample.prompts = prompts.iter().map(|(_, ids)| ids.clone()).collect();
    let reference = match &args.reference {
        Some(folder) => Some(Reference::Model(loaded(args, &runtime, &policy, folder)?)),
        None => args.reference_base.then_some(Reference::Base),
    };
    let rewards = rewards(args, &runtime, &policy)?;
    let names: Vec<String> = rewards.iter().map(|r| r.name.clone()).collect();
    let request = RolloutRequest {
        sample,
        reference,
        rewards,
        advantage: args.advantage.into(),
        conversations,
        clip_reward: args.clip_reward,
    };
    let job = policy.rollout(&request)?;
    let bar = ProgressBar::new((prompts.len() * args.n) as u64);
    if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} answers, {elapsed} (left: {eta})") {
        bar.set_style(style);
    }
    while !job.wait_timeout(Duration::from_millis(100)) {
        bar.set_position(job.progress().0 as u64);
    }
    bar.finish_and_clear();
    let rollout = job.wait()?;
    let mut sink = Sink::open(args.loading.out.as_deref())?;
    for index in 0..rollout.samples.len() {
        sink.write(&line(&prompts, &names, &rollout, index))?;
    }
    report(&rollout);
    sink.finish()
}

/// For `--verbose`.
fn report(rollout: &Rollout) {
    let tokens: usize = rollout.samples.iter().map(|s| s.tokens.len()).sum();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let known = rollout.reward.iter().filter(|r| !r.is_nan()).map(|r| f64::from(*r)).collect();
    let k3 = rollout.kl.iter().flat_map(|kl| &kl.k3).map(|k| f64::from(*k)).collect();
    log::info!(
        "{} answers, {tokens} tokens: sampled in {:.2} s, all in {:.2} s; mean reward {:.4}, mean k3 {:.6}, {} of {} groups of zero variance",
        rollout.samples.len(),
        rollout.sampled_in.as_secs_f64(),
        rollout.elapsed.as_secs_f64(),
        mean(known),
        mean(k3),
        rollout.groups.iter().filter(|g| g.zero_variance).count(),
        rollout.groups.len()
    );
}
