//! What only the GPU backend has: bindings that are too small for a weight, matrix units, steps that follow one another on
//! the device, compiled shaders on disk, a profile by kernel, and a device that is lost.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod common;
#[path = "gpu/memory.rs"]
mod memory;

use std::path::Path;
use std::sync::Arc;

use common::{devices, golden};
use rewardrt::ErrorKind;
use rewardrt::backend::gpu::{Gpu, GpuExecutor, GpuOptions, GpuWeights, MatrixUnits, Selection};
use rewardrt::backend::{Capacity, Executor, Output, OutputRow, Sampling, Step, Want};
use rewardrt::kernels::embed::FROM_DRAW;
use rewardrt::kernels::{KV_BLOCK, RowMeta, sample};
use rewardrt::model::{Plan, read_spec};
use rewardrt::weights::LoadOptions;
use xxhash_rust::xxh3::xxh3_64;

fn gpus() -> Vec<String> {
    devices().into_iter().filter(|d| d != "cpu").collect()
}

fn gpu_with(device: &str, options: &GpuOptions) -> Gpu {
    Gpu::select(&Selection::parse(device).unwrap(), options).unwrap().unwrap()
}

/// Nothing is rounded on it.
fn gpu(device: &str) -> Gpu {
    gpu_with(device, &GpuOptions { matrix_units: MatrixUnits::Off, ..GpuOptions::default() })
}

/// `None` with a loud line where matrix units cannot be emulated.
fn emulating(device: &str) -> Option<Gpu> {
    let options = GpuOptions { matrix_units: MatrixUnits::Emulated(16), ..GpuOptions::default() };
    match Gpu::select(&Selection::parse(device).unwrap(), &options) {
        Ok(gpu) => gpu,
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            eprintln!("SKIPPED ON {device}: {error}");
            None
        }
    }
}

/// An executor, and its head size.
struct Loaded {
    executor: GpuExecutor,
    head_dim: usize,
}

fn load(gpu: impl Into<Arc<Gpu>>, name: &str) -> Loaded {
    load_with(gpu.into(), name, Capacity { max_rows: 16, kv_blocks: 8 })
}

fn load_with(gpu: Arc<Gpu>, name: &str, capacity: Capacity) -> Loaded {
    load_folder(gpu, &golden(name), &LoadOptions::default(), capacity)
}

fn load_folder(gpu: Arc<Gpu>, folder: &Path, options: &LoadOptions, capacity: Capacity) -> Loaded {
    let spec = read_spec(folder).unwrap();
    let head_dim = spec.head_dim;
    let plan = Plan::new(&spec).unwrap();
    let weights = plan.load_weights(&spec, folder, options).unwrap();
    let (plan, how) = (Arc::new(plan), GpuWeights::default());
    let executor = GpuExecutor::new(gpu, spec, plan, &weights, how, &|_, _| Ok(capacity)).unwrap();
    Loaded { executor, head_dim }
}

/// cos and sin of so many rows.
fn angles(rows: usize, head_dim: usize) -> Vec<f32> {
    (0..rows * head_dim).map(|i| ((i * 7 % 13) as f32 / 13.0).cos()).collect()
}

impl Loaded {
    /// One sequence of twelve tokens; every kind of output that needs no draw.
    fn run(&mut self) -> rewardrt::Result<Vec<Output>> {
        let rows: Vec<RowMeta> =
            (0..12).map(|p| RowMeta { token: 7 + 8 * p, position: p, slot: 16 + p, table: 0 }).collect();
        let cos_sin = angles(12, self.head_dim);
        let mut outputs: Vec<OutputRow> = (0..11)
            .map(|p| OutputRow { row: p, want: Want::Logprob { target: 15 + 8 * p, top: p as usize % 3 } })
            .collect();
        outputs.push(OutputRow { row: 11, want: Want::Tokens(Arc::from([3, 99, 50])) });
        self.executor.step(&Step { rows: &rows, tables: &[1], cos_sin: &cos_sin, outputs: &outputs, adapters: &[] })
    }
}

