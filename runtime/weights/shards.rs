//! Which files make up a checkpoint: one file, or the shards that an index names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::header::{Limits, unique_keys};
use crate::error::{Error, ErrorKind, Result, io_error};

pub(super) struct Layout {
    pub files: Vec<PathBuf>,
    /// Tensor name → file, when there is an index.
    index: Option<(PathBuf, BTreeMap<String, PathBuf>)>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: Box<serde_json::value::RawValue>,
}

pub(super) const INDEX: &str = "model.safetensors.index.json";

/// True if an index is that of a delta, whose files hold no weights.
pub(super) fn names_delta(index: &[u8]) -> Result<bool> {
    #[derive(Deserialize)]
    struct Index {
        metadata: Option<Metadata>,
    }
    #[derive(Deserialize)]
    struct Metadata {
        delta_encoding: Option<IgnoredAny>,
    }
    let index: Index = serde_json::from_slice(index).map_err(|e| Error::format(format!("not a valid index: {e}")))?;
    Ok(index.metadata.is_some_and(|m| m.delta_encoding.is_some()))
}

impl Layout {
    pub(super) fn find(path: &Path, limits: &Limits) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| io_error(path, e))?;
        if metadata.is_file() {
            return Ok(Layout { files: vec![path.to_owned()], index: None });
        }
        let index = path.join(INDEX);
        if index.exists() {
            let text = read_bounded(&index, limits.index_bytes)?;
            if names_delta(&text).map_err(|e| e.at(index.display()))? {
                let what = format!("{}: a delta between checkpoints; apply it to the one it is for", path.display());
                return Err(Error::unsupported(what));
            }
            let layout = Self::from_index(path, index, &text, limits)?;
            if layout.files.is_empty() {
                return Err(Error::format(format!("{}: weight_map is empty", path.join(INDEX).display())));
            }
            return Ok(layout);
        }
        let single = path.join("model.safetensors");
        if single.symlink_metadata().is_ok() {
            return Ok(Layout { files: vec![inside(path, &single)?], index: None });
        }
        Err(Error::new(ErrorKind::Io, format!("{}: neither model.safetensors nor {INDEX} is there", path.display())))
    }

    /// The files that the index `text` names; of a delta in which nothing changed, none.
    pub(super) fn from_index(folder: &Path, index: PathBuf, text: &[u8], limits: &Limits) -> Result<Self> {
        let fail = |message: String| Error::format(format!("{}: {message}", index.display()));
        let parsed: Index = serde_json::from_slice(text).map_err(|e| fail(format!("not a valid index: {e}")))?;
        let raw = parsed.weight_map.get().as_bytes();
        unique_keys(raw, limits.tensors.saturating_mul(limits.shards)).map_err(|e| e.at(index.display()))?;
        let map: BTreeMap<String, String> =
            serde_json::from_slice(raw).map_err(|e| fail(format!("weight_map must map tensor names to files: {e}")))?;

        let mut files: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (tensor, file) in &map {
            let mut parts = Path::new(file).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || !file.ends_with(".safetensors") {
                return Err(fail(format!(
                    "tensor {tensor:?} is mapped to {file:?}; it must be a .safetensors file name without a folder"
                )));
            }
            if !files.contains_key(file) {
                if files.len() >= limits.shards {
                    return Err(Error::limit(format!("{}: more than {} shards", index.display(), limits.shards)));
                }
                files.insert(file.clone(), inside(folder, &folder.join(file))?);
            }
        }
        refuse_unlisted(folder, &files.keys().map(String::as_str).collect(), &index)?;
        let by_tensor = map.into_iter().map(|(tensor, file)| (tensor, files[&file].clone())).collect();
        Ok(Layout { files: files.into_values().collect(), index: Some((index, by_tensor)) })
    }

    /// True if the index names the tensor, or there is no index.
    pub(super) fn lists(&self, tensor: &str) -> bool {
        self.index.as_ref().is_none_or(|(_, by_tensor)| by_tensor.contains_key(tensor))
    }

    /// Checks that every tensor is in the shard that the index names; `place` tells where one was found.
    pub(super) fn check<'a>(&self, place: impl Fn(&str) -> Option<&'a Path>) -> Result<()> {
        let Some((index, by_tensor)) = &self.index else { return Ok(()) };
        for (tensor, file) in by_tensor {
            let problem = match place(tensor) {
                Some(found) if found == file => continue,
                Some(found) => format!("is in {}", found.display()),
                None => "is in no shard".to_owned(),
            };
            return Err(Error::format(format!(
                "{}: tensor {tensor:?} is mapped to {} but {problem}",
                index.display(),
                file.display()
            )));
        }
        Ok(())
    }
}

/// A shard `model-00002-of-00003.safetensors` that the index does not name is a half-copied or foreign checkpoint.
fn refuse_unlisted(folder: &Path, listed: &BTreeSet<&str>, index: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(|e| io_error(folder, e))? {
        let name = entry.map_err(|e| io_error(folder, e))?.file_name();
        let Some(name) = name.to_str() else { continue };
        let shard = name.starts_with("model-") && name.contains("-of-") && name.ends_with(".safetensors");
        if shard && !listed.contains(name) {
            return Err(Error::format(format!(
                "{}: the shard {name:?} is in the folder but not listed",
                index.display()
            )));
        }
    }
    Ok(())
}

/// Resolves links, and refuses a file outside the model folder. The one exception is the layout of the Hugging Face
/// cache, `snapshots/REVISION/file → ../../blobs/HASH`.
pub(crate) fn inside(folder: &Path, file: &Path) -> Result<PathBuf> {
    let resolve = |p: &Path| {
        p.canonicalize().map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound => io_error(p, e),
            _ => Error::format(format!("{}: cannot be resolved: {e}", p.display())),
        })
    };
    let (root, target) = (resolve(folder)?, resolve(file)?);
    let blobs = root.parent().and_then(Path::parent).map(|repo| repo.join("blobs"));
    if target.starts_with(&root) || blobs.is_some_and(|blobs| target.parent() == Some(&blobs)) {
        return Ok(target);
    }
    Err(Error::format(format!("{}: is a link to {}, outside the model folder", file.display(), target.display())))
}

/// Reads a whole small file, refusing one above `limit` before reading it.
pub(crate) fn read_bounded(path: &Path, limit: usize) -> Result<Vec<u8>> {
    use std::io::Read;
    let fail = |e| io_error(path, e);
    // Opening a pipe would wait for its other end.
    if !std::fs::metadata(path).map_err(fail)?.is_file() {
        return Err(Error::new(ErrorKind::Io, format!("{}: not a regular file", path.display())));
    }
    let file = std::fs::File::open(path).map_err(fail)?;
    let mut bytes = Vec::new();
    let bound = (limit as u64).saturating_add(1);
    file.take(bound).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() > limit {
        return Err(Error::limit(format!("{}: larger than the allowed {limit} bytes", path.display())));
    }
    Ok(bytes)
}
