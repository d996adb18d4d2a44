//! What the scheduler is worth, on a real model (REWARDRT_BENCH_MODEL, else .cache/smollm2; REWARDRT_BENCH_DEVICE, else
//! cpu): shared prompts, guides, guesses ahead, mixed load, a long queue. Each line is one run against its own peer.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use rewardrt::{
    Guide, Job, LogprobRequest, Model, ModelOptions, Runtime, RuntimeOptions, SampleRequest, SampledSequence,
};

struct Random(u64);

impl Random {
    fn between(&mut self, low: usize, high: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        low + (self.0 >> 33) as usize % (high - low + 1)
    }

    fn ids(&mut self, n: usize) -> Vec<u32> {
        (0..n).map(|_| self.between(1000, 40_000) as u32).collect()
    }
}

fn open() -> Option<Model> {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
    let folder = std::env::var_os("REWARDRT_BENCH_MODEL").map_or(default, PathBuf::from);
    if !folder.join("config.json").exists() {
        println!("no model at {}: `make model` fetches it", folder.display());
        return None;
    }
    let device = std::env::var("REWARDRT_BENCH_DEVICE").unwrap_or("cpu".into());
    let runtime = Runtime::open(&RuntimeOptions { device, ..RuntimeOptions::default() }).unwrap();
    let model = runtime.load_model(&folder, &ModelOptions::default()).unwrap();
    println!("{} on {}", folder.display(), runtime.device_name());
    Some(model)
}

fn request(prompts: Vec<Vec<u32>>, max_tokens: usize) -> SampleRequest {
    SampleRequest { prompts, max_tokens, ignore_eos: true, ..SampleRequest::default() }
}

/// Runs a request; its answers, seconds, and rows computed.
fn run(model: &Model, request: &SampleRequest) -> (Vec<SampledSequence>, f64, u64) {
    let begin = Instant::now();
    let job = model.sample(request).unwrap();
    while !job.wait_timeout(Duration::from_secs(600)) {}
    let rows = job.stats().rows;
    (job.wait().unwrap(), begin.elapsed().as_secs_f64(), rows.computed())
}

fn shared_prompts(model: &Model) {
    let mut random = Random(1);
    let one = random.ids(512);
    let separate: Vec<_> = (0..64).map(|_| random.ids(512)).collect();
    let (_, together, rows) = run(model, &SampleRequest { n: 64, ..request(vec![one], 16) });
    let (_, apart, apart_rows) = run(model, &request(separate, 16));
    println!(
        "64 samples of a 512-token prompt, 16 tokens each: {together:.2} s, {rows} rows; 64 prompts: {apart:.2} s, {apart_rows} rows; {:.1} times",
        apart / together
    );
}

