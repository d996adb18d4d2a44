//! From safetensors files to validated tensors.
//!
//! [`Checkpoint::open`] reads headers only. [`Checkpoint::claim`] compares them with what a model expects and reports
//! every difference at once; only the [`Weights`] it returns give access to bytes, so no byte is used before its
//! name, dtype and shape were checked. Nothing is copied: the bytes stay in the memory map.

mod dtype;
mod header;
mod shards;
mod source;

pub(crate) use shards::read_bounded;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

pub use dtype::Dtype;
pub use header::Limits as HeaderLimits;
use source::FileBytes;

use crate::error::{Error, ErrorKind, Result};

/// How a checkpoint is opened.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Map the files (default) or read them into memory. A mapped file must not be changed by others while it is
    /// in use; truncating it can end the process with SIGBUS. `false` removes that hazard for one copy of the bytes.
    pub use_mmap: bool,
    /// Bounds on what a header may claim.
    pub limits: HeaderLimits,
}

impl Default for LoadOptions {
    fn default() -> Self {
        LoadOptions { use_mmap: true, limits: HeaderLimits::default() }
    }
}

/// How the weights of products are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As stored in the checkpoint; the CPU uses them where they are mapped.
    #[default]
    Stored,
    /// Quantised to 8 bits on load: symmetric, one scale for [`crate::kernels::linear::INT8_BLOCK`] elements of a row.
    /// Half the bytes of bf16 to read a token, for decoding that is bound by memory; to hold they come on top of the
    /// checkpoint's own, mapped or read. Embeddings, norms, biases and score heads stay as stored.
    Int8,
    /// The same with 4 bits, one scale for [`crate::kernels::linear::INT4_BLOCK`] elements: 5 bits a weight.
    Int4,
}

/// One tensor as its header describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The dtype's name in the file, for instance `BF16`.
    pub dtype: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    /// Size in the file.
    pub bytes: usize,
}

struct Entry {
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

/// The headers of a model's safetensors files: names, dtypes and shapes, not yet bytes.
pub struct Checkpoint {
    files: Vec<Arc<FileBytes>>,
    entries: BTreeMap<String, Entry>,
}

/// A tensor that a model needs.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Its name in the checkpoint.
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
}

impl Checkpoint {
    /// Opens one `.safetensors` file, or a folder with `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// `Io` when a file cannot be read; `Format` when a header or the index breaks a rule of the format; `Limit` when
    /// it claims more than `options.limits` allows.
    pub fn open(path: &Path, options: &LoadOptions) -> Result<Self> {
        let layout = shards::Layout::find(path, &options.limits)?;
        let mut checkpoint = Checkpoint { files: Vec::new(), entries: BTreeMap::new() };
        for file in &layout.files {
            checkpoint.add_file(file, options)?;
        }
        layout.check(|name| checkpoint.entries.get(name).map(|e| checkpoint.files[e.file].path()))?;
        Ok(checkpoint)
    }

    fn add_file(&mut self, path: &Path, options: &LoadOptions) -> Result<()> {
        let bytes = FileBytes::open(path, options.use_mmap)?;
        let place = path.display();
        let parsed = header::parse(bytes.as_slice(), &options.limits).map_err(|e| e.at(&place))?;
        bytes.check_unchanged()?;
        let file = self.files.len();
        for tensor in parsed {
            let header::Tensor { name, dtype, shape, range } = tensor;
            if let Some(other) = self.entries.get(&name) {
                let other = self.files[other.file].path().display();
                return Err(Error::format(format!("{place}: tensor {name:?} is also in {other}")));
            }
            self.entries.insert(name, Entry { file, dtype, shape, range });
        }
        self.files.push(Arc::new(bytes));
        Ok(())
    }