/// A weight that does not fit a binding is bound in slices of rows; the results have the same bits.
#[test]
fn split_weights_give_the_same_bits() {
    for device in gpus() {
        for emulated in [false, true] {
            let open = || if emulated { emulating(&device) } else { Some(gpu(&device)) };
            let Some(plain) = open() else { continue };
            let whole = load(plain, "llama-wide").run().unwrap();
            assert_eq!(whole.len(), 12);
            let mut small = open().unwrap();
            // 160 rows of D bf16 or f16 numbers, of which slices take 128: gate and up are 800 rows, the head 700. The
            // activations just fit.
            small.limit_bindings(51_200);
            assert_eq!(whole, load(small, "llama-wide").run().unwrap(), "emulated: {emulated}");
        }
    }
}

/// Where inputs and weights are f16, log-probs are near those where nothing is rounded.
#[test]
fn matrix_units_round_to_f16_and_no_more() {
    for device in gpus() {
        for name in ["llama-tied", "llama-wide", "mistral-window"] {
            let mut exact = load(gpu(&device), name);
            let Some(emulating) = emulating(&device) else { continue };
            let mut half = load(emulating, name);
            let kv_cache = |l: &Loaded| l.executor.memory().kv_cache;
            assert_eq!(kv_cache(&exact), 2 * kv_cache(&half), "{name}: matrix units are not used");
            for (exact, half) in exact.run().unwrap().iter().zip(&half.run().unwrap()) {
                let pairs = match (exact, half) {
                    (Output::Logprob(a), Output::Logprob(b)) => vec![(a.logprob, b.logprob), (a.entropy, b.entropy)],
                    (Output::Logits(a), Output::Logits(b)) => a.iter().copied().zip(b.iter().copied()).collect(),
                    other => panic!("{other:?}"),
                };
                for (exact, half) in pairs {
                    assert!((exact - half).abs() <= 5e-3 * exact.abs().max(1.0), "{name}: {half}, exactly {exact}");
                }
            }
        }
    }
}

/// Checks of indices and loops change nothing: nothing is out of bounds.
#[test]
fn checked_shaders_give_the_same_bits() {
    for device in gpus() {
        // Tiles of 8 for attention: the model's heads are that small.
        for matrix_units in [MatrixUnits::Off, MatrixUnits::Emulated(16), MatrixUnits::Emulated(8)] {
            if matrix_units != MatrixUnits::Off && emulating(&device).is_none() {
                continue;
            }
            let plain = GpuOptions { matrix_units, ..GpuOptions::default() };
            let checked = GpuOptions { shader_checks: true, ..plain.clone() };
            let [plain, checked] =
                [plain, checked].map(|options| load(gpu_with(&device, &options), "llama-tied").run().unwrap());
            assert_eq!(plain, checked, "{matrix_units:?}");
        }
    }
}

/// Two sequences: what they have before the first draw, and where they go on.
const PROMPTS: [&[u32]; 2] = [&[5, 17, 80, 41, 9], &[66, 2, 31]];
const DRAWS: usize = 5;