fn guides(model: &Model) {
    let Ok(tokenizer) = model.tokenizer() else { return println!("guides: the model has no tokenizer") };
    let prompt = tokenizer.encode("A person as JSON: ", Default::default()).unwrap();
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "x-guidance": {"whitespace_flexible": false},
        "properties": {"name": {"type": "string", "maxLength": 16}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
                       "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}}}"#;
    let guided = SampleRequest {
        n: 200,
        guide: Some(Guide::JsonSchema(schema.into())),
        ignore_eos: false,
        ..request(vec![prompt.clone()], 160)
    };
    let (answers, seconds, rows) = run(model, &guided);
    let valid = answers.iter().filter(|a| {
        let value: Option<serde_json::Value> = a.text.as_deref().and_then(|t| serde_json::from_str(t).ok());
        value.is_some_and(|v| {
            v["name"].as_str().is_some_and(|n| n.chars().count() <= 16)
                && v["age"].as_i64().is_some_and(|a| (0..=150).contains(&a))
                && v["tags"].as_array().is_some_and(|t| t.len() <= 3 && t.iter().all(serde_json::Value::is_string))
        })
    });
    println!("200 answers under a JSON schema: {} valid", valid.count());
    // The same number of rows in the same batches, without a guide: each answer as long as the guided one.
    let begin = Instant::now();
    let jobs: Vec<_> = answers
        .iter()
        .enumerate()
        .map(|(i, a)| {
            let stream = vec![i as u64];
            model.sample(&SampleRequest { streams: stream, ..request(vec![prompt.clone()], a.tokens.len()) }).unwrap()
        })
        .collect();
    jobs.into_iter().for_each(|job| drop(job.wait().unwrap()));
    let free = begin.elapsed().as_secs_f64();
    let tokens: usize = answers.iter().map(|a| a.tokens.len()).sum();
    println!(
        "  {tokens} tokens, {rows} rows: {:.0} tokens/s guided, {:.0} free: {:.0} %",
        tokens as f64 / seconds,
        tokens as f64 / free,
        100.0 * free / seconds
    );
}

fn guesses(model: &Model) {
    let Ok(tokenizer) = model.tokenizer() else { return };
    let text = "def area(width, height):\n    return width * height\n\ndef volume(width, height, depth):\n    return width * height * depth\n\n";
    let prompt = tokenizer.encode(&text.repeat(4), Default::default()).unwrap();
    for sequences in [1, 8] {
        let asked = SampleRequest { temperature: 0.0, ..request(vec![prompt.clone(); sequences], 128) };
        let (plain, alone, _) = run(model, &asked);
        let (drafted, ahead, _) = run(model, &SampleRequest { speculate: 8, ..asked });
        assert!(plain.iter().zip(&drafted).all(|(a, b)| a.tokens == b.tokens));
        let tokens = 128.0 * sequences as f64;
        println!(
            "guesses ahead, repetitive text, {sequences} sequences: {:.0} tokens/s, {:.0} without: {:.1} times",
            tokens / ahead,
            tokens / alone,
            alone / ahead
        );
    }
}

/// 200 sampling and 200 scoring jobs of random lengths, all submitted at once, against the same work in static batches.
fn mixed_load(model: &Model) {
    let mut random = Random(5);
    let mut sampling = Vec::new();
    let mut scoring = Vec::new();
    for _ in 0..200 {
        let (prompt, new, text) = (random.between(16, 128), random.between(8, 128), random.between(32, 256));
        sampling.push((random.ids(prompt), new));
        scoring.push(random.ids(text));
    }
    let sampled: usize = sampling.iter().map(|(p, n)| p.len() + n).sum();
    let tokens = sampled + scoring.iter().map(Vec::len).sum::<usize>();
    let before = model.stats();
    let begin = Instant::now();
    let (mut samples, mut scores) = (Vec::new(), Vec::new());
    for ((prompt, n), text) in sampling.iter().zip(&scoring) {
        samples.push(model.sample(&request(vec![prompt.clone()], *n)).unwrap());
        let texts = LogprobRequest { sequences: vec![text.clone()], ..LogprobRequest::default() };
        scores.push(model.logprobs(&texts).unwrap());
    }
    // A job's own clock stops when it is done, whenever it is looked at.
    let slowest = samples.into_iter().map(finish).fold(0.0, f64::max);
    let slowest_score = scores.into_iter().map(finish).fold(0.0, f64::max);
    let mixed = begin.elapsed().as_secs_f64();
    let after = model.stats();
    println!(
        "200 sampling + 200 scoring jobs: {:.0} tokens/s ({mixed:.1} s, {} steps, {} preemptions); slowest sampling job {slowest:.1} s, slowest scoring job {slowest_score:.1} s, longest wait {:.2} s",
        tokens as f64 / mixed,
        after.steps - before.steps,
        after.preemptions - before.preemptions,
        after.longest_wait.as_secs_f64()
    );
    // Static batches: the next begins when the last one is done; scoring in one go, as it has no tail.
    let mut best = f64::MAX;
    for size in [16, 32, 64, 100, 200] {
        // Other tokens each time: the cache must not help.
        let before = model.stats();
        let begin = Instant::now();
        for batch in sampling.chunks(size) {
            let mut submit =
                |(p, n): &(Vec<u32>, usize)| model.sample(&request(vec![random.ids(p.len())], *n)).unwrap();
            let jobs: Vec<_> = batch.iter().map(&mut submit).collect();
            jobs.into_iter().for_each(|job| drop(job.wait().unwrap()));
        }
        let sequences = scoring.iter().map(|t| random.ids(t.len())).collect();
        let texts = LogprobRequest { sequences, ..LogprobRequest::default() };
        model.logprobs(&texts).unwrap().wait().unwrap();
        let seconds = begin.elapsed().as_secs_f64();
        let preemptions = model.stats().preemptions - before.preemptions;
        println!("  static batches of {size}: {:.0} tokens/s ({preemptions} preemptions)", tokens as f64 / seconds);
        best = best.min(seconds);
    }
    println!("  mixed against the best static batch: {:.0} %", 100.0 * best / mixed);
}

fn finish<T>(job: Job<T>) -> f64 {
    while !job.wait_timeout(Duration::from_secs(600)) {}
    let seconds = job.stats().elapsed.as_secs_f64();
    drop(job.wait());
    seconds
}

/// Resident memory of this process, in MB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    line.and_then(|l| l.trim().trim_end_matches(" kB").parse::<f64>().ok()).map_or(f64::NAN, |kb| kb / 1e3)
}

/// 10,000 requests wait their turn; the engine holds their prompts and nothing else of them.
fn long_queue(model: &Model) {
    let mut random = Random(9);
    // What steps of this size and results take is there before.
    run(model, &request((0..64).map(|_| random.ids(64)).collect(), 1));
    let (before, begin) = (resident(), Instant::now());
    let jobs: Vec<_> = (0..10_000).map(|_| model.sample(&request(vec![random.ids(8)], 1)).unwrap()).collect();
    let (queued, submitting) = (resident(), begin.elapsed().as_secs_f64());
    let mut most = queued;
    for (i, job) in jobs.into_iter().enumerate() {
        drop(job.wait().unwrap());
        if i % 500 == 0 {
            most = most.max(resident());
        }
    }
    println!(
        "10,000 queued requests of 8 tokens: {before:.0} MB before, {queued:.0} MB queued ({submitting:.2} s), {most:.0} MB at most while they ran, {:.0} MB after; {:.1} s",
        resident(),
        begin.elapsed().as_secs_f64()
    );
}

fn main() {
    // `cargo bench` passes flags of criterion's; a name chooses what runs.
    let only: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let Some(model) = open() else { return };
    let chosen = |name: &str| only.is_empty() || only.iter().any(|o| o == name);
    for name in ["shared", "guides", "guesses", "mixed", "queue"].into_iter().filter(|name| chosen(name)) {
        match name {
            "shared" => shared_prompts(&model),
            "guides" => guides(&model),
            "guesses" => guesses(&model),
            "mixed" => mixed_load(&model),
            _ => long_queue(&model),
        }
    }
}