    /// Every tensor, in name order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, TensorInfo)> {
        self.entries.iter().map(|(name, e)| {
            let info = TensorInfo { dtype: e.dtype.to_string(), shape: e.shape.clone(), bytes: e.range.len() };
            (name.as_str(), info)
        })
    }

    /// True if the checkpoint has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The bytes of all tensors together.
    pub fn total_bytes(&self) -> usize {
        self.entries.values().map(|e| e.range.len()).sum()
    }

    /// Compares the checkpoint with what a model expects, and opens the bytes if they agree.
    ///
    /// `may_ignore` names tensors that carry no information (see [`crate::model`]); any other tensor that nobody
    /// asked for is an error, since it is how a reward model loads silently wrong.
    ///
    /// # Errors
    /// `Shape`, listing every missing, superfluous and mis-shaped tensor; `Unsupported` if the only trouble is a
    /// dtype other than F32, F16 and BF16.
    pub fn claim(self, expected: &[Expected], may_ignore: impl Fn(&str) -> bool) -> Result<Weights> {
        let mut problems = Vec::new();
        let mut dtype_only = true;
        let mut tensors = HashMap::new();
        for want in expected {
            let Some(entry) = self.entries.get(&want.name) else {
                problems.push(format!("missing tensor {:?} of shape {:?}", want.name, want.shape));
                dtype_only = false;
                continue;
            };
            if entry.shape != want.shape {
                problems.push(format!(
                    "tensor {:?} has shape {:?}, the config asks for {:?}",
                    want.name, entry.shape, want.shape
                ));
                dtype_only = false;
                continue;
            }
            match Dtype::from_safetensors(entry.dtype) {
                Some(dtype) => {
                    let file = self.files[entry.file].clone();
                    let shape = entry.shape.clone();
                    tensors.insert(want.name.clone(), Tensor { dtype, shape, file, range: entry.range.clone() });
                }
                None => problems.push(format!(
                    "tensor {:?} has dtype {}; this version reads F32, F16 and BF16",
                    want.name, entry.dtype
                )),
            }
        }
        for name in self.entries.keys() {
            if !expected.iter().any(|want| want.name == *name) && !may_ignore(name) {
                problems.push(format!("tensor {name:?} is in the checkpoint, but the architecture has no such tensor"));
                dtype_only = false;
            }
        }
        if problems.is_empty() {
            for file in &self.files {
                file.check_unchanged()?;
            }
            return Ok(Weights { tensors });
        }
        let kind = if dtype_only { ErrorKind::Unsupported } else { ErrorKind::Shape };
        let count = problems.len();
        Err(Error::new(
            kind,
            format!("the checkpoint does not fit its config ({count} differences):\n  {}", problems.join("\n  ")),
        ))
    }

    /// True if two tensors have the same dtype, shape and bytes.
    pub(crate) fn same_bytes(&self, a: &str, b: &str) -> bool {
        let view = |name: &str| {
            let e = self.entries.get(name)?;
            Some((e.dtype, &e.shape, &self.files[e.file].as_slice()[e.range.clone()]))
        };
        matches!((view(a), view(b)), (Some(a), Some(b)) if a == b)
    }
}

/// A tensor whose name, dtype and shape were checked. Cheap to clone; keeps its file mapped.
#[derive(Clone)]
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    file: Arc<FileBytes>,
    range: std::ops::Range<usize>,
}

impl Tensor {
    /// How one element is stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, little endian, row major. Not necessarily aligned to the element size.
    pub fn bytes(&self) -> &[u8] {
        &self.file.as_slice()[self.range.clone()]
    }

    /// The elements as f32; exact for every dtype.
    pub fn to_f32(&self) -> Vec<f32> {
        self.dtype.to_f32(self.bytes())
    }
}

/// The tensors that a model asked for and that passed the check.
pub struct Weights {
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// A tensor that was claimed.
    ///
    /// # Errors
    /// `Internal` if `name` was not among the claimed ones.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::internal(format!("tensor {name:?} was never claimed")))
    }
}
