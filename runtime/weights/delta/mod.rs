//! Deltas: what changed between two checkpoints, in the format of slime's disk synchronisation.
//!
//! A step of reinforcement learning changes few bits of few weights, so the difference compresses to a few percent of a
//! checkpoint. The format is slime's (`docs/en/advanced/delta-weight-sync.md`, `update_weight_from_disk_delta.py`, and
//! `local_checkpoint.py` of its engine): a folder
//!
//! ```text
//! weight_v000007/
//!   model.safetensors.index.json
//!     metadata.version             "000007"
//!     metadata.base_version        "000006"
//!     metadata.delta_encoding      "xor" | "overwrite"
//!     metadata.compression_format  "zstd"
//!     metadata.checksum_format     "xxh3-128" | "adler32"
//!     weight_map                   tensor → file, of the tensors that changed; {} if none did
//!     tensors                      ours: tensor → {"dtype", "shape"} of the checkpoint; slime neither writes nor reads it
//!   model-00000-of-00001.safetensors
//!     __metadata__                 tensor → checksum of its new bytes, in hexadecimal
//!     TENSOR                       U8, one dimension: a zstd frame
//! ```
//!
//! Both encodings know bytes, not elements. A frame of `xor` holds as many bytes as the tensor, new ⊕ old. A frame of
//! `overwrite` holds n (u32, little endian), the n positions of changed bytes (u32 each), then the n new bytes; it can be
//! applied to what it made already. A tensor that did not change is left out. A folder whose index has no
//! `delta_encoding` is a whole checkpoint, with which a chain begins anew ([`Delta::is_delta`] tells).
//!
//! What slime leaves open, or does not check, and what we decided:
//! - Versions are digits, or a JSON integer, as slime's `int()` reads both. A folder called `weight_vNNNNNN` must hold that version.
//! - Every tensor of a file must be in `weight_map`, and have a checksum. (slime applies whatever the files hold.)
//! - A frame must hold exactly the bytes that the tensor has, must end where the tensor ends, and may not want a window
//!   above 8 MiB, which levels 1 to 19 keep to. What a frame's header claims is never used.
//! - Where `tensors` is there, it must list the tensors of `weight_map`, and [`Delta::check_base`] compares dtypes and shapes.
//! - `blake3` checksums are refused by name: a dependency more, and against damage xxh3-128 does.
//! - `overwrite` of a tensor above 4 GiB is refused when writing: slime's positions would wrap.

mod checksum;
mod decode;
mod encode;
mod index;
mod write;

use std::collections::BTreeMap;
use std::path::Path;

use super::{Checkpoint, LoadOptions, header, shards};
use crate::error::{Error, ErrorKind, Result};
use checksum::Checksum;
pub use index::Encoding;
use index::{Declared, Index};
pub use write::{DeltaOptions, DeltaReport, write_delta};

/// A delta folder whose index, headers and checksums were checked. No frame has been decompressed yet.
pub struct Delta {
    index: Index,
    /// The files; their tensors are frames.
    frames: Checkpoint,
    checksums: BTreeMap<String, Checksum>,
}

/// One changed tensor, as a delta describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaTensor<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// The dtype and the shape in the checkpoint, outermost dimension first. Our deltas have them, slime's do not.
    pub layout: Option<(String, &'a [usize])>,
    /// How its change is written; the same for all tensors of a delta.
    pub encoding: Encoding,
    /// Bytes of its frame.
    pub encoded_bytes: usize,
}

impl Delta {
    /// Opens a delta folder and checks all of it but the frames.
    ///
    /// # Errors
    /// `Io` or `NotFound` when a file cannot be read; `Format` when the index, a header or a checksum breaks a rule, or the
    /// folder holds a whole checkpoint; `Unsupported` for another encoding, compression or checksum; `Limit` when a
    /// header claims more than `options.limits` allows.
    pub fn open(folder: &Path, options: &LoadOptions) -> Result<Delta> {
        let (path, text) = index::read(folder, &options.limits)?;
        let index = Index::parse(&text, folder, &options.limits).map_err(|e| e.at(path.display()))?;
        let layout = shards::Layout::from_index(folder, path, &text, &options.limits)?;
        let frames = Checkpoint::from_layout(&layout, options)?;
        let mut delta = Delta { index, frames, checksums: BTreeMap::new() };
        delta.check_frames(&layout)?;
        delta.check_declared().map_err(|e| e.at(folder.display()))?;
        Ok(delta)
    }