/// The steps that draw [`DRAWS`] tokens of both sequences, with the tokens that `token` gives to all but the first. Outputs
/// are listed in another order than rows.
fn drawing(steps: usize, token: impl Fn(usize, usize) -> u32) -> Vec<(Vec<RowMeta>, Vec<OutputRow>)> {
    let row = |sequence: usize, position: usize, token: u32| RowMeta {
        token,
        position: position as u32,
        slot: ((sequence + 1) * KV_BLOCK + position) as u32,
        table: sequence as u32,
    };
    let want = |sequence: usize, step: usize| {
        let uniform = (0.37 + 0.61 * (2 * step + sequence) as f32).fract();
        // Hot: the model likes to repeat itself.
        let (inverse_temperature, top_k) = (0.1, [0, 20][sequence]);
        let request = sample::Request { uniform, inverse_temperature, top_k, ..sample::Request::default() };
        Want::Sample(Box::new(Sampling { request, edits: Vec::new(), mask: None, top: 0 }))
    };
    let step = |s: usize| {
        let mut rows = Vec::new();
        let mut last = [0, 0];
        for (sequence, prompt) in PROMPTS.iter().enumerate() {
            if s == 0 {
                rows.extend(prompt.iter().enumerate().map(|(p, &token)| row(sequence, p, token)));
            } else {
                rows.push(row(sequence, prompt.len() + s - 1, token(s, sequence)));
            }
            last[sequence] = rows.len() as u32 - 1;
        }
        (rows, [1, 0].map(|sequence| OutputRow { row: last[sequence], want: want(sequence, s) }).to_vec())
    };
    (0..steps).map(step).collect()
}

/// The output of a sequence in the list.
fn place(sequence: usize) -> usize {
    1 - sequence
}

/// Steps that take their tokens from the draws before them, without a word to the host, give what single steps give.
#[test]
fn steps_ahead_give_the_bits_of_single_steps() {
    for device in gpus() {
        // Tiles of 8 for attention: the model's heads are that small.
        for matrix_units in [MatrixUnits::Off, MatrixUnits::Emulated(16), MatrixUnits::Emulated(8)] {
            if matrix_units != MatrixUnits::Off && emulating(&device).is_none() {
                continue;
            }
            let options = GpuOptions { matrix_units, ..GpuOptions::default() };
            let gpu = Arc::new(gpu_with(&device, &options));
            let mut ahead = load(gpu.clone(), "llama-tied");
            let head_dim = ahead.head_dim;
            let all = drawing(DRAWS, |_, sequence| FROM_DRAW | place(sequence) as u32);
            let cos_sin: Vec<Vec<f32>> = all.iter().map(|(rows, _)| angles(rows.len(), head_dim)).collect();
            let steps: Vec<Step> = all
                .iter()
                .zip(&cos_sin)
                .map(|((rows, outputs), cos_sin)| Step { rows, tables: &[1, 2], cos_sin, outputs, adapters: &[] })
                .collect();
            let feeds = |o: &OutputRow| matches!(&o.want, Want::Sample(s) if ahead.executor.feeds(&s.request, s.top));
            assert!(steps.iter().all(|s| s.outputs.iter().all(feeds)));
            let together = ahead.executor.steps(&steps).unwrap();

            let mut single = load(gpu, "llama-tied");
            let mut drawn: Vec<[u32; 2]> = Vec::new();
            for s in 0..DRAWS {
                let (rows, outputs) = drawing(s + 1, |s, sequence| drawn[s - 1][sequence]).pop().unwrap();
                let step =
                    Step { rows: &rows, tables: &[1, 2], cos_sin: &cos_sin[s], outputs: &outputs, adapters: &[] };
                let results = single.executor.step(&step).unwrap();
                // All of it: the draws, log-probs, and how many tokens were kept.
                assert_eq!(results, together[s], "{matrix_units:?}, step {s}");
                drawn.push([0, 1].map(|sequence| match &results[place(sequence)] {
                    Output::Sampled { drawn, .. } => drawn.token,
                    other => panic!("{other:?}"),
                }));
            }
            let different: std::collections::HashSet<u32> = drawn.iter().flatten().copied().collect();
            assert!(different.len() > 3, "draws that say little: {drawn:?}");
        }
    }
}

/// The file in a folder, and its bytes.
fn cached(folder: &Path) -> Option<(std::path::PathBuf, Vec<u8>)> {
    let files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    assert!(files.len() < 2, "{files:?}");
    let file = files.into_iter().next()?;
    let bytes = std::fs::read(&file).unwrap();
    Some((file, bytes))
}

