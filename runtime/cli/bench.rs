//! `rewardrt bench`: what sampling and scoring cost on this device, in all and kernel by kernel.
//!
//! The ids are random and new for every run, so that no prompt is found in the KV cache. The first run of each job warms up
//! and is not counted.

use std::time::Instant;

use rewardrt::model::{Head, Plan};
use rewardrt::{
    Adapter, AdapterOptions, Error, ErrorKind, KernelTime, Limits, LogprobRequest, Model, Result, Runtime,
    SampleRequest, SampledSequence, ScoreRequest,
};
use serde::Serialize;

use crate::args::{Bench, PrecisionArg, WeightsArg};
use crate::sink::{Sink, print_line};
use crate::synth::{mix, write_adapter};

#[derive(Clone, Copy)]
enum Job {
    /// New tokens after each prompt.
    Decode { sequences: usize, prompt: usize, tokens: usize },
    /// Log-probabilities of given tokens.
    Logprobs { sequences: usize, tokens: usize },
    /// Scores by the checkpoint's head.
    Score { sequences: usize, tokens: usize },
}

/// One run of a job.
#[derive(Clone, Copy)]
struct Run {
    seconds: f64,
    steps: u64,
    /// Tokens that count: new ones, or given ones.
    tokens: usize,
    /// Milliseconds of a step of decoding, without the prompts.
    step_ms: Option<f64>,
}

#[derive(Serialize)]
struct Line<'a> {
    job: &'static str,
    sequences: usize,
    /// Of each prompt; null where there is none.
    prompt_tokens: Option<usize>,
    /// Of each sequence: new ones when decoding, given ones otherwise.
    tokens: usize,
    tokens_per_second: f64,
    seconds: f64,
    steps: u64,
    step_ms: Option<f64>,
    /// LoRA adapters that the sequences share.
    adapters: usize,
    /// Milliseconds that replacing one takes; null without.
    swap_ms: Option<f64>,
    /// Of the run whose kernels are listed; timing them costs some.
    profile_seconds: Option<f64>,
    kernels: Vec<Kernel>,
    limits: Option<LimitsLine>,
    precision: &'static str,
    weights: &'static str,
    device: &'a str,
    model: String,
}

#[derive(Serialize)]
struct Kernel {
    name: String,
    calls: u64,
    ms: f64,
    bytes: u64,
    flops: u64,
}

#[derive(Clone, Copy, Serialize)]
struct LimitsLine {
    bytes_per_second: f64,
    flops: f64,
}

