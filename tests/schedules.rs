//! Random schedules: whatever the engine has to do beside it, a request returns the same bits.
//!
//! Each round takes a model with a row budget, a cache and threads, throws requests at it in random order and company
//! (jobs of other priorities, cancelled ones, scoring ones, sessions, guesses ahead), and compares with what every
//! request returns alone on a fresh model.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;

use common::{devices, load, open, small};
use rewardrt::{
    Job, LogprobRequest, Model, ModelOptions, SampleRequest, SampledSequence, SampledToken, Scheduling, ScoreRequest,
};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for i in (1..list.len()).rev() {
            list.swap(i, self.below(i + 1));
        }
    }
}

/// Prompts that share beginnings of all lengths, some beyond a chunk of keys, some with repetition to guess from.
fn prompt(i: usize) -> Vec<u32> {
    let shared = [0, 5, 16, 31, 32, 40][i % 6];
    let own = 1 + i * 7 % 30 + if i % 8 == 5 { 40 } else { 0 };
    let common = (0..shared).map(|k| (6 + k * 13 % 90) as u32);
    let pattern = (0..own).map(|k| (6 + (i * 31 + k % (3 + i % 9) * 17) % 90) as u32);
    common.chain(pattern).collect()
}

/// The i-th request: a prompt with its own stream, one to three samples, and one of many mixes of controls.
fn request(i: usize) -> SampleRequest {
    let base = SampleRequest {
        prompts: vec![prompt(i)],
        streams: vec![i as u64],
        n: 1 + i % 3,
        max_tokens: 4 + i * 5 % 19,
        seed: 7,
        ignore_eos: true,
        ..SampleRequest::default()
    };
    match i % 7 {
        0 => base,
        1 => SampleRequest { temperature: 0.7, top_k: 12, top_p: 0.9, kept_ids: 12, ..base },
        2 => SampleRequest { temperature: 1.3, min_p: 0.05, repetition_penalty: 1.2, top_logprobs: 2, ..base },
        3 => SampleRequest { typical_p: 0.8, presence_penalty: 0.5, frequency_penalty: 0.25, ..base },
        // So few tokens that guesses are often right.
        4 => SampleRequest { temperature: 0.0, allowed_ids: Some(vec![10, 11, 12]), ..base },
        5 => SampleRequest {
            logit_bias: vec![(40, 2.0), (50, f32::NEG_INFINITY), (60, -1.0)],
            banned_ids: vec![7, 8, 9],
            top_p: 0.95,
            ..base
        },
        _ => SampleRequest {
            allowed_ids: Some((10..60).collect()),
            stop_ids: vec![20, 30],
            min_tokens: 3,
            temperature: 0.9,
            ..base
        },
    }
}

const REQUESTS: usize = 28;

type Tokens = Vec<Vec<SampledToken>>;

fn tokens(answers: Vec<SampledSequence>) -> Tokens {
    answers.into_iter().map(|a| a.tokens).collect()
}

/// What every request returns alone, with nothing in the cache.
fn alone(device: &str, name: &str) -> Vec<Tokens> {
    let runtime = open(device, 2);
    let options = ModelOptions { steps_at_once: Some(1), ..small() };
    let run = |i| tokens(load(&runtime, name, &options).sample(&request(i)).unwrap().wait().unwrap());
    (0..REQUESTS).map(run).collect()
}

/// Company that must not matter.
fn noise(model: &Model, random: &mut Random) -> (Job<Vec<SampledSequence>>, bool) {
    let priority = random.below(3) as i32 - 1;
    let request = SampleRequest {
        prompts: (0..1 + random.below(4)).map(|_| prompt(random.below(60))).collect(),
        n: 1 + random.below(6),
        max_tokens: 1 + random.below(20),
        seed: random.below(1000) as u64,
        scheduling: Scheduling { priority, deadline: None },
        ..SampleRequest::default()
    };
    (model.sample(&request).unwrap(), random.below(2) == 0)
}

fn round(model: &Model, what: &str, expected: &[Tokens], random: &mut Random, count: usize) {
    let mut order: Vec<usize> = (0..REQUESTS).collect();
    random.shuffle(&mut order);
    order.truncate(count);
    let (mut jobs, mut others, mut scored) = (Vec::new(), Vec::new(), Vec::new());
    for &i in &order {
        if random.below(2) == 0 {
            others.push(noise(model, random));
        }
        if random.below(4) == 0 {
            let texts = LogprobRequest { sequences: vec![prompt(random.below(60))], ..LogprobRequest::default() };
            scored.push(model.logprobs(&texts).unwrap());
        }
        let scheduling = Scheduling { priority: random.below(3) as i32 - 1, deadline: None };
        let asked = SampleRequest { speculate: [0, 4, 16][random.below(3)], scheduling, ..request(i) };
        if asked.n == 1 && random.below(3) == 0 {
            // The same as a session of two turns from outside, and a fork of it.
            let (first, second) = asked.prompts[0].split_at(random.below(asked.prompts[0].len()));
            let session = model.session(first).unwrap();
            session.append(second).unwrap();
            let fork = session.fork().unwrap();
            let turn = SampleRequest { prompts: Vec::new(), ..asked };
            jobs.push((i, session.sample(&turn).unwrap()));
            jobs.push((i, fork.sample(&turn).unwrap()));
        } else {
            jobs.push((i, model.sample(&asked).unwrap()));
        }
        if let Some((job, true)) = others.last() {
            job.cancel();
        }
    }
    for (i, job) in jobs {
        assert_eq!(tokens(job.wait().unwrap()), expected[i], "{what}: request {i}");
    }
    others.into_iter().for_each(|(job, _)| drop(job.wait().unwrap()));
    scored.into_iter().for_each(|job| drop(job.wait().unwrap()));
}

