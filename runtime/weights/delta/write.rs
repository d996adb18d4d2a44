//! Two checkpoints → a delta folder.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use serde_json::{Map, json};

use super::checksum::Algorithm;
use super::encode::{Encoded, encode};
use super::index::{Declared, Encoding, Index, check_folder_name};
use crate::error::{Error, ErrorKind, Result, io_error};
use crate::weights::publish::PartialFolder;
use crate::weights::shards::INDEX;
use crate::weights::{Checkpoint, Entry, LoadOptions};

/// How a delta is written.
#[derive(Clone, Debug)]
pub struct DeltaOptions {
    /// How it holds what changed.
    pub encoding: Encoding,
    /// The version of the old checkpoint.
    pub base_version: u64,
    /// The version of the new one. slime follows a chain in steps of one, in folders called `weight_vNNNNNN`.
    pub version: u64,
    /// zstd's level, from 1 to 19.
    pub level: i32,
    /// Threads that compare and compress; `None`: one a core.
    pub threads: Option<usize>,
    /// Bytes of consecutive tensors (at least one) whose changes become one file; it is held in memory until written.
    pub file_bytes: usize,
    /// How the checkpoints are opened.
    pub load: LoadOptions,
}

impl Default for DeltaOptions {
    fn default() -> Self {
        DeltaOptions {
            encoding: Encoding::Xor,
            base_version: 0,
            version: 1,
            level: 1,
            threads: None,
            file_bytes: 1 << 30,
            load: LoadOptions::default(),
        }
    }
}

/// What a delta came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeltaReport {
    /// Tensors of the checkpoint.
    pub tensors: usize,
    /// Those in the delta.
    pub changed: usize,
    /// Those left out.
    pub unchanged: usize,
    /// Bytes of the checkpoint's tensors.
    pub bytes_old: u64,
    /// Bytes of the delta's files.
    pub bytes_delta: u64,
}

/// Writes the delta that leads from the checkpoint `old` to `new` (files or folders) into the new folder `out`, which
/// appears when it is complete (see [`crate::weights::publish`]). `progress` is told how many bytes were compared, of how
/// many.
///
/// # Errors
/// `Argument` for an option out of its range or an `out` that exists or is called after another version; `Shape`, listing
/// every difference, if the checkpoints differ in more than their tensors' bytes; what [`Checkpoint::open`] refuses; `Io`
/// if a file cannot be written or a checkpoint changed meanwhile. Nothing is left behind.
pub fn write_delta(
    old: &Path,
    new: &Path,
    out: &Path,
    options: &DeltaOptions,
    mut progress: impl FnMut(u64, u64),
) -> Result<DeltaReport> {
    check_options(out, options)?;
    let (before, after) = (Checkpoint::open(old, &options.load)?, Checkpoint::open(new, &options.load)?);
    check_alike((old, &before), (new, &after))?;
    let folder = PartialFolder::create(out)?;
    let pairs: Vec<Pair> = before.entries.iter().map(|(name, entry)| Pair::new(name, entry, &before, &after)).collect();
    let total = before.total_bytes() as u64;
    let (mut done, mut files, mut bytes_delta) = (0, Vec::new(), 0);
    for batch in batches(&pairs, options.file_bytes) {
        let changed = encode_all(batch, options, |bytes| {
            done += bytes;
            progress(done, total);
        })?;
        if !changed.is_empty() {
            let path = folder.path().join(files.len().to_string());
            bytes_delta += write_file(&path, &changed).map_err(|e| io_error(&path, e))?;
            files.push(changed.into_iter().map(|(pair, _)| pair.name).collect::<Vec<_>>());
        }
    }
    before.check_unchanged()?;
    after.check_unchanged()?;
    let mut weight_map = BTreeMap::new();
    for (i, names) in files.iter().enumerate() {
        let name = format!("model-{i:05}-of-{:05}.safetensors", files.len());
        let (from, to) = (folder.path().join(i.to_string()), folder.path().join(&name));
        fs::rename(&from, &to).map_err(|e| io_error(&to, e))?;
        weight_map.extend(names.iter().map(|&tensor| (tensor.to_owned(), name.clone())));
    }
    let changed = weight_map.len();
    let index = index(&before, options, &weight_map).write(weight_map)?;
    let path = folder.path().join(INDEX);
    fs::write(&path, &index).map_err(|e| io_error(&path, e))?;
    folder.publish()?;
    Ok(DeltaReport {
        tensors: pairs.len(),
        changed,
        unchanged: pairs.len() - changed,
        bytes_old: total,
        bytes_delta: bytes_delta + index.len() as u64,
    })
}

fn check_options(out: &Path, options: &DeltaOptions) -> Result<()> {
    let DeltaOptions { base_version, version, level, .. } = *options;
    if base_version >= version {
        let what = format!("the base version is {base_version}, it must be below the version, which is {version}");
        return Err(Error::argument(what));
    }
    if !(1..=19).contains(&level) {
        return Err(Error::argument(format!("the level is {level}, it must be from 1 to 19")));
    }
    if options.threads == Some(0) {
        return Err(Error::argument("the number of threads is 0, it must be at least 1"));
    }
    // The same rule on opening is about a file, here it is about an argument.
    check_folder_name(out, version).map_err(|e| Error::argument(e.to_string()))
}

