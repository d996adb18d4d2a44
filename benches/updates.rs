//! What a change of weights costs, on a real model (REWARDRT_BENCH_MODEL, else .cache/smollm2; REWARDRT_BENCH_DEVICE, else
//! cpu): all tensors from memory against memcpy, to the first token, and beside sampling.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rewardrt::weights::{Checkpoint, Delta, DeltaOptions, Dtype, Encoding, LoadOptions, TensorData, write_delta};
use rewardrt::{InFlight, Model, ModelOptions, Runtime, RuntimeOptions, SampleRequest, Storage, UpdateOptions};

/// A trainer's tensors.
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

fn tensors(folder: &Path, model: &Model) -> Vec<Tensor> {
    let file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&file).unwrap();
    let mut list = Vec::new();
    for (name, dtype, shape) in model.tensors() {
        list.push(Tensor { bytes: all.tensor(&name).unwrap().data().to_vec(), name, dtype, shape });
    }
    list
}

/// The median of some runs, in seconds.
fn median(runs: usize, mut run: impl FnMut() -> f64) -> f64 {
    let mut times: Vec<f64> = (0..runs).map(|_| run()).collect();
    times.sort_by(f64::total_cmp);
    times[runs / 2]
}

fn timed(what: impl FnOnce()) -> f64 {
    let begin = Instant::now();
    what();
    begin.elapsed().as_secs_f64()
}

fn prompts(n: u32) -> Vec<Vec<u32>> {
    (0..n).map(|i| (0..32).map(|k| 1000 + (i * 7919 + k * 104_729) % 40_000).collect()).collect()
}

fn request(sequences: u32, max_tokens: usize) -> SampleRequest {
    SampleRequest { prompts: prompts(sequences), max_tokens, ignore_eos: true, ..SampleRequest::default() }
}

fn put_all(model: &Model, tensors: &[Tensor], options: UpdateOptions) -> rewardrt::Update {
    let mut update = model.update(&options).unwrap();
    for Tensor { name, dtype, shape, bytes } in tensors {
        update.put(&TensorData { name, dtype: *dtype, shape, bytes, checksum: None }).unwrap();
    }
    update
}

fn copies(model: &Model, tensors: &[Tensor]) {
    let total: usize = tensors.iter().map(|t| t.bytes.len()).sum();
    let line = |what: &str, seconds: f64| {
        println!("{what}: {:.1} ms, {:.1} GB/s", seconds * 1e3, total as f64 / seconds / 1e9);
    };
    println!("{} tensors, {:.1} MB", tensors.len(), total as f64 / 1e6);
    let mut warm: Vec<Vec<u8>> = tensors.iter().map(|t| t.bytes.clone()).collect();
    let copy = |warm: &mut Vec<Vec<u8>>| warm.iter_mut().zip(tensors).for_each(|(w, t)| w.copy_from_slice(&t.bytes));
    line("memcpy, one thread, into memory that is there", median(5, || timed(|| copy(&mut warm))));
    let fresh = || drop(tensors.iter().map(|t| t.bytes.clone()).collect::<Vec<_>>());
    line("memcpy, one thread, into new memory", median(5, || timed(fresh)));
    let mut version = model.weights_version();
    for (what, options) in [
        ("in shadow", UpdateOptions::default()),
        ("in shadow, values checked", UpdateOptions { check_finite: true, ..UpdateOptions::default() }),
        ("in place", UpdateOptions { storage: Storage::InPlace, ..UpdateOptions::default() }),
    ] {
        let (mut puts, mut commits, mut firsts) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..5 {
            version += 1;
            let begin = Instant::now();
            let mut update = put_all(model, tensors, options);
            puts.push(begin.elapsed().as_secs_f64());
            let begin = Instant::now();
            update.commit(version).unwrap();
            commits.push(begin.elapsed().as_secs_f64());
            model.sample(&request(1, 1)).unwrap().wait().unwrap();
            firsts.push(begin.elapsed().as_secs_f64());
        }
        let mid = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            times[2]
        };
        line(&format!("put all, {what}"), mid(&mut puts));
        let (commit, first) = (mid(&mut commits) * 1e3, mid(&mut firsts) * 1e3);
        println!("  commit: {commit:.2} ms; to the first token after a prompt of 32: {first:.1} ms");
    }
    let one = median(5, || timed(|| drop(model.sample(&request(1, 1)).unwrap().wait().unwrap())));
    println!("a token after a prompt of 32, its keys and values in the cache: {:.1} ms", one * 1e3);
}