impl Job {
    fn name(self) -> &'static str {
        match self {
            Job::Decode { .. } => "decode",
            Job::Logprobs { .. } => "logprobs",
            Job::Score { .. } => "score",
        }
    }

    fn sequences(self) -> usize {
        match self {
            Job::Decode { sequences, .. } | Job::Logprobs { sequences, .. } | Job::Score { sequences, .. } => sequences,
        }
    }

    /// Tokens that are given for each sequence.
    fn given(self) -> usize {
        match self {
            Job::Decode { prompt, .. } => prompt,
            Job::Logprobs { tokens, .. } | Job::Score { tokens, .. } => tokens,
        }
    }

    /// Positions in the KV cache that let all sequences run at a time: whole blocks of 16, and what admission holds back.
    fn kv_tokens(self) -> usize {
        let tokens = match self {
            Job::Decode { tokens, .. } => tokens,
            _ => 0,
        };
        let blocks = self.given().saturating_add(tokens).div_ceil(16).saturating_add(1);
        blocks.saturating_mul(self.sequences()).saturating_mul(16)
    }

    /// Runs it on random ids, which the adapters share if there are any; another `number` has others.
    fn run(self, model: &Model, adapters: &[Adapter], number: u64) -> Result<Run> {
        let vocab = model.spec().vocab_size as u64;
        let mut next = mix(number);
        let mut id = || {
            next = next.wrapping_add(1);
            (mix(next) % vocab) as u32
        };
        let ids: Vec<Vec<u32>> = (0..self.sequences()).map(|_| (0..self.given()).map(|_| id()).collect()).collect();
        let given = ids.iter().map(Vec::len).sum();
        // A request has one adapter.
        let share = ids.len().div_ceil(adapters.len().max(1));
        let parts: Vec<(Vec<Vec<u32>>, Option<Adapter>)> =
            ids.chunks(share).enumerate().map(|(i, ids)| (ids.to_vec(), adapters.get(i).cloned())).collect();
        let steps = model.stats().steps;
        let start = Instant::now();
        let (tokens, step_ms) = match self {
            Job::Decode { tokens, .. } => {
                let jobs = submit(parts, |prompts, adapter| {
                    model.sample(&SampleRequest {
                        prompts,
                        max_tokens: tokens,
                        ignore_eos: true,
                        seed: number,
                        adapter,
                        ..SampleRequest::default()
                    })
                })?;
                let answers = wait(jobs)?;
                (answers.iter().map(|a| a.tokens.len()).sum(), step_ms(&answers))
            }
            Job::Logprobs { .. } => {
                wait(submit(parts, |sequences, adapter| {
                    model.logprobs(&LogprobRequest { sequences, adapter, ..LogprobRequest::default() })
                })?)?;
                (given, None)
            }
            Job::Score { .. } => {
                wait(submit(parts, |sequences, adapter| {
                    model.score(&ScoreRequest { sequences, adapter, ..ScoreRequest::default() })
                })?)?;
                (given, None)
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        Ok(Run { seconds, steps: model.stats().steps - steps, tokens, step_ms })
    }
}

fn submit<T>(
    parts: Vec<(Vec<Vec<u32>>, Option<Adapter>)>,
    one: impl Fn(Vec<Vec<u32>>, Option<Adapter>) -> Result<rewardrt::Job<T>>,
) -> Result<Vec<rewardrt::Job<T>>> {
    parts.into_iter().map(|(ids, adapter)| one(ids, adapter)).collect()
}

fn wait<T>(jobs: Vec<rewardrt::Job<Vec<T>>>) -> Result<Vec<T>> {
    let mut all = Vec::new();
    for job in jobs {
        all.extend(job.wait()?);
    }
    Ok(all)
}

/// Random adapters, and the milliseconds that putting another one in the place of the first takes: the median of nine.
fn adapters(model: &Model, args: &Bench) -> Result<(Vec<Adapter>, f64)> {
    let plan = Plan::new(model.spec())?;
    let folder = std::env::temp_dir().join(format!("rewardrt-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(|e| Error::new(ErrorKind::Io, format!("{}: {e}", folder.display())))?;
    let made = (0..args.adapters as u64).map(|seed| {
        // Its values are in memory once it is loaded.
        let here = folder.join(seed.to_string());
        std::fs::create_dir_all(&here).map_err(|e| Error::new(ErrorKind::Io, format!("{}: {e}", here.display())))?;
        write_adapter(&here, &plan, args.adapter_rank, seed)?;
        model.load_adapter(&here, &AdapterOptions::default())
    });
    let made = made.collect::<Result<Vec<Adapter>>>();
    let times = made.and_then(|made| {
        let mut times = Vec::new();
        for i in 0..9 {
            let start = Instant::now();
            made[0].replace(&folder.join((i % made.len()).to_string()), i as u64)?;
            times.push(1e3 * start.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        Ok((made, times[4]))
    });
    // What is left behind is the system's to clean.
    let _ = std::fs::remove_dir_all(&folder);
    times
}

/// Of the sequence that decoded fastest: the last one to begin, whose steps had no prompts in them.
fn step_ms(answers: &[SampledSequence]) -> Option<f64> {
    let of = |a: &SampledSequence| {
        let steps = a.tokens.len().checked_sub(1).filter(|n| *n > 0)?;
        Some(1e3 * a.timing.decode.as_secs_f64() / steps as f64)
    };
    answers.iter().filter_map(of).min_by(f64::total_cmp)
}

fn argument(message: String) -> Error {
    Error::new(ErrorKind::Argument, message)
}

/// Tokens of a job at most.
const MOST_IDS: usize = 1 << 24;

fn check(args: &Bench) -> Result<()> {
    let (texts, length) = args.score;
    for (flag, value, least) in [
        ("--sequences", args.sequences.iter().copied().min().unwrap_or(0), 1),
        ("--prompt-tokens", args.prompt_tokens, 1),
        ("--tokens", args.tokens, 1),
        ("--repeat", args.repeat, 1),
        ("--adapter-rank", args.adapter_rank, 1),
        ("--score BxL: B", texts, 1),
        ("--score BxL: L", length, 2),
    ] {
        if value < least {
            return Err(argument(format!("{flag} is {value}, it must be at least {least}")));
        }
    }
    // Ids are made before a request can refuse them.
    let most = args.sequences.iter().copied().max().unwrap_or(0);
    for (flag, value) in [
        ("--sequences times --prompt-tokens", most.saturating_mul(args.prompt_tokens)),
        ("--score BxL: B times L", texts.saturating_mul(length)),
    ] {
        if value > MOST_IDS {
            return Err(argument(format!("{flag} is {value}, at most {MOST_IDS} tokens are made")));
        }
    }
    if args.common.out.is_some() && !args.json {
        return Err(argument("--out takes JSON: add --json".into()));
    }
    Ok(())
}

pub fn run(args: &Bench) -> Result<()> {
    check(args)?;
    let (sequences, tokens) = args.score;
    let spec = rewardrt::model::read_spec(&args.common.model)?;
    let jobs: Vec<Job> = if matches!(spec.head, Head::LanguageModel { .. }) {
        let decode = |&sequences| Job::Decode { sequences, prompt: args.prompt_tokens, tokens: args.tokens };
        args.sequences.iter().map(decode).chain([Job::Logprobs { sequences, tokens }]).collect()
    } else {
        vec![Job::Score { sequences, tokens }]
    };
    let context = args.common.loading.max_context.unwrap_or(spec.context());
    for job in &jobs {
        let (flags, needed) = match job {
            Job::Decode { prompt, tokens, .. } => ("--prompt-tokens plus --tokens", prompt.saturating_add(*tokens)),
            Job::Logprobs { tokens, .. } | Job::Score { tokens, .. } => ("--score BxL: L", *tokens),
        };
        if needed > context {
            return Err(argument(format!("{flags} is {needed}, at most the model's context of {context} is possible")));
        }
    }
    let needed = jobs.iter().map(|job| job.kv_tokens()).max().unwrap_or(0);
    let mut options = args.common.loading.runtime_options();
    options.gpu.batch_variant = args.batch_variant;
    let runtime = Runtime::open(&options)?;
    let model = args.common.loading.load(
        &runtime,
        &args.common.model,
        args.common.loading.kv_tokens.or(Some(needed.max(256))),
    )?;
    let device = runtime.device_name();
    let limits = if args.profile { limits(&model)? } else { None };
    let mut sink = args.json.then(|| Sink::open(args.common.out.as_deref())).transpose()?;
    if sink.is_none() {
        print_line(&format!("{} on {device}", args.common.model.display()))?;
        if let Some(l) = limits {
            let (read, flops) = (l.bytes_per_second / 1e9, l.flops / 1e9);
            print_line(&format!("limits, measured: reading {read:.1} GB/s, products {flops:.0} GFLOP/s"))?;
        }
    }
    let loaded = if args.adapters > 0 { Some(adapters(&model, args)?) } else { None };
    let swap_ms = loaded.as_ref().map(|(_, ms)| *ms);
    let loaded = loaded.map_or(Vec::new(), |(adapters, _)| adapters);
    if let (None, Some(ms), Some(first)) = (&sink, swap_ms, loaded.first()) {
        let (count, rank, bytes) = (loaded.len(), first.rank(), first.bytes() as f64 / 1e6);
        print_line(&format!("{count} adapters of rank {rank}, {bytes:.1} MB each; replacing one takes {ms:.1} ms"))?;
    }
    let mut number = 0;
    let mut once = |job: Job| {
        number += 1;
        job.run(&model, &loaded, number)
    };
    for job in jobs {
        once(job)?;
        let mut runs = (0..args.repeat).map(|_| once(job)).collect::<Result<Vec<Run>>>()?;
        runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let median = runs[runs.len() / 2];
        let mut profile = None;
        if args.profile {
            model.set_profiling(true)?;
            model.take_profile()?;
            let run = once(job)?;
            model.set_profiling(false)?;
            profile = Some((run.seconds, model.take_profile()?));
        }
        match &mut sink {
            Some(sink) => sink.write(&Line { swap_ms, ..line(args, job, median, profile, limits, &device) })?,
            None => print_job(job, median, profile, limits)?,
        }
    }
    sink.map_or(Ok(()), Sink::finish)
}

/// `None` where the device's limits cannot be measured.
fn limits(model: &Model) -> Result<Option<Limits>> {
    match model.limits() {
        Ok(limits) => Ok(Some(limits)),
        // A large model may leave no room for what is copied.
        Err(error) if [ErrorKind::Unsupported, ErrorKind::DeviceMemory, ErrorKind::Limit].contains(&error.kind()) => {
            log::warn!("{error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

type Profile = (f64, Vec<KernelTime>);

fn line<'a>(
    args: &Bench,
    job: Job,
    run: Run,
    profile: Option<Profile>,
    limits: Option<Limits>,
    device: &'a str,
) -> Line<'a> {
    let (prompt_tokens, tokens) = match job {
        Job::Decode { prompt, tokens, .. } => (Some(prompt), tokens),
        Job::Logprobs { tokens, .. } | Job::Score { tokens, .. } => (None, tokens),
    };
    let (profile_seconds, kernels) = profile.unzip();
    let kernel = |k: KernelTime| {
        let KernelTime { name, calls, seconds, bytes, flops } = k;
        Kernel { name, calls, ms: 1e3 * seconds, bytes, flops }
    };
    Line {
        job: job.name(),
        sequences: job.sequences(),
        prompt_tokens,
        tokens,
        tokens_per_second: run.tokens as f64 / run.seconds,
        seconds: run.seconds,
        steps: run.steps,
        step_ms: run.step_ms,
        adapters: args.adapters,
        swap_ms: None,
        profile_seconds,
        kernels: kernels.unwrap_or_default().into_iter().map(kernel).collect(),
        limits: limits.map(|l| LimitsLine { bytes_per_second: l.bytes_per_second, flops: l.flops }),
        precision: match args.common.loading.precision {
            PrecisionArg::Auto => "auto",
            PrecisionArg::F32 => "f32",
        },
        weights: match args.common.loading.weights {
            WeightsArg::Stored => "stored",
            WeightsArg::Int8 => "int8",
            WeightsArg::Int4 => "int4",
        },
        device,
        model: args.common.model.display().to_string(),
    }
}

fn print_job(job: Job, run: Run, profile: Option<Profile>, limits: Option<Limits>) -> Result<()> {
    let what = match job {
        Job::Decode { sequences, prompt, tokens } => format!("decode {sequences} x {tokens} after {prompt}"),
        Job::Logprobs { sequences, tokens } => format!("log-probs {sequences} x {tokens}"),
        Job::Score { sequences, tokens } => format!("scores {sequences} x {tokens}"),
    };
    let step = run.step_ms.map_or(String::new(), |ms| format!(", {ms:.2} ms a decode step"));
    let speed = run.tokens as f64 / run.seconds;
    print_line(&format!("{what:<26} {speed:>9.1} tokens/s   {:.3} s, {} steps{step}", run.seconds, run.steps))?;
    let Some((seconds, mut kernels)) = profile else { return Ok(()) };
    if kernels.is_empty() {
        return print_line("  (this device times no kernels)");
    }
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    print_line(&format!(
        "  {:<14} {:>8} {:>11} {:>7} {:>8} {:>9} {:>8} {:>9}",
        "kernel", "calls", "ms", "share", "GB/s", "GFLOP/s", "of read", "of flops"
    ))?;
    let percent = |part: f64, whole: Option<f64>| whole.map_or("".into(), |w| format!("{:.0} %", 100.0 * part / w));
    for k in &kernels {
        let (read, flops) = (k.bytes as f64 / k.seconds, k.flops as f64 / k.seconds);
        print_line(&format!(
            "  {:<14} {:>8} {:>11.2} {:>7} {:>8.1} {:>9.1} {:>8} {:>9}",
            k.name,
            k.calls,
            1e3 * k.seconds,
            percent(k.seconds, Some(seconds)),
            read / 1e9,
            flops / 1e9,
            percent(read, limits.map(|l| l.bytes_per_second)),
            percent(flops, limits.map(|l| l.flops))
        ))?;
    }
    // The host encodes while the device computes.
    let on_device = kernels.iter().filter(|k| !k.name.ends_with("(host)"));
    let rest = seconds - on_device.map(|k| k.seconds).sum::<f64>();
    let (name, share) = ("between them", percent(rest, Some(seconds)));
    print_line(&format!("  {name:<14} {:>8} {:>11.2} {share:>7}", "", 1e3 * rest))
}
