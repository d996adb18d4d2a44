//! `rewardrt rollout`

use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use rewardrt::{Error, ErrorKind, Model, Reference, Result, Reward, Rollout, RolloutRequest, Runtime, SampledSequence};
use serde::{Serialize, Serializer};
use serde_json::Value;

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
    kl: Option<KlLine<'a>>,
    #[serde(serialize_with = "as_object")]
    rewards: Vec<(&'a str, f32)>,
    /// JSON has no NaN: what has no reward has null.
    reward: f32,
    advantage: f32,
    group: GroupLine,
}

#[derive(Serialize)]
struct KlLine<'a> {
    k1: &'a [f32],
    k2: &'a [f32],
    k3: &'a [f32],
}

#[derive(Serialize)]
struct GroupLine {
    mean: f32,
    std: f32,
    zero_variance: bool,
    place: Option<&'static str>,
}

/// In their order.
fn as_object<S: Serializer>(pairs: &[(&str, f32)], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_map(pairs.iter().copied())
}

fn line<'a>(prompts: &'a [(Value, Vec<u32>)], names: &'a [String], rollout: &'a Rollout, index: usize) -> Line<'a> {
    let answer: &SampledSequence = &rollout.samples[index];
    let group = &rollout.groups[answer.prompt];
    let place = group.best_and_worst.and_then(|(best, worst)| match index {
        _ if index == best => Some("best"),
        _ if index == worst => Some("worst"),
        _ => None,
    });
    Line {
        answer: Answer::new(&prompts[answer.prompt], answer).with_entropy(answer),
        ref_logprobs: rollout.reference.as_ref().map(|r| r[index].logprobs.as_slice()),
        kl: rollout.kl.get(index).map(|kl| KlLine { k1: &kl.k1, k2: &kl.k2, k3: &kl.k3 }),
        rewards: names.iter().zip(&rollout.rewards).map(|(name, values)| (name.as_str(), values[index])).collect(),
        reward: rollout.reward[index],
        advantage: rollout.advantages[index],
        group: GroupLine { mean: group.mean, std: group.std, zero_variance: group.zero_variance, place },
    }
}

/// What is wrong with the flags alone is said before a model is loaded.
fn check(args: &args::Rollout) -> Result<()> {
    let wrong = |text: String| Err(Error::new(ErrorKind::Argument, text));
    let (given, wanted) = (args.reward_weights.len(), args.reward.len());
    if given != 0 && given != wanted {
        return wrong(format!("--reward-weights has {given} numbers for {wanted} rewards"));
    }
    let names: Vec<String> = args.reward.iter().map(args::RewardArg::name).collect();
    if let Some(i) = (1..names.len()).find(|&i| names[..i].contains(&names[i])) {
        return wrong(format!("two rewards are called {:?}: name one with --reward NAME=MODEL", names[i]));
    }
    if args.question.is_some() && !args.reward.iter().any(args::RewardArg::is_judge) {
        return wrong("--question is for judges, and no --reward has the rule judge".into());
    }
    Ok(())
}

fn rewards(args: &args::Rollout, runtime: &Runtime, policy: &Model) -> Result<Vec<Reward>> {
    let load = |(i, reward): (usize, &args::RewardArg)| {
        let model = loaded(args, runtime, policy, &reward.model)?;
        Ok(Reward {
            weight: args.reward_weights.get(i).copied().unwrap_or(1.0),
            rule: reward.rule.clone(),
            question: args.question.clone().filter(|_| reward.is_judge()),
            ..Reward::new(reward.name(), model)
        })
    };
    args.reward.iter().enumerate().map(load).collect()
}

/// A judge or reference that is the policy's own folder is the policy: nothing changes it here.
fn loaded(args: &args::Rollout, runtime: &Runtime, policy: &Model, folder: &Path) -> Result<Model> {
    if folder == args.policy { Ok(policy.clone()) } else { args.loading.load(runtime, folder, args.loading.kv_tokens) }
}

pub fn run(args: &args::Rollout) -> Result<()> {
    check(args)?;
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
    let mut sink = Sink::open(args.out.as_deref())?;
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
    for index in 0..rollout.samples.len() {
        sink.write(&line(&prompts, &names, &rollout, index))?;
    }
    report(&rollout);
    sink.finish()
}

/// For `--verbose`.
fn report(rollout: &Rollout) {
    let mean = |values: Vec<f32>| match values.len() {
        0 => "none".to_owned(),
        n => format!("{:.6}", values.into_iter().map(f64::from).sum::<f64>() / n as f64),
    };
    log::info!(
        "{} answers, {} tokens: sampled in {:.2} s, all in {:.2} s; mean reward {}, mean k3 {}, {} of {} groups of zero variance",
        rollout.samples.len(),
        rollout.samples.iter().map(|s| s.tokens.len()).sum::<usize>(),
        rollout.sampled_in.as_secs_f64(),
        rollout.elapsed.as_secs_f64(),
        mean(rollout.reward.iter().copied().filter(|r| !r.is_nan()).collect()),
        mean(rollout.kl.iter().flat_map(|kl| &kl.k3).copied().collect()),
        rollout.groups.iter().filter(|g| g.zero_variance).count(),
        rollout.groups.len()
    );
}