/// The driver's bytes behind the magic and their hash.
fn is_whole(bytes: &[u8]) -> bool {
    let data = bytes.get(16..).unwrap_or_default();
    bytes.starts_with(b"RRTPIPE1") && bytes.get(8..16) == Some(&xxh3_64(data).to_le_bytes())
}

/// A second start finds what the first one compiled; a file that is broken is as good as none, and is written anew.
#[test]
fn compiled_shaders_are_kept_and_never_trusted() {
    for device in gpus() {
        let folder = tempfile::tempdir().unwrap();
        let options = GpuOptions {
            shader_cache: Some(folder.path().to_owned()),
            matrix_units: MatrixUnits::Off,
            ..GpuOptions::default()
        };
        let start = || load(gpu_with(&device, &options), "llama-tied").run().unwrap();
        let want = start();
        let Some((file, bytes)) = cached(folder.path()) else {
            eprintln!("SKIPPED ON {device}: a shader cache, which the driver lacks");
            continue;
        };
        assert!(is_whole(&bytes));
        assert_eq!(start(), want);
        assert!(is_whole(&cached(folder.path()).unwrap().1));

        let flipped = |at: usize| {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            bytes
        };
        let last = bytes.len() - 1;
        let broken =
            [Vec::new(), bytes[..7].to_vec(), bytes[..15].to_vec(), bytes[..last].to_vec(), flipped(0), flipped(9)];
        for broken in broken.into_iter().chain([flipped(16), flipped(last), [bytes.clone(), vec![0]].concat()]) {
            assert!(!is_whole(&broken));
            std::fs::write(&file, &broken).unwrap();
            assert_eq!(start(), want, "{} bytes", broken.len());
            assert!(is_whole(&cached(folder.path()).unwrap().1), "a broken file is replaced");
        }
    }
}

/// A folder that cannot be written costs time, not results.
#[test]
fn a_cache_that_cannot_be_written_is_no_error() {
    for device in gpus() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let folder = Some(file.path().join("below a file"));
        let options = GpuOptions { shader_cache: folder, matrix_units: MatrixUnits::Off, ..GpuOptions::default() };
        assert_eq!(load(gpu_with(&device, &options), "llama-tied").run().unwrap().len(), 12);
    }
}

/// Seven dispatches a layer; eight where segments of keys are joined.
#[test]
fn the_profile_counts_every_dispatch() {
    const LAYERS: u64 = 2;
    for device in gpus() {
        let [plain, tiles] = [(MatrixUnits::Off, "attention"), (MatrixUnits::Emulated(8), "attention_tiles")];
        for (position, joined, (matrix_units, attention)) in
            [(20, 0, plain), (1100, LAYERS, plain), (20, 0, tiles), (1100, LAYERS, tiles)]
        {
            if matrix_units != MatrixUnits::Off && emulating(&device).is_none() {
                continue;
            }
            let gpu = gpu_with(&device, &GpuOptions { matrix_units, ..GpuOptions::default() });
            let mut loaded = load_with(Arc::new(gpu), "llama-tied", Capacity { max_rows: 4, kv_blocks: 70 });
            if let Err(error) = loaded.executor.set_profiling(true) {
                assert_eq!(error.kind(), ErrorKind::Unsupported);
                eprintln!("SKIPPED ON {device}: {error}");
                continue;
            }
            assert!(loaded.executor.take_profile().is_empty());
            let rows = [RowMeta { token: 3, position, slot: position, table: 0 }];
            let tables: Vec<u32> = (0..69).collect();
            let outputs = [OutputRow { row: 0, want: Want::Logprob { target: 4, top: 0 } }];
            let cos_sin = angles(1, loaded.head_dim);
            let step = Step { rows: &rows, tables: &tables, cos_sin: &cos_sin, outputs: &outputs, adapters: &[] };
            loaded.executor.step(&step).unwrap();
            let mut profile = loaded.executor.take_profile();
            assert!(profile.iter().all(|k| k.calls > 0 && k.seconds >= 0.0), "{profile:?}");
            profile.retain(|k| k.name != "encode (host)");
            assert!(profile.iter().all(|k| k.bytes > 0), "{profile:?}");
            let calls = |name: &str| profile.iter().find(|k| k.name == name).map_or(0, |k| k.calls);
            let in_layers = [("rms_norm", 2), ("linear_qkv", 1), (attention, 1), ("linear", 2), ("linear_gated", 1)];
            assert_eq!(in_layers.iter().map(|(_, calls)| calls).sum::<u64>(), 7);
            for (name, a_layer) in in_layers {
                // The final norm is one more.
                let outside = u64::from(name == "rms_norm");
                assert_eq!(calls(name), a_layer * LAYERS + outside, "{name}: {profile:?}");
            }
            assert_eq!(calls("attention_join"), joined, "{profile:?}");
            for name in ["embed", "gather_rows", "head", "log_sum_exp"] {
                assert_eq!(calls(name), 1, "{name}: {profile:?}");
            }
            let total: u64 = profile.iter().map(|k| k.calls).sum();
            assert_eq!(total, 7 * LAYERS + joined + 5, "{profile:?}");
            assert!(loaded.executor.take_profile().is_empty());
        }
    }
}

