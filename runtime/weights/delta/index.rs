//! The index of a delta: what leads from which version to which.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::checksum::Algorithm;
use crate::error::{Error, Result, checked_size};
use crate::weights::HeaderLimits;
use crate::weights::shards::{INDEX, read_bounded};

/// How a delta holds what changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Encoding {
    /// new ⊕ old: the smaller one, right once and on the base alone.
    #[default]
    Xor,
    /// Positions of changed bytes and their new values: larger, and may be applied again to what it made.
    Overwrite,
}

impl Encoding {
    /// The name in an index.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::Xor => "xor",
            Encoding::Overwrite => "overwrite",
        }
    }

    fn parse(name: &str) -> Result<Self> {
        match name {
            "xor" => Ok(Encoding::Xor),
            "overwrite" => Ok(Encoding::Overwrite),
            _ => Err(Error::unsupported(format!("delta_encoding is {name:?}; xor and overwrite are read"))),
        }
    }
}

/// The one compression that there is.
const COMPRESSION: &str = "zstd";

pub(super) struct Index {
    pub version: u64,
    pub base_version: u64,
    pub encoding: Encoding,
    pub checksum: Algorithm,
    pub tensors: Option<BTreeMap<String, Declared>>,
}

/// What a changed tensor is in the checkpoint.
pub(super) struct Declared {
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    pub bytes: usize,
}

#[derive(Serialize, Deserialize)]
struct StoredIndex {
    metadata: Option<Metadata>,
    #[serde(skip_deserializing)]
    weight_map: BTreeMap<String, String>,
    tensors: Option<BTreeMap<String, StoredTensor>>,
}

#[derive(Serialize, Deserialize)]
struct Metadata {
    version: Value,
    base_version: Value,
    delta_encoding: String,
    compression_format: String,
    checksum_format: String,
}

#[derive(Serialize, Deserialize)]
struct StoredTensor {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
}

/// The path and the text of a folder's index.
pub(super) fn read(folder: &Path, limits: &HeaderLimits) -> Result<(PathBuf, Vec<u8>)> {
    let path = folder.join(INDEX);
    let text = read_bounded(&path, limits.index_bytes)?;
    Ok((path, text))
}

/// The name of a version's folder.
pub(super) fn folder_name(version: u64) -> String {
    format!("weight_v{version:06}")
}

/// Refuses a folder that is called after another version.
pub(super) fn check_folder_name(folder: &Path, version: u64) -> Result<()> {
    let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
    let numbered =
        name.strip_prefix("weight_v").is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    let right = folder_name(version);
    if numbered && name != right {
        return Err(Error::format(format!("the folder is called {name:?}, of version {version} it must be {right:?}")));
    }
    Ok(())
}

impl Index {
    pub(super) fn parse(text: &[u8], folder: &Path, limits: &HeaderLimits) -> Result<Self> {
        if !crate::weights::shards::names_delta(text)? {
            return Err(Error::format("metadata has no delta_encoding: a whole checkpoint, not a delta"));
        }
        let stored: StoredIndex =
            serde_json::from_slice(text).map_err(|e| Error::format(format!("not the index of a delta: {e}")))?;
        let Some(metadata) = stored.metadata else { return Err(Error::format("there is no metadata")) };
        let (version, base_version) =
            (number("version", &metadata.version)?, number("base_version", &metadata.base_version)?);
        if base_version >= version {
            return Err(Error::format(format!("base_version is {base_version}, it must be below version {version}")));
        }
        check_folder_name(folder, version)?;
        if metadata.compression_format != COMPRESSION {
            let what = format!("compression_format is {:?}; {COMPRESSION} is read", metadata.compression_format);
            return Err(Error::unsupported(what));
        }
        let declared = |map: BTreeMap<String, StoredTensor>| {
            map.into_iter()
                .map(|(name, t)| {
                    Declared::new(t, limits).map_err(|e| e.at(format!("tensor {name:?}"))).map(|d| (name, d))
                })
                .collect()
        };
        Ok(Index {
            version,
            base_version,
            encoding: Encoding::parse(&metadata.delta_encoding)?,
            checksum: Algorithm::parse(&metadata.checksum_format)?,
            tensors: stored.tensors.map(declared).transpose()?,
        })
    }

    /// The text of an index with these files.
    pub(super) fn write(self, weight_map: BTreeMap<String, String>) -> Result<Vec<u8>> {
        let stored = |d: Declared| StoredTensor { dtype: d.dtype, shape: d.shape };
        let index = StoredIndex {
            metadata: Some(Metadata {
                version: format!("{:06}", self.version).into(),
                base_version: format!("{:06}", self.base_version).into(),
                delta_encoding: self.encoding.name().into(),
                compression_format: COMPRESSION.into(),
                checksum_format: self.checksum.name().into(),
            }),
            weight_map,
            tensors: self.tensors.map(|map| map.into_iter().map(|(name, d)| (name, stored(d))).collect()),
        };
        serde_json::to_vec_pretty(&index).map_err(|e| Error::internal(format!("the index of a delta: {e}")))
    }
}

impl Declared {
    fn new(tensor: StoredTensor, limits: &HeaderLimits) -> Result<Self> {
        let StoredTensor { dtype, shape } = tensor;
        if shape.len() > limits.rank {
            let what = format!("it has {} dimensions, at most {} are allowed", shape.len(), limits.rank);
            return Err(Error::limit(what));
        }
        let bits = checked_size("its size", &[&shape[..], &[dtype.bitsize()]].concat())?;
        Ok(Declared { dtype, shape, bytes: bits.div_ceil(8) })
    }
}

/// A version: slime writes six digits or more, and reads what Python's `int` does.
fn number(field: &str, value: &Value) -> Result<u64> {
    let parsed = match value {
        Value::String(text) if text.bytes().all(|b| b.is_ascii_digit()) => text.parse().ok(),
        value => value.as_u64(),
    };
    parsed.ok_or_else(|| Error::format(format!("{field} is {value}, it must be digits, at most {}", u64::MAX)))
}