/// Tokens a second of 8 sequences, while weights change or do not.
fn beside_sampling(model: &Model, tensors: &[Tensor]) {
    const TOKENS: usize = 96;
    let run = || {
        let begin = Instant::now();
        model.sample(&request(8, TOKENS)).unwrap().wait().unwrap();
        8.0 * TOKENS as f64 / begin.elapsed().as_secs_f64()
    };
    run();
    println!("8 sequences of {TOKENS} tokens: {:.0} tok/s", run());
    for in_flight in [InFlight::Wait, InFlight::Keep] {
        for pause in [0.0, 1.0] {
            let done = AtomicBool::new(false);
            let (speed, commits) = std::thread::scope(|scope| {
                let trainer = scope.spawn(|| {
                    let mut commits = 0;
                    while !done.load(Ordering::Relaxed) {
                        let options = UpdateOptions { in_flight, ..UpdateOptions::default() };
                        let mut update = put_all(model, tensors, options);
                        update.commit(model.weights_version() + 1).unwrap();
                        commits += 1;
                        std::thread::sleep(Duration::from_secs_f64(pause));
                    }
                    commits
                });
                let begin = Instant::now();
                let speeds: Vec<f64> = (0..3).map(|_| run()).collect();
                let seconds = begin.elapsed().as_secs_f64();
                done.store(true, Ordering::Relaxed);
                let commits = f64::from(trainer.join().unwrap()) / seconds;
                (speeds.iter().sum::<f64>() / 3.0, commits)
            });
            println!("  with {commits:.1} commits a second ({in_flight:?}): {speed:.0} tok/s");
        }
    }
}

/// One weight in a hundred moves by a unit in the last place.
fn deltas(folder: &Path, model: &Model) {
    let scratch = tempfile::tempdir().unwrap();
    let mut file = std::fs::read(folder.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    for at in (header..file.len() - 1).step_by(200) {
        file[at] ^= 1;
    }
    let new = scratch.path().join("new.safetensors");
    std::fs::write(&new, &file).unwrap();
    let old = folder.join("model.safetensors");
    for encoding in [Encoding::Xor, Encoding::Overwrite] {
        let out = scratch.path().join(encoding.name());
        let version = model.weights_version();
        let options = DeltaOptions { encoding, base_version: version, version: version + 1, ..DeltaOptions::default() };
        let mut report = None;
        let write = timed(|| report = Some(write_delta(&old, &new, &out, &options, |_, _| {}).unwrap()));
        let report = report.unwrap();
        // Back to what the delta is made from.
        let mut update = model.update(&UpdateOptions::default()).unwrap();
        update.put_files(&old).unwrap();
        update.commit(version + 100).unwrap();
        let delta = Delta::open(&out, &LoadOptions::default()).unwrap();
        let base = Checkpoint::open(&old, &LoadOptions::default()).unwrap();
        delta.check_base(&base).unwrap();
        let bytes = std::fs::read(&old).unwrap();
        let views = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let apply = timed(|| {
            for tensor in delta.tensors() {
                let base = views.tensor(tensor.name).unwrap();
                let mut out = vec![0; base.data().len()];
                delta.apply(tensor.name, base.data(), &mut out).unwrap();
            }
        });
        println!(
            "delta ({}): {:.2} % of {:.0} MB, written in {write:.2} s, applied in {apply:.2} s by one thread",
            encoding.name(),
            100.0 * report.bytes_delta as f64 / report.bytes_old as f64,
            report.bytes_old as f64 / 1e6,
        );
    }
}

fn main() {
    let default = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".cache/smollm2");
    let folder = std::env::var_os("REWARDRT_BENCH_MODEL").map_or(default, PathBuf::from);
    if !folder.join("config.json").exists() {
        return println!("no model at {}: `make model` fetches it", folder.display());
    }
    let device = std::env::var("REWARDRT_BENCH_DEVICE").unwrap_or("cpu".into());
    let runtime = Runtime::open(&RuntimeOptions { device, ..RuntimeOptions::default() }).unwrap();
    let model = runtime.load_model(&folder, &ModelOptions::default()).unwrap();
    println!("{} on {}", folder.display(), runtime.device_name());
    let tensors = tensors(&folder, &model);
    copies(&model, &tensors);
    beside_sampling(&model, &tensors);
    deltas(&folder, &model);
    let begin = Instant::now();
    let mut update = model.update(&UpdateOptions::default()).unwrap();
    update.put_files(&folder).unwrap();
    update.commit(model.weights_version() + 1).unwrap();
    println!("all from the folder, mapped: {:.1} ms", begin.elapsed().as_secs_f64() * 1e3);
}