/// A step of more dispatches than a set of timestamps has room for: all of them are timed.
#[test]
fn the_profile_counts_more_dispatches_than_a_query_set_holds() {
    const LAYERS: u64 = 300;
    let folder = tempfile::tempdir().unwrap();
    let (config, model) = (folder.path().join("config.json"), folder.path().join("model"));
    let text = std::fs::read_to_string(golden("llama-tied").join("config.json")).unwrap();
    let layers = text.replace("\"num_hidden_layers\": 2", &format!("\"num_hidden_layers\": {LAYERS}"));
    assert_ne!(text, layers);
    std::fs::write(&config, layers).unwrap();
    let mut synth = std::process::Command::new(env!("CARGO_BIN_EXE_rewardrt"));
    assert!(synth.arg("synth").arg(&config).arg("--out").arg(&model).status().unwrap().success());
    for device in gpus() {
        let capacity = Capacity { max_rows: 1, kv_blocks: 1 };
        let mut loaded = load_folder(Arc::new(gpu(&device)), &model, &LoadOptions::default(), capacity);
        if let Err(error) = loaded.executor.set_profiling(true) {
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            eprintln!("SKIPPED ON {device}: {error}");
            continue;
        }
        let rows = [RowMeta { token: 3, position: 0, slot: 0, table: 0 }];
        let outputs = [OutputRow { row: 0, want: Want::Logprob { target: 4, top: 0 } }];
        let cos_sin = angles(1, loaded.head_dim);
        let step = Step { rows: &rows, tables: &[0], cos_sin: &cos_sin, outputs: &outputs, adapters: &[] };
        let timed = loaded.executor.step(&step).unwrap();
        let mut profile = loaded.executor.take_profile();
        profile.retain(|k| k.name != "encode (host)");
        assert_eq!(profile.iter().map(|k| k.calls).sum::<u64>(), 7 * LAYERS + 5, "{profile:?}");
        loaded.executor.set_profiling(false).unwrap();
        assert_eq!(loaded.executor.step(&step).unwrap(), timed);
    }
}

/// A lost device is an error of every later call, not a panic and not a wait.
#[test]
fn a_lost_device_is_an_error() {
    for device in gpus() {
        let gpu = Arc::new(gpu(&device));
        let mut loaded = load(gpu.clone(), "llama-tied");
        loaded.run().unwrap();
        gpu.destroy();
        let start = std::time::Instant::now();
        for _ in 0..2 {
            assert_eq!(loaded.run().unwrap_err().kind(), ErrorKind::DeviceLost);
        }
        assert!(start.elapsed().as_secs() < 2);
    }
}
