//! From safetensors files to validated tensors.
//!
//! [`Checkpoint::open`] reads headers only. [`Checkpoint::claim`] compares them with what a model expects and reports
//! every difference at once; only the [`Weights`] it returns give access to bytes, so no byte is used before its
//! name, dtype and shape were checked. Nothing is copied: the bytes stay in the memory map.

mod adapter;
mod buffer;
mod delta;
mod dtype;
mod header;
mod publish;
mod shards;
mod source;
mod staging;
mod transfer;

pub(crate) use shards::read_bounded;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

pub(crate) use adapter::AdapterLayout;
pub use adapter::{AdapterCheckpoint, AdapterWeights, LowRank};
use buffer::Buffer;
pub use delta::{Delta, DeltaOptions, DeltaReport, DeltaTensor, Encoding, write_delta};
pub use dtype::Dtype;
pub use header::Limits as HeaderLimits;
pub use publish::{PartialFolder, publish};
use source::FileBytes;
pub use staging::TensorData;
pub(crate) use staging::{Staging, StagingRules};

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
        Self::from_layout(&shards::Layout::find(path, &options.limits)?, options)
    }

    fn from_layout(layout: &shards::Layout, options: &LoadOptions) -> Result<Self> {
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

    /// A tensor of a dtype that models use, as it is in its file; `None` if there is none of this name.
    ///
    /// # Errors
    /// `Unsupported` for another dtype.
    pub(crate) fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(entry) = self.entries.get(name) else { return Ok(None) };
        let dtype = Dtype::from_safetensors(entry.dtype).ok_or_else(|| {
            Error::unsupported(format!(
                "tensor {name:?} has dtype {}; this version reads F32, F16 and BF16",
                entry.dtype
            ))
        })?;
        let place = Place::File(self.files[entry.file].clone(), entry.range.clone());
        Ok(Some(Tensor { dtype, shape: entry.shape.clone(), place }))
    }

    /// Fails if a file is no longer what it was when it was opened.
    pub(crate) fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(|file| file.check_unchanged())
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
                    let place = Place::File(self.files[entry.file].clone(), entry.range.clone());
                    tensors.insert(want.name.clone(), Tensor { dtype, shape: entry.shape.clone(), place });
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

/// Where a tensor's bytes are.
#[derive(Clone)]
enum Place {
    File(Arc<FileBytes>, std::ops::Range<usize>),
    Memory(Arc<Buffer>),
}

/// A tensor whose name, dtype and shape were checked. Cheap to clone; keeps its file mapped.
#[derive(Clone)]
pub struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    place: Place,
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
        match &self.place {
            Place::File(file, range) => &file.as_slice()[range.clone()],
            Place::Memory(buffer) => buffer.as_slice(),
        }
    }

    /// The elements as f32; exact for every dtype.
    pub fn to_f32(&self) -> Vec<f32> {
        self.dtype.to_f32(self.bytes())
    }

    /// True if its bytes are in a mapped file, which costs no memory of its own.
    pub fn is_mapped(&self) -> bool {
        matches!(&self.place, Place::File(file, _) if file.is_mapped())
    }

    /// True if its bytes are in memory that can be written.
    pub(crate) fn is_in_memory(&self) -> bool {
        matches!(self.place, Place::Memory(_))
    }

    /// The same dtype and shape with zeroed memory of its own.
    pub(crate) fn blank(&self, name: &str) -> Result<Tensor> {
        let buffer = Buffer::new(&format!("tensor {name:?}"), self.bytes().len())?;
        Ok(Tensor { place: Place::Memory(Arc::new(buffer)), ..self.clone() })
    }

    /// Its bytes, to be written; `None` if they are in a file or somebody else uses them.
    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.place {
            Place::Memory(buffer) => Some(Arc::get_mut(buffer)?.as_mut_slice()),
            Place::File(..) => None,
        }
    }
}

/// A mapped file. Cheap to clone; keeps the file mapped.
#[derive(Clone)]
pub(crate) struct Map(Arc<FileBytes>);

impl Map {
    /// The whole file.
    pub(crate) fn bytes(&self) -> &[u8] {
        self.0.as_slice()
    }
}

/// The tensors that a model asked for and that passed the check. Cheap to clone.
#[derive(Clone)]
pub struct Weights {
    tensors: HashMap<String, Tensor>,
}

impl Weights {
    /// A tensor that was claimed.
    ///
    /// # Errors
    /// `Internal` if `name` was not among the claimed ones.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| Error::internal(format!("tensor {name:?} was never claimed")))
    }

    /// A tensor that may not be there.
    pub(crate) fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// Takes a tensor's place; a tensor of this name was there before.
    pub(crate) fn replace(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// Every tensor, in no order.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&String, &Tensor)> {
        self.tensors.iter()
    }

    /// A tensor to be written in place.
    pub(crate) fn find_mut(&mut self, name: &str) -> Option<&mut Tensor> {
        self.tensors.get_mut(name)
    }

    /// Bytes of the tensors that are not in a mapped file.
    pub(crate) fn bytes_in_memory(&self) -> u64 {
        self.tensors.values().filter(|t| !t.is_mapped()).map(|t| t.bytes().len() as u64).sum()
    }

    /// The map that `bytes` are a part of, and where in it they are; `None` if they were read, or come from elsewhere.
    pub(crate) fn map_of(&self, bytes: &[u8]) -> Option<(Map, std::ops::Range<usize>)> {
        let bytes = bytes.as_ptr_range();
        self.tensors.values().find_map(|t| {
            let Place::File(file, _) = &t.place else { return None };
            let whole = file.as_slice().as_ptr_range();
            let start = bytes.start.addr().checked_sub(whole.start.addr())?;
            let range = start..start + (bytes.end.addr() - bytes.start.addr());
            (file.is_mapped() && bytes.end <= whole.end).then(|| (Map(file.clone()), range))
        })
    }
}