/// Refuses checkpoints that do not have the same tensors.
fn check_alike((old, before): (&Path, &Checkpoint), (new, after): (&Path, &Checkpoint)) -> Result<()> {
    let mut problems = Vec::new();
    for (name, a) in &before.entries {
        match after.entries.get(name) {
            None => problems.push(format!("tensor {name:?} is in the old one alone")),
            Some(b) if (a.dtype, &a.shape) != (b.dtype, &b.shape) => {
                problems.push(format!("tensor {name:?} is {} {:?}, then {} {:?}", a.dtype, a.shape, b.dtype, b.shape))
            }
            Some(_) => {}
        }
    }
    let added = after.entries.keys().filter(|name| !before.contains(name));
    problems.extend(added.map(|name| format!("tensor {name:?} is in the new one alone")));
    if problems.is_empty() {
        return Ok(());
    }
    let (old, new, count, list) = (old.display(), new.display(), problems.len(), problems.join("\n  "));
    let what = format!("{old} and {new} differ in more than their bytes ({count} differences):\n  {list}");
    Err(Error::new(ErrorKind::Shape, what))
}

/// A tensor before and after.
struct Pair<'a> {
    name: &'a str,
    old: &'a [u8],
    new: &'a [u8],
}

impl<'a> Pair<'a> {
    /// For a tensor that [`check_alike`] found in both.
    fn new(name: &'a str, entry: &'a Entry, before: &'a Checkpoint, after: &'a Checkpoint) -> Self {
        let other = &after.entries[name];
        let old = &before.files[entry.file].as_slice()[entry.range.clone()];
        let new = &after.files[other.file].as_slice()[other.range.clone()];
        Pair { name, old, new }
    }
}

/// Consecutive pairs of up to `bytes` bytes, at least one.
fn batches<'a, 'p>(mut pairs: &'p [Pair<'a>], bytes: usize) -> impl Iterator<Item = &'p [Pair<'a>]> {
    std::iter::from_fn(move || {
        let mut sum = 0usize;
        let fitting = pairs.iter().take_while(|pair| {
            sum = sum.saturating_add(pair.old.len());
            sum <= bytes
        });
        let (batch, rest) = pairs.split_at(fitting.count().max(1).min(pairs.len()));
        pairs = rest;
        Some(batch).filter(|batch| !batch.is_empty())
    })
}

/// Encodes pairs side by side; returns what changed, in their order. `each` is told the bytes of each pair.
fn encode_all<'p, 'a>(
    pairs: &'p [Pair<'a>],
    options: &DeltaOptions,
    mut each: impl FnMut(u64),
) -> Result<Vec<(&'p Pair<'a>, Encoded)>> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = options.threads.unwrap_or_else(cores).min(pairs.len());
    let (next, (sender, results)) = (AtomicUsize::new(0), mpsc::channel());
    let mut encoded = std::thread::scope(|scope| {
        for _ in 0..threads {
            let (next, sender) = (&next, sender.clone());
            scope.spawn(move || {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(pair) = pairs.get(i) else { return };
                    let result = encode(pair.old, pair.new, options.encoding, options.level);
                    let result = result.map_err(|e| e.at(format!("tensor {:?}", pair.name)));
                    if sender.send((i, result)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let mut encoded = Vec::new();
        // An error drops the receiver, which ends the threads.
        for (i, result) in results {
            encoded.extend(result?.map(|tensor| (i, tensor)));
            each(pairs[i].old.len() as u64);
        }
        Ok::<_, Error>(encoded)
    })?;
    encoded.sort_unstable_by_key(|(i, _)| *i);
    Ok(encoded.into_iter().map(|(i, tensor)| (&pairs[i], tensor)).collect())
}

/// Writes frames as one safetensors file; returns its size.
fn write_file(path: &Path, changed: &[(&Pair, Encoded)]) -> std::io::Result<u64> {
    let checksums: Map<_, _> =
        changed.iter().map(|(p, e)| (p.name.to_owned(), e.checksum.to_string().into())).collect();
    let mut header = Map::from_iter([("__metadata__".to_owned(), checksums.into())]);
    let mut end = 0;
    for (pair, Encoded { frame, .. }) in changed {
        let start = end;
        end += frame.len();
        let entry = json!({"dtype": "U8", "shape": [frame.len()], "data_offsets": [start, end]});
        header.insert(pair.name.to_owned(), entry);
    }
    let mut header = serde_json::Value::from(header).to_string().into_bytes();
    // The data begins at a multiple of eight.
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = File::create_new(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    for (_, Encoded { frame, .. }) in changed {
        file.write_all(frame)?;
    }
    Ok((8 + header.len() + end) as u64)
}

fn index(before: &Checkpoint, options: &DeltaOptions, changed: &BTreeMap<String, String>) -> Index {
    let entries = before.entries.iter().filter(|(name, _)| changed.contains_key(*name));
    let declared = entries
        .map(|(name, e)| (name.clone(), Declared { dtype: e.dtype, shape: e.shape.clone(), bytes: e.range.len() }));
    Index {
        version: options.version,
        base_version: options.base_version,
        encoding: options.encoding,
        checksum: Algorithm::Xxh3,
        tensors: Some(declared.collect()),
    }
}
