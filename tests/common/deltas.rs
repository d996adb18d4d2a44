//! Checkpoints and deltas as bytes, to be compared and damaged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rewardrt::Error;
use rewardrt::weights::{Delta, DeltaOptions, DeltaReport, Dtype, Encoding, LoadOptions, write_delta};
use serde_json::{Value, json};

pub const INDEX: &str = "model.safetensors.index.json";
pub const FILE: &str = "model-00000-of-00001.safetensors";

/// Dtype, shape, bytes.
pub type Tensors = BTreeMap<String, (String, Vec<usize>, Vec<u8>)>;

/// A safetensors file with this `__metadata__`.
pub fn file(metadata: &Value, tensors: &Tensors) -> Vec<u8> {
    let mut header = json!({"__metadata__": metadata});
    let mut data = Vec::new();
    for (name, (dtype, shape, bytes)) in tensors {
        let ends = [data.len(), data.len() + bytes.len()];
        header[name] = json!({"dtype": dtype, "shape": shape, "data_offsets": ends});
        data.extend_from_slice(bytes);
    }
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

pub fn parts(file: &[u8]) -> (Value, Tensors) {
    let (length, rest) = file.split_first_chunk().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, Value> = serde_json::from_slice(header).unwrap();
    let number = |v: &Value| v.as_u64().unwrap() as usize;
    let mut tensors = Tensors::new();
    for (name, entry) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let shape = entry["shape"].as_array().unwrap().iter().map(number).collect();
        let bytes = data[number(&entry["data_offsets"][0])..number(&entry["data_offsets"][1])].to_vec();
        tensors.insert(name.clone(), (entry["dtype"].as_str().unwrap().into(), shape, bytes));
    }
    (header.get("__metadata__").cloned().unwrap_or_default(), tensors)
}

pub fn read(path: &Path) -> Tensors {
    parts(&std::fs::read(path).unwrap()).1
}

pub fn write(path: &Path, tensors: &Tensors) -> PathBuf {
    std::fs::write(path, file(&json!({"format": "pt"}), tensors)).unwrap();
    path.to_owned()
}

/// The checkpoint that `delta` makes of `base`.
pub fn applied(delta: &Delta, base: &Tensors) -> Result<Tensors, Error> {
    let mut result = base.clone();
    for tensor in delta.tensors() {
        let (_, _, bytes) = &base[tensor.name];
        let mut out = vec![0xaa; bytes.len()];
        delta.apply(tensor.name, bytes, &mut out)?;
        result.get_mut(tensor.name).unwrap().2 = out;
    }
    Ok(result)
}

pub fn open(folder: &Path) -> Result<Delta, Error> {
    let mapped = Delta::open(folder, &LoadOptions::default());
    let read = Delta::open(folder, &LoadOptions { use_mmap: false, ..LoadOptions::default() });
    assert_eq!(mapped.as_ref().err().map(Error::kind), read.as_ref().err().map(Error::kind));
    mapped
}

/// Numbers that look random, the same in every run.
pub fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    }
}

/// Weights of every dtype and of odd sizes.
pub fn checkpoint() -> Tensors {
    let mut next = random(1);
    let mut tensors = Tensors::new();
    let shapes: [(&str, &[usize]); 5] =
        [("matrix", &[37, 129]), ("row", &[1001]), ("one", &[1]), ("scalar", &[]), ("empty", &[0, 4])];
    for dtype in Dtype::ALL {
        for (name, shape) in shapes {
            let values: Vec<f32> =
                (0..shape.iter().product::<usize>()).map(|_| (next() % 2001) as f32 / 1e5 - 0.01).collect();
            tensors.insert(
                format!("{}.{name}", dtype.name()),
                (dtype.name().into(), shape.to_vec(), dtype.from_f32(&values)),
            );
        }
    }
    // A quantised checkpoint has bytes; the same for half an MiB, so that a frame has several parts and blocks.
    tensors.insert("bytes".into(), ("U8".into(), vec![7], (0..7).collect()));
    tensors.insert("large".into(), ("I8".into(), vec![600_001], (0..600_001).map(|_| next() as u8).collect()));
    tensors
}

/// Changes one byte in `every`.
pub fn changed(old: &Tensors, every: u64) -> Tensors {
    let (mut next, mut new) = (random(2), old.clone());
    for (_, (_, _, bytes)) in new.iter_mut().filter(|(name, _)| !name.ends_with("row")) {
        for byte in bytes {
            if next().is_multiple_of(every) {
                *byte ^= 1 + (next() % 255) as u8;
            }
        }
    }
    new
}

pub const ENCODINGS: [Encoding; 2] = [Encoding::Xor, Encoding::Overwrite];

pub struct Pair {
    pub folder: tempfile::TempDir,
    pub old: PathBuf,
    pub new: PathBuf,
}

impl Pair {
    pub fn new(old: &Tensors, new: &Tensors) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) =
            (write(&folder.path().join("old.safetensors"), old), write(&folder.path().join("new.safetensors"), new));
        Pair { folder, old, new }
    }

    pub fn out(&self) -> PathBuf {
        self.folder.path().join("delta")
    }

    pub fn write(&self, options: &DeltaOptions) -> Result<DeltaReport, Error> {
        write_delta(&self.old, &self.new, &self.out(), options, |_, _| {})
    }

    /// A delta of small tensors, to be damaged.
    pub fn small(encoding: Encoding) -> (Self, Tensors) {
        let old: Tensors = BTreeMap::from([
            ("a".into(), ("BF16".into(), vec![8, 50], (0..800).map(|i| (i * 7) as u8).collect())),
            ("b".into(), ("F32".into(), vec![3], vec![1; 12])),
        ]);
        let mut new = old.clone();
        new.values_mut().for_each(|(_, _, bytes)| bytes.iter_mut().step_by(9).for_each(|b| *b = !*b));
        let pair = Pair::new(&old, &new);
        pair.write(&DeltaOptions { encoding, ..DeltaOptions::default() }).unwrap();
        (pair, old)
    }

    pub fn edit_index(&self, change: impl FnOnce(&mut Value)) {
        let path = self.out().join(INDEX);
        let mut index = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut index);
        std::fs::write(path, index.to_string()).unwrap();
    }

    pub fn edit_file(&self, change: impl FnOnce(&mut Value, &mut Tensors)) {
        let path = self.out().join(FILE);
        let (mut metadata, mut tensors) = parts(&std::fs::read(&path).unwrap());
        change(&mut metadata, &mut tensors);
        std::fs::write(path, file(&metadata, &tensors)).unwrap();
    }

    /// Replaces the frame of "a".
    pub fn edit_frame(&self, change: impl FnOnce(&[u8]) -> Vec<u8>) {
        self.edit_file(|_, tensors| {
            let (_, shape, bytes) = tensors.get_mut("a").unwrap();
            *bytes = change(bytes);
            *shape = vec![bytes.len()];
        });
    }
}