    /// True if `folder` holds a delta, false if it holds anything else: a whole checkpoint has no `delta_encoding`.
    ///
    /// # Errors
    /// `Format`, `Limit` or `Io` if there is an index that cannot be read.
    pub fn is_delta(folder: &Path, options: &LoadOptions) -> Result<bool> {
        match index::read(folder, &options.limits) {
            Ok((path, text)) => shards::names_delta(&text).map_err(|e| e.at(path.display())),
            Err(e) if e.kind() == ErrorKind::NotFound && folder.is_dir() => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn check_frames(&mut self, layout: &shards::Layout) -> Result<()> {
        let mut recorded = Vec::new();
        for file in &self.frames.files {
            recorded.push(header::metadata(file.as_slice()).map_err(|e| e.at(file.path().display()))?);
        }
        for (name, entry) in &self.frames.entries {
            let file = &self.frames.files[entry.file];
            let at = |e: Error| e.at(format!("{}: tensor {name:?}", file.path().display()));
            if !layout.lists(name) {
                return Err(at(Error::format("the index does not list it")));
            }
            if entry.dtype != safetensors::Dtype::U8 || entry.shape.len() != 1 {
                let what = format!("it is {} {:?}; a frame is U8 with one dimension", entry.dtype, entry.shape);
                return Err(at(Error::format(what)));
            }
            decode::check_magic(&file.as_slice()[entry.range.clone()]).map_err(at)?;
            let text = recorded[entry.file].get(name);
            let text = text.ok_or_else(|| at(Error::format("__metadata__ has no checksum for it")))?;
            let checksum = Checksum::parse(self.index.checksum, text).map_err(at)?;
            self.checksums.insert(name.clone(), checksum);
        }
        self.frames.check_unchanged()
    }

    fn check_declared(&self) -> Result<()> {
        let Some(declared) = &self.index.tensors else { return Ok(()) };
        let frames = &self.frames.entries;
        let unmapped = declared.keys().filter(|name| !frames.contains_key(*name)).map(|name| (name, "weight_map"));
        let undeclared = frames.keys().filter(|name| !declared.contains_key(*name)).map(|name| (name, "tensors"));
        match unmapped.chain(undeclared).next() {
            Some((name, place)) => Err(Error::format(format!(
                "\"tensors\" and \"weight_map\" of the index name different tensors: {name:?} is not in {place:?}"
            ))),
            None => Ok(()),
        }
    }

    /// The version that the delta makes.
    pub fn version(&self) -> u64 {
        self.index.version
    }

    /// The version that it has to be applied to, what [`crate::UpdateOptions::expect_version`] asks for; always below
    /// [`Delta::version`].
    pub fn base_version(&self) -> u64 {
        self.index.base_version
    }

    /// The tensors that changed, in name order. All others are as in the base.
    pub fn tensors(&self) -> impl Iterator<Item = DeltaTensor<'_>> {
        self.frames.entries.iter().map(|(name, entry)| DeltaTensor {
            name,
            layout: self.declared(name).map(|d| (d.dtype.to_string(), d.shape.as_slice())),
            encoding: self.index.encoding,
            encoded_bytes: entry.range.len(),
        })
    }

    fn declared(&self, name: &str) -> Option<&Declared> {
        self.index.tensors.as_ref()?.get(name)
    }

    /// True if this tensor changed.
    pub fn contains(&self, name: &str) -> bool {
        self.frames.contains(name)
    }

    /// Compares the delta with the headers of the checkpoint that it is for.
    ///
    /// # Errors
    /// `Shape`, listing every tensor that the base lacks, or has with another dtype or shape.
    pub fn check_base(&self, base: &Checkpoint) -> Result<()> {
        let mut problems = Vec::new();
        for name in self.frames.entries.keys() {
            match (base.entries.get(name), self.declared(name)) {
                (None, _) => problems.push(format!("tensor {name:?} is not in the base")),
                (Some(has), Some(wants)) if (has.dtype, &has.shape) != (wants.dtype, &wants.shape) => {
                    problems.push(format!(
                        "tensor {name:?} is {} {:?} in the base, {} {:?} in the delta",
                        has.dtype, has.shape, wants.dtype, wants.shape
                    ));
                }
                _ => {}
            }
        }
        if problems.is_empty() {
            return Ok(());
        }
        let list = problems.join("\n  ");
        let what = format!("the delta does not fit the base ({} differences):\n  {list}", problems.len());
        Err(Error::new(ErrorKind::Shape, what))
    }

    /// Makes the new bytes of one tensor from its bytes in the base, and checks them against the recorded checksum.
    ///
    /// `out` is the only buffer of the tensor's size; beside it, decompression takes up to 9 MiB (twice with `overwrite`).
    /// After an error what is in `out` means nothing.
    ///
    /// # Errors
    /// `NotFound` if the tensor is not in the delta: it did not change. `Argument` if `out` is not as long as `base`.
    /// `Shape` if `base` is not as long as the delta says. `Format` if the frame is damaged or holds another number of
    /// bytes, or the result has another checksum, as on a base that is not the base.
    pub fn apply(&self, name: &str, base: &[u8], out: &mut [u8]) -> Result<()> {
        let (Some(entry), Some(checksum)) = (self.frames.entries.get(name), self.checksums.get(name)) else {
            let what = format!("tensor {name:?} is not in the delta to version {}", self.index.version);
            return Err(Error::new(ErrorKind::NotFound, what));
        };
        let file = &self.frames.files[entry.file];
        let at = |e: Error| e.at(format!("{}: tensor {name:?}", file.path().display()));
        if let Some(bytes) = self.declared(name).map(|d| d.bytes).filter(|&bytes| bytes != base.len()) {
            let what = format!("it has {} bytes in the base, {bytes} in the delta", base.len());
            return Err(at(Error::new(ErrorKind::Shape, what)));
        }
        if out.len() != base.len() {
            let what = format!("`out` has {} bytes, the tensor {}", out.len(), base.len());
            return Err(at(Error::argument(what)));
        }
        let frame = &file.as_slice()[entry.range.clone()];
        let got = match self.index.encoding {
            Encoding::Xor => decode::xor(frame, self.index.checksum, base, out),
            Encoding::Overwrite => decode::overwrite(frame, self.index.checksum, base, out),
        };
        checksum.check(&got.map_err(at)?).map_err(at)
    }
}
