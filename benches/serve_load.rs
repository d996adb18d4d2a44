//! What HTTP costs: 64 clients against `rewardrt serve`, each with one request at a time, for a minute; then the same work
//! in process, by 64 callers and as one batch. On a real model (REWARDRT_BENCH_MODEL, else .cache/smollm2);
//! REWARDRT_BENCH_SECONDS, else 60.
#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rewardrt::{Model, ModelOptions, Rule, Runtime, RuntimeOptions, SampleRequest, ScoreRequest};
use serde_json::{Value, json};

const CLIENTS: usize = 64;
const PROMPT_TOKENS: usize = 24;
const MAX_TOKENS: usize = 16;
/// Some token that the judge may answer with.
const RULE: &str = "judge: yes, no";

struct Server {
    child: Child,
    url: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn serve(folder: &Path) -> Server {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rewardrt"))
        .args(["serve", "--port", "0", "--device", "cpu", "--model"])
        .arg(format!("policy={}", folder.display()))
        .args(["--reward", &format!("judge={}:{RULE}", folder.display())])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    let url = line.trim().strip_prefix("rewardrt: listening on ").unwrap().to_owned();
    Server { child, url }
}

/// The ids of request `i`, different from all others.
fn prompt(i: usize) -> Vec<u32> {
    let mut state = i as u64 + 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        1000 + (state >> 33) as u32 % 39_000
    };
    (0..PROMPT_TOKENS).map(|_| next()).collect()
}

/// One kind of work: over HTTP, by one caller in process, and all of it at once.
struct Work {
    name: &'static str,
    path: &'static str,
    body: fn(usize) -> Value,
    one: fn(&Model, usize),
    /// The first prompt's number, and how many there are.
    all: fn(&Model, usize, usize),
}

fn sample(prompts: Vec<Vec<u32>>, seed: usize) -> SampleRequest {
    SampleRequest { prompts, seed: seed as u64, max_tokens: MAX_TOKENS, ignore_eos: true, ..SampleRequest::default() }
}

fn score(sequences: Vec<Vec<u32>>) -> ScoreRequest {
    ScoreRequest { sequences, rule: Some(Rule::parse(RULE).unwrap()), ..ScoreRequest::default() }
}

const WORK: [Work; 2] = [
    Work {
        name: "completions, 24 tokens in, 16 out",
        path: "/v1/completions",
        body: |i| json!({"prompt": prompt(i), "seed": i, "max_tokens": MAX_TOKENS, "ignore_eos": true}),
        one: |model, i| drop(model.sample(&sample(vec![prompt(i)], i)).unwrap().wait().unwrap()),
        all: |model, first, n| {
            drop(model.sample(&sample((first..first + n).map(prompt).collect(), 0)).unwrap().wait().unwrap());
        },
    },
    Work {
        name: "scores, 24 tokens in",
        path: "/classify",
        body: |i| json!({"model": "judge", "input": prompt(i)}),
        one: |model, i| drop(model.score(&score(vec![prompt(i)])).unwrap().wait().unwrap()),
        all: |model, first, n| {
            drop(model.score(&score((first..first + n).map(prompt).collect())).unwrap().wait().unwrap());
        },
    },
];

/// 64 callers, each with one request at a time, for `time`; how many were answered and refused, and how long each took.
fn crowd(time: Duration, ask: impl Fn(usize) -> bool + Sync) -> (usize, usize, Vec<f64>, f64) {
    let (number, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let latencies = Mutex::new(Vec::new());
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let mut mine = Vec::new();
                while begin.elapsed() < time {
                    let asked = Instant::now();
                    match ask(number.fetch_add(1, Ordering::Relaxed)) {
                        true => mine.push(asked.elapsed().as_secs_f64()),
                        false => drop(refused.fetch_add(1, Ordering::Relaxed)),
                    }
                }
                latencies.lock().unwrap().extend(mine);
            });
        }
    });
    let seconds = begin.elapsed().as_secs_f64();
    let mut latencies = latencies.into_inner().unwrap();
    latencies.sort_by(f64::total_cmp);
    (latencies.len(), refused.into_inner(), latencies, seconds)
}

