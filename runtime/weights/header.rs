//! The safetensors header: eight bytes of length, then JSON.
//!
//! The `safetensors` crate checks offsets, sizes and dtypes. What it lets pass although the format forbids it is
//! checked here first: a header that does not begin with `{`, a name that stands twice (the crate keeps the last),
//! a tensor called `__metadata__`; and the limits that keep a hostile header from costing memory.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::SafeTensors;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Bounds on what a header may claim.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Bytes of the JSON header of one file.
    pub header_bytes: usize,
    /// Tensors in one file.
    pub tensors: usize,
    /// Bytes of a tensor's name.
    pub name_bytes: usize,
    /// Dimensions of a tensor.
    pub rank: usize,
    /// Files that an index may name.
    pub shards: usize,
    /// Bytes of model.safetensors.index.json.
    pub index_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            header_bytes: 16 << 20,
            tensors: 100_000,
            name_bytes: 512,
            rank: 8,
            shards: 1024,
            index_bytes: 64 << 20,
        }
    }
}

pub(super) struct Tensor {
    pub name: String,
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    /// Where its bytes are, counted from the start of the file.
    pub range: Range<usize>,
}

/// Parses and checks the header of a whole safetensors file.
pub(super) fn parse(file: &[u8], limits: &Limits) -> Result<Vec<Tensor>> {
    let json = json_part(file, limits)?;
    check_names(json, limits)?;
    let (header_len, metadata) =
        SafeTensors::read_metadata(file).map_err(|e| Error::format(format!("not a valid safetensors file: {e}")))?;
    let data_start = header_len + 8;
    let mut tensors = Vec::with_capacity(metadata.tensors().len());
    for (name, info) in metadata.tensors() {
        if info.shape.len() > limits.rank {
            return Err(Error::limit(format!(
                "tensor {name:?} has {} dimensions, at most {} are allowed",
                info.shape.len(),
                limits.rank
            )));
        }
        let (begin, end) = info.data_offsets;
        let range = data_start + begin..data_start + end;
        if file.get(range.clone()).is_none() {
            return Err(Error::format(format!("tensor {name:?} ends at byte {end}, beyond the file")));
        }
        tensors.push(Tensor { name, dtype: info.dtype, shape: info.shape.clone(), range });
    }
    Ok(tensors)
}

/// The `__metadata__` of a file that [`parse`] accepted.
pub(super) fn metadata(file: &[u8]) -> Result<HashMap<String, String>> {
    let (_, header) =
        SafeTensors::read_metadata(file).map_err(|e| Error::format(format!("not a valid safetensors file: {e}")))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

fn json_part<'a>(file: &'a [u8], limits: &Limits) -> Result<&'a [u8]> {
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(Error::format(format!("{} bytes; a safetensors file has at least 8", file.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > limits.header_bytes as u64 {
        return Err(Error::limit(format!(
            "the header claims {length} bytes, at most {} are allowed",
            limits.header_bytes
        )));
    }
    // Fits: it is at most `header_bytes`, a usize.
    let json = rest.get(..length as usize).ok_or_else(|| {
        Error::format(format!("the header claims {length} bytes, the file has {} after the length", rest.len()))
    })?;
    match json.first() {
        Some(b'{') => Ok(json),
        Some(other) => Err(Error::format(format!("the header begins with byte {other:#04x}, it must begin with '{{'"))),
        None => Err(Error::format("the header is empty")),
    }
}

/// Reads the keys of the top-level object: duplicates are lost once it is a map.
fn check_names(json: &[u8], limits: &Limits) -> Result<()> {
    let names = unique_keys(json, limits.tensors.saturating_add(1))?;
    match names.iter().find(|name| name.len() > limits.name_bytes) {
        Some(name) => Err(Error::limit(format!(
            "a tensor name has {} bytes, at most {} are allowed",
            name.len(),
            limits.name_bytes
        ))),
        None => Ok(()),
    }
}

/// The keys of a JSON object, an error if one stands twice or there are more than `limit`.
pub(super) fn unique_keys(json: &[u8], limit: usize) -> Result<HashSet<String>> {
    struct Keys {
        limit: usize,
    }
    impl<'de> Visitor<'de> for Keys {
        type Value = Result<HashSet<String>>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
            let mut seen = HashSet::new();
            let mut problem = None;
            while let Some(key) = map.next_key::<String>()? {
                if key == "__metadata__" {
                    // Strings only: anything else is a tensor that took the reserved name.
                    let value = map.next_value::<serde_json::Value>()?;
                    if !value.as_object().is_some_and(|o| o.values().all(serde_json::Value::is_string)) {
                        problem.get_or_insert_with(|| Error::format("\"__metadata__\" must map strings to strings"));
                    }
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
                if seen.len() >= self.limit {
                    problem.get_or_insert_with(|| Error::limit(format!("more than {} names", self.limit)));
                } else if let Some(twice) = seen.replace(key) {
                    problem.get_or_insert_with(|| Error::format(format!("the name {twice:?} stands twice")));
                }
            }
            Ok(problem.map_or(Ok(seen), Err))
        }
    }
    let mut parser = serde_json::Deserializer::from_slice(json);
    let keys = parser.deserialize_map(Keys { limit }).map_err(|e| Error::format(format!("not valid JSON: {e}")))??;
    parser.end().map_err(|e| Error::format(format!("not valid JSON: {e}")))?;
    Ok(keys)
}
