//! `rewardrt synth`: a checkpoint of random weights, so that a machine can time a model that it has not got.
//!
//! A value is the sum of four random bytes, centred and scaled: a bell with the asked standard deviation that never goes
//! beyond 3.5 of them. The sum has 1021 values, so a table holds each as it is stored, and the same seed gives the same
//! numbers on every machine and in every dtype, up to rounding.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use rewardrt::model::{Plan, parse_config};
use rewardrt::weights::{Dtype, Expected, PartialFolder};
use rewardrt::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

use crate::args::Synth;
use crate::sink::print_line;

/// Bytes that are made, then written, at a time.
const CHUNK: usize = 1 << 20;
const MAX_CONFIG: u64 = 1 << 20;
/// What transformers initialises weights with.
const DEVIATION: f32 = 0.02;
/// The largest sum of four bytes.
const LARGEST: usize = 4 * 255;

pub fn run(args: &Synth) -> Result<()> {
    let config = read_config(&args.config)?;
    let spec = parse_config(&config, None).map_err(|e| e.at(args.config.display()))?;
    let plan = Plan::new(&spec)?;
    let begin = Instant::now();
    let folder = PartialFolder::create(&args.out)?;
    let in_folder = |name: &str| folder.path().join(name);
    fs::write(in_folder("config.json"), &config).map_err(|e| failed(&in_folder("config.json"), &e))?;
    let weights = in_folder("model.safetensors");
    let tensors: Vec<Expected> = plan.expected().cloned().collect();
    let bytes = write_weights(&weights, &tensors, args.dtype.into(), args.seed).map_err(|e| failed(&weights, &e))?;
    folder.publish()?;
    let seconds = begin.elapsed().as_secs_f64();
    print_line(&format!(
        "{}: {} of random {} weights, {:.1} MB in {seconds:.1} s",
        args.out.display(),
        spec.architecture,
        Dtype::from(args.dtype).name(),
        bytes as f64 / 1e6
    ))
}

fn failed(path: &Path, error: &io::Error) -> Error {
    let kind = if error.kind() == io::ErrorKind::NotFound { ErrorKind::NotFound } else { ErrorKind::Io };
    Error::new(kind, format!("{}: {error}", path.display()))
}

fn read_config(path: &Path) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|e| failed(path, &e))?;
    file.take(MAX_CONFIG + 1).read_to_end(&mut text).map_err(|e| failed(path, &e))?;
    if text.len() as u64 > MAX_CONFIG {
        return Err(Error::new(
            ErrorKind::Limit,
            format!("{}: more than {MAX_CONFIG} bytes; a config.json is smaller", path.display()),
        ));
    }
    Ok(text)
}

/// Writes an adapter of random factors of every product into a folder that is there, as PEFT would.
pub fn write_adapter(folder: &Path, plan: &Plan, rank: usize, seed: u64) -> Result<()> {
    let (mut tensors, mut modules) = (Vec::new(), Vec::new());
    for id in plan.projections() {
        let Expected { name, shape } = &plan.matrices[id.0];
        let module = name.trim_end_matches(".weight");
        modules.push(module);
        for (factor, shape) in [("A", vec![rank, shape[1]]), ("B", vec![shape[0], rank])] {
            tensors.push(Expected { name: format!("base_model.model.{module}.lora_{factor}.weight"), shape });
        }
    }
    let config = json!({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}).to_string();
    let (config_path, path) = (folder.join("adapter_config.json"), folder.join("adapter_model.safetensors"));
    fs::write(&config_path, config).map_err(|e| failed(&config_path, &e))?;
    write_weights(&path, &tensors, Dtype::BF16, seed).map_err(|e| failed(&path, &e))?;
    Ok(())
}

/// Writes every tensor; returns the file's size.
fn write_weights(path: &Path, tensors: &[Expected], dtype: Dtype, seed: u64) -> io::Result<u64> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut end = 0u64;
    for tensor in tensors {
        let start = end;
        end += tensor.shape.iter().product::<usize>() as u64 * dtype.size() as u64;
        let entry = json!({"dtype": dtype.name(), "shape": tensor.shape, "data_offsets": [start, end]});
        header.insert(tensor.name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // The data begins at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = File::create_new(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    match dtype {
        Dtype::F32 => write_data::<4>(&mut file, tensors, dtype, seed)?,
        Dtype::F16 | Dtype::BF16 => write_data::<2>(&mut file, tensors, dtype, seed)?,
    }
    Ok(8 + header.len() as u64 + end)
}

/// Writes the elements, N bytes each, of every tensor.
fn write_data<const N: usize>(file: &mut File, tensors: &[Expected], dtype: Dtype, seed: u64) -> io::Result<()> {
    let (around_0, around_1) = (table::<N>(dtype, 0.0), table::<N>(dtype, 1.0));
    let mut chunk = Vec::with_capacity(CHUNK);
    for (i, tensor) in tensors.iter().enumerate() {
        let is_norm = tensor.shape.len() == 1 && !tensor.name.ends_with(".bias");
        let values = if is_norm { &around_1 } else { &around_0 };
        let random = Random::new(seed, i as u64);
        let elements = tensor.shape.iter().product::<usize>() as u64;
        for first in (0..elements).step_by(CHUNK / N) {
            fill(values, &random, first..elements.min(first + (CHUNK / N) as u64), &mut chunk);
            file.write_all(&chunk)?;
        }
    }
    Ok(())
}

/// Numbers by their index: SplitMix64 at any place of its sequence.
struct Random {
    start: u64,
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function: neighbours become unlike numbers.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    /// A sequence for each seed and tensor.
    fn new(seed: u64, tensor: u64) -> Self {
        Random { start: mix(mix(seed.wrapping_add(GOLDEN)).wrapping_add(tensor.wrapping_mul(GOLDEN))) }
    }

    /// The number `i` as two sums of four bytes each.
    fn sums(&self, i: u64) -> [usize; 2] {
        let bytes = mix(self.start.wrapping_add(i.wrapping_mul(GOLDEN)));
        let pairs = (bytes & 0x00ff_00ff_00ff_00ff) + ((bytes >> 8) & 0x00ff_00ff_00ff_00ff);
        let sums = (pairs & 0x0000_ffff_0000_ffff) + ((pairs >> 16) & 0x0000_ffff_0000_ffff);
        [sums as u32 as usize, (sums >> 32) as usize]
    }
}

/// The stored bytes of each sum.
fn table<const N: usize>(dtype: Dtype, mean: f32) -> [[u8; N]; LARGEST + 1] {
    // A byte's variance is (256² − 1) / 12.
    let scale = DEVIATION / (4.0 * 65535.0f32 / 12.0).sqrt();
    let values: Vec<f32> = (0..=LARGEST).map(|sum| mean + scale * (sum as f32 - LARGEST as f32 / 2.0)).collect();
    let stored = dtype.from_f32(&values);
    std::array::from_fn(|sum| std::array::from_fn(|byte| stored[sum * N + byte]))
}

/// Sets `out` to the elements, which begin at an even one.
fn fill<const N: usize>(values: &[[u8; N]; LARGEST + 1], random: &Random, elements: Range<u64>, out: &mut Vec<u8>) {
    let bytes = (elements.end - elements.start) as usize * N;
    out.resize(bytes.next_multiple_of(2 * N), 0);
    for (pair, i) in out.chunks_exact_mut(2 * N).zip(elements.start / 2..) {
        let [first, second] = random.sums(i);
        pair[..N].copy_from_slice(&values[first]);
        pair[N..].copy_from_slice(&values[second]);
    }
    out.truncate(bytes);
}