#[test]
fn a_request_does_not_see_the_schedule() {
    let mut random = Random(11);
    for device in devices() {
        let is_cpu = device == "cpu";
        for name in ["llama-gqa-9-3", "mistral-window"] {
            let expected = alone(&device, name);
            // A cache of 144 positions holds the longest sequence and not much else.
            for (rows, kv, threads, steps) in [
                (7, 4096, 2, 8),
                (64, 144, 2, 3),
                (4096, 4096, 2, 64),
                (1, 4096, 1, 1),
                (1024, 144, 1, 8),
                (64, 400, 2, 8),
            ] {
                let options = ModelOptions {
                    max_batch_tokens: Some(rows),
                    kv_tokens: Some(kv),
                    steps_at_once: Some(steps),
                    ..small()
                };
                let model = load(&open(&device, threads), name, &options);
                for turn in 0..if is_cpu { 4 } else { 1 } {
                    let what = format!("{device} {name}, {rows} rows, {kv} positions, round {turn}");
                    round(&model, &what, &expected, &mut random, if is_cpu { REQUESTS } else { 12 });
                }
                let stats = model.stats();
                assert_eq!((stats.jobs, stats.running, stats.waiting, stats.kv_used), (0, 0, 0, 0), "{stats:?}");
                if kv == 144 && is_cpu {
                    assert!(stats.preemptions > 0 && stats.kv_evictions > 0, "nothing had to make room: {stats:?}");
                }
                if is_cpu {
                    assert!(stats.rows.cached > 0 && stats.kv_copies > 0, "{stats:?}");
                    assert!(rows < 64 || stats.rows.accepted > 0, "few rows leave none for guesses: {stats:?}");
                }
            }
        }
    }
}

/// Guesses are checked in the same arithmetic as single steps: the same bits, fewer steps where the text repeats.
#[test]
fn guesses_change_nothing_but_the_steps() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-wide", &small());
        let repeats: Vec<u32> = (0..60).map(|k| 6 + k % 5).collect();
        // A bias that makes it go on repeating.
        let base = SampleRequest {
            prompts: vec![repeats],
            max_tokens: 40,
            logit_bias: (6..11).map(|t| (t, 12.0)).collect(),
            temperature: 0.3,
            ignore_eos: true,
            ..SampleRequest::default()
        };
        let before = model.stats();
        let plain = model.sample(&base).unwrap().wait().unwrap();
        let middle = model.stats();
        let job = model.sample(&SampleRequest { speculate: 8, ..base }).unwrap();
        while !job.wait_timeout(std::time::Duration::from_secs(60)) {}
        let stats = job.stats();
        assert_eq!(tokens(job.wait().unwrap()), tokens(plain), "{device}");
        let (plain_steps, steps) = (middle.steps - before.steps, model.stats().steps - middle.steps);
        println!("{device}: {plain_steps} steps alone, {steps} with guesses: {stats:?}");
        assert!(stats.rows.accepted > 0 && steps < plain_steps, "{device}: {stats:?}");
        assert_eq!(stats.sampled_tokens, 40);
    }
}

/// What sampling computed is what scoring finds, and the other way round.
#[test]
fn scores_do_not_see_the_cache() {
    for device in devices() {
        let model = load(&open(&device, 2), "llama-labels-3", &ModelOptions { kv_tokens: Some(200), ..small() });
        let fresh = load(&open(&device, 2), "llama-labels-3", &small());
        let sequences: Vec<_> = (0..40).map(prompt).collect();
        let score = |model: &Model, sequences: Vec<Vec<u32>>| {
            let request = ScoreRequest { sequences, ..ScoreRequest::default() };
            model.score(&request).unwrap().wait().unwrap()
        };
        let expected: Vec<_> = sequences.iter().flat_map(|s| score(&fresh, vec![s.clone()])).collect();
        for _ in 0..3 {
            assert_eq!(score(&model, sequences.clone()), expected, "{device}");
        }
        assert!(model.stats().rows.cached > 0);
    }
}