/// Answers of a kind of work, over all its rounds.
#[derive(Default)]
struct Tally {
    answered: usize,
    refused: usize,
    seconds: f64,
    latencies: Vec<f64>,
    /// Answers a second, by round.
    rates: Vec<f64>,
}

impl Tally {
    fn add(&mut self, (answered, refused, latencies, seconds): (usize, usize, Vec<f64>, f64)) {
        self.answered += answered;
        self.refused += refused;
        self.seconds += seconds;
        self.latencies.extend(latencies);
        self.rates.push(answered as f64 / seconds);
    }

    fn report(&mut self, who: &str) {
        self.latencies.sort_by(f64::total_cmp);
        let at = |share: f64| self.latencies[((self.latencies.len() - 1) as f64 * share) as usize] * 1e3;
        println!(
            "  {who}: {} answers in {:.1} s, {:.1} a second; p50 {:.0} ms, p99 {:.0} ms; {} times 429, no other error",
            self.answered,
            self.seconds,
            self.answered as f64 / self.seconds,
            at(0.5),
            at(0.99),
            self.refused
        );
    }
}

fn percent(mine: &Tally, other: &Tally) -> f64 {
    let mut ratios: Vec<f64> = mine.rates.iter().zip(&other.rates).map(|(a, b)| 100.0 * a / b).collect();
    ratios.sort_by(f64::total_cmp);
    ratios[ratios.len() / 2]
}

/// Rounds in turns, for a machine that is shared: only what ran side by side in time is compared.
const ROUNDS: usize = 5;

fn run(folder: &Path, work: &Work, time: Duration) {
    let server = serve(folder);
    let runtime = Runtime::open(&RuntimeOptions { device: "cpu".into(), ..RuntimeOptions::default() }).unwrap();
    let model = runtime.load_model(folder, &ModelOptions::default()).unwrap();
    let url = format!("{}{}", server.url, work.path);
    let config = ureq::Agent::config_builder().http_status_as_error(false).max_idle_connections_per_host(CLIENTS);
    let agent = config.max_idle_connections(CLIENTS).build().new_agent();
    let ask = |i: usize| {
        let mut response = agent.post(&url).send_json((work.body)(i)).unwrap();
        let text = response.body_mut().read_to_string().unwrap();
        match response.status().as_u16() {
            200 => true,
            429 => false,
            status => panic!("{status}: {text}"),
        }
    };
    let (mut http, mut callers, mut batch) = (Tally::default(), Tally::default(), Tally::default());
    for round in 0..ROUNDS {
        // No prompt comes twice: none is in a cache.
        let first = round * 1_000_000;
        http.add(crowd(time / ROUNDS as u32, |i| ask(first + i)));
        callers.add(crowd(time / ROUNDS as u32, |i| {
            (work.one)(&model, first + i);
            true
        }));
        let n = http.answered - batch.answered;
        let begin = Instant::now();
        (work.all)(&model, first + 500_000, n);
        batch.add((n, 0, Vec::new(), begin.elapsed().as_secs_f64()));
    }
    http.report("64 clients over HTTP");
    callers.report("64 callers in process");
    println!("  the same as one batch a round: {:.1} a second", batch.answered as f64 / batch.seconds);
    println!(
        "  HTTP has {:.0} % of the callers' throughput and {:.0} % of the batch's (medians of {ROUNDS} rounds)",
        percent(&http, &callers),
        percent(&http, &batch)
    );
}

fn main() {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
    let folder = std::env::var_os("REWARDRT_BENCH_MODEL").map_or(default, PathBuf::from);
    if !folder.join("config.json").exists() {
        return println!("no model at {}: `make model` fetches it", folder.display());
    }
    let seconds = std::env::var("REWARDRT_BENCH_SECONDS").map_or(60.0, |s| s.parse().unwrap());
    let time = Duration::from_secs_f64(seconds);
    for work in WORK {
        println!("{}:", work.name);
        run(&folder, &work, time);
    }
}
