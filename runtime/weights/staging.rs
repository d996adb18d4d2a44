//! What an update has been given so far: tensors and parts of tensors, checked, and not yet anybody's weights.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use super::transfer::{self, Checks};
use super::{Checkpoint, Dtype, Tensor, Weights};
use crate::error::{Error, ErrorKind, Result};
use crate::model::{EMBEDDING, LM_HEAD, carries_no_weight};

/// A tensor, or a part of one, in the caller's memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorData<'a> {
    /// Its name in the checkpoint.
    pub name: &'a str,
    /// How an element is stored.
    pub dtype: Dtype,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// The elements, little endian, row major, without gaps; of any alignment.
    pub bytes: &'a [u8],
    /// XXH3-128 of `bytes` with seed 0, to be compared before they are used.
    pub checksum: Option<u128>,
}

/// What the tensors of an update have to comply with.
#[derive(Clone, Debug)]
pub(crate) struct StagingRules {
    /// Whose tensors they are, in messages.
    pub owner: &'static str,
    /// Every tensor must come,
    pub require_all: bool,
    /// but for this one.
    pub optional: Option<String>,
    /// Tensors that carry no weight (see [`carries_no_weight`]) are passed over.
    pub ignores_weightless: bool,
    pub check_finite: bool,
    /// Another dtype than the model's is rounded to it.
    pub convert: bool,
    /// The model's own memory is written.
    pub in_place: bool,
    /// The head is the embedding matrix, which may come under either name.
    pub tied: bool,
}

/// A tensor that comes in parts.
struct Partial {
    tensor: Tensor,
    /// Where parts begin and what shape they have.
    boxes: Vec<(Vec<usize>, Vec<usize>)>,
    elements: usize,
}

pub(crate) struct Staging {
    /// In place: the weights themselves.
    base: Weights,
    /// What the weights took at the beginning, beside mapped files.
    base_bytes: u64,
    rules: StagingRules,
    /// Tensors that are whole; in place they are in `base`.
    staged: BTreeMap<String, Option<Tensor>>,
    partial: BTreeMap<String, Partial>,
    /// A tied head that came under its own name.
    head: Option<Tensor>,
    /// In place: something was written.
    pub touched: bool,
}

impl Staging {
    pub fn new(base: Weights, rules: StagingRules) -> Self {
        Staging {
            base_bytes: base.bytes_in_memory(),
            base,
            rules,
            staged: BTreeMap::new(),
            partial: BTreeMap::new(),
            head: None,
            touched: false,
        }
    }

    /// Memory that what was put takes, beside what the model held before.
    pub fn bytes(&self) -> u64 {
        let grown = self.base.bytes_in_memory().saturating_sub(self.base_bytes);
        let partial = self.partial.values().map(|p| &p.tensor);
        let all = self.staged.values().flatten().chain(partial).chain(&self.head);
        grown + all.filter(|t| !t.is_mapped()).map(|t| t.bytes().len() as u64).sum::<u64>()
    }

    /// Memory that a tensor of this name will take beside that; `over`: it may be written over the model's own.
    pub fn cost(&self, name: &str, over: bool) -> u64 {
        let Some(tensor) = self.base.find(self.known(name)) else { return 0 };
        let writes_over = over && self.rules.in_place && tensor.is_in_memory() && !self.is_head(name);
        let there = self.partial.contains_key(name) || writes_over;
        if there { 0 } else { tensor.bytes().len() as u64 }
    }

    /// The weights as they were, or in place as they are.
    pub fn into_base(self) -> Weights {
        self.base
    }

    /// The model's present tensor of that name.
    pub fn present(&self, name: &str) -> Result<&Tensor> {
        self.base.get(name)
    }

    /// The model's tensor that `name` stands for; `None` if it may be ignored.
    fn model_tensor(&self, name: &str) -> Result<Option<&Tensor>> {
        match self.base.find(self.known(name)) {
            Some(tensor) => Ok(Some(tensor)),
            None if self.rules.ignores_weightless && carries_no_weight(name) => Ok(None),
            None => Err(Error::new(ErrorKind::NotFound, format!("{} has no tensor {name:?}", self.rules.owner))),
        }
    }

    fn is_head(&self, name: &str) -> bool {
        self.rules.tied && name == LM_HEAD
    }

    /// The name under which the model knows a tensor.
    fn known<'a>(&self, name: &'a str) -> &'a str {
        if self.is_head(name) { EMBEDDING } else { name }
    }

    /// What was put already must not come again.
    fn check_new(&self, name: &str) -> Result<()> {
        if self.staged.contains_key(name) || (self.is_head(name) && self.head.is_some()) {
            return Err(Error::new(ErrorKind::Duplicate, format!("tensor {name:?} was put before")));
        }
        Ok(())
    }

    /// Nor must a whole tensor come after parts of it.
    fn check_whole(&self, name: &str) -> Result<()> {
        self.check_new(name)?;
        if self.partial.contains_key(name) {
            return Err(Error::new(ErrorKind::Duplicate, format!("parts of tensor {name:?} were put before")));
        }
        Ok(())
    }

    fn shape_error(&self, name: &str, given: &[usize], own: &[usize]) -> Error {
        let owner = self.rules.owner;
        Error::new(ErrorKind::Shape, format!("tensor {name:?} has shape {given:?}, {owner}'s has {own:?}"))
    }

    fn check_dtype(&self, name: &str, given: Dtype, model: Dtype) -> Result<()> {
        if given == model || self.rules.convert {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Shape,
            format!(
                "tensor {name:?} is {}, {} holds it as {}; allow conversion to have it rounded",
                given.name(),
                self.rules.owner,
                model.name()
            ),
        ))
    }

    fn check_values(&self, name: &str, given: Dtype, bytes: &[u8], model: Dtype) -> Result<()> {
        let checks = Checks { finite: self.rules.check_finite, to: (given != model).then_some(model) };
        transfer::check(given, bytes, checks).map_err(|e| e.at(format!("tensor {name:?}")))
    }

    /// Takes a whole tensor.
    ///
    /// # Errors
    /// `NotFound`, `Duplicate`, `Shape` (shape or dtype), `Argument` (number of bytes), `Format` (checksum), `NonFinite` or
    /// `HostMemory`; nothing of it is taken then, and the others stay.
    pub fn put(&mut self, data: &TensorData) -> Result<()> {
        let TensorData { name, dtype, shape, bytes, .. } = *data;
        let Some(model) = self.model_tensor(name)? else { return Ok(()) };
        let model_dtype = model.dtype();
        self.check_whole(name)?;
        if shape != model.shape() {
            return Err(self.shape_error(name, shape, model.shape()));
        }
        self.check_dtype(name, dtype, model_dtype)?;
        check_bytes(data)?;
        self.check_values(name, dtype, bytes, model_dtype)?;
        self.fill(name, |target| transfer::copy(dtype, bytes, model_dtype, target))
    }

    /// Has `write` fill the whole of a tensor: zeroed memory, or in place the model's own.
    fn fill(&mut self, name: &str, write: impl FnOnce(&mut [u8])) -> Result<()> {
        // A tied head that came under its own name is compared with the embedding before it takes its place.
        if self.rules.in_place
            && !self.is_head(name)
            && let Some(target) = self.base.find_mut(name).and_then(Tensor::bytes_mut)
        {
            self.touched = true;
            write(target);
            self.staged.insert(name.to_owned(), None);
            return Ok(());
        }
        let mut tensor = self.base.get(self.known(name))?.blank(name)?;
        write(tensor.bytes_mut().ok_or_else(|| not_ours(name))?);
        self.stage(name, tensor);
        Ok(())
    }

    /// Notes a tensor that is whole and checked.
    fn stage(&mut self, name: &str, tensor: Tensor) {
        if self.is_head(name) {
            self.head = Some(tensor);
            return;
        }
        let kept = if self.rules.in_place {
            self.touched = true;
            self.base.replace(name, tensor);
            None
        } else {
            Some(tensor)
        };
        self.staged.insert(name.to_owned(), kept);
    }

    /// Takes the part of a tensor that begins at `start` (one index a dimension) and has `data.shape`.
    ///
    /// # Errors
    /// As [`Staging::put`]; `Duplicate` also where parts overlap.
    pub fn put_slice(&mut self, data: &TensorData, start: &[usize]) -> Result<()> {
        let TensorData { name, dtype, shape, bytes, .. } = *data;
        let Some(model) = self.model_tensor(name)? else { return Ok(()) };
        let (model_dtype, model_shape) = (model.dtype(), model.shape().to_vec());
        self.check_new(name)?;
        let inside = |((s, n), m): ((&usize, &usize), &usize)| s.checked_add(*n).is_some_and(|end| end <= *m);
        let ranks = start.len() == model_shape.len() && shape.len() == model_shape.len();
        if !ranks || !start.iter().zip(shape).zip(&model_shape).all(inside) {
            return Err(Error::new(
                ErrorKind::Shape,
                format!("tensor {name:?}: a part of shape {shape:?} at {start:?} is not inside {model_shape:?}"),
            ));
        }
        self.check_dtype(name, dtype, model_dtype)?;
        check_bytes(data)?;
        let overlaps = |(s, n): &(Vec<usize>, Vec<usize>)| {
            (0..start.len()).all(|d| start[d] < s[d] + n[d] && s[d] < start[d] + shape[d])
        };
        let before = self.partial.get(name);
        if let Some((s, n)) = before.and_then(|p| p.boxes.iter().find(|b| overlaps(b))) {
            return Err(Error::new(
                ErrorKind::Duplicate,
                format!("tensor {name:?}: the part of shape {shape:?} at {start:?} overlaps the one of {n:?} at {s:?}"),
            ));
        }
        self.check_values(name, dtype, bytes, model_dtype)?;
        let mut partial = match self.partial.remove(name) {
            Some(partial) => partial,
            None => {
                let tensor = self.base.get(self.known(name))?.blank(name)?;
                Partial { tensor, boxes: Vec::new(), elements: 0 }
            }
        };
        let target = partial.tensor.bytes_mut().ok_or_else(|| not_ours(name))?;
        copy_box(dtype, bytes, model_dtype, target, (start, shape, &model_shape));
        partial.boxes.push((start.to_vec(), shape.to_vec()));
        partial.elements += shape.iter().product::<usize>();
        if partial.elements < model_shape.iter().product() {
            self.partial.insert(name.to_owned(), partial);
        } else {
            self.stage(name, partial.tensor);
        }
        Ok(())
    }

    /// Takes every tensor of the checkpoint at `path`. Where its dtype is the model's, nothing is copied.
    ///
    /// # Errors
    /// `Shape`, listing every tensor that does not fit; `Duplicate`, `NonFinite` or `HostMemory`. Nothing is taken then,
    /// except in place.
    pub fn put_checkpoint(&mut self, path: &Path, checkpoint: &Checkpoint) -> Result<()> {
        let mut problems = Vec::new();
        let mut tensors = Vec::new();
        for (name, info) in checkpoint.tensors() {
            let found = (|| {
                let Some(model) = self.model_tensor(name)? else { return Ok(None) };
                self.check_whole(name)?;
                if info.shape != model.shape() {
                    return Err(self.shape_error(name, &info.shape, model.shape()));
                }
                let Some(tensor) = checkpoint.tensor(name)? else { return Ok(None) };
                self.check_dtype(name, tensor.dtype(), model.dtype())?;
                Ok(Some((name.to_owned(), tensor, model.dtype())))
            })();
            match found {
                Ok(found) => tensors.extend(found),
                Err(error) => problems.push(error),
            }
        }
        if let Some(first) = problems.first() {
            let list: Vec<String> = problems.iter().map(ToString::to_string).collect();
            let kind = if problems.iter().all(|p| p.kind() == first.kind()) { first.kind() } else { ErrorKind::Shape };
            let text = format!("{}: {}", path.display(), list.join("\n  "));
            return Err(Error::new(kind, text));
        }
        for (name, tensor, dtype) in &tensors {
            self.check_values(name, tensor.dtype(), tensor.bytes(), *dtype).map_err(|e| e.at(path.display()))?;
        }
        checkpoint.check_unchanged()?;
        let names: Vec<&String> = tensors.iter().map(|(name, ..)| name).collect();
        self.all_or_nothing(&names, |staging, i| {
            let (name, tensor, dtype) = &tensors[i];
            if tensor.dtype() == *dtype {
                staging.stage(name, tensor.clone());
                return Ok(());
            }
            staging.fill(name, |target| transfer::copy(tensor.dtype(), tensor.bytes(), *dtype, target))
        })
    }

    /// Has `take` take tensors, by their places in `names`; if one fails, none was taken, except in place.
    fn all_or_nothing(
        &mut self,
        names: &[impl AsRef<str>],
        take: impl Fn(&mut Staging, usize) -> Result<()>,
    ) -> Result<()> {
        for i in 0..names.len() {
            if let Err(error) = take(self, i) {
                if !self.rules.in_place {
                    names[..i].iter().for_each(|name| self.forget(name.as_ref()));
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Takes tensors that `make` computes from the model's present ones, into zeroed memory of the same size. No other
    /// tensor is required any more.
    ///
    /// # Errors
    /// Those of `make`; `NotFound`, `Duplicate`, `NonFinite` or `HostMemory`. Nothing is taken then, except in place.
    pub fn derive_all(
        &mut self,
        names: &[String],
        make: impl Fn(&str, &Tensor, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        self.all_or_nothing(names, |staging, i| staging.derive(&names[i], &make))?;
        self.rules.require_all = false;
        Ok(())
    }

    fn forget(&mut self, name: &str) {
        self.staged.remove(name);
        if self.is_head(name) {
            self.head = None;
        }
    }

    fn derive(&mut self, name: &str, make: impl Fn(&str, &Tensor, &mut [u8]) -> Result<()>) -> Result<()> {
        self.check_whole(name)?;
        let Some(model) = self.model_tensor(name)? else { return Ok(()) };
        let mut tensor = model.blank(name)?;
        make(name, model, tensor.bytes_mut().ok_or_else(|| not_ours(name))?)?;
        self.check_values(name, tensor.dtype(), tensor.bytes(), tensor.dtype())?;
        self.stage(name, tensor);
        Ok(())
    }

    /// Checks that nothing is missing; the new weights, and the names of what is new in them.
    ///
    /// # Errors
    /// `Shape`, listing every tensor that is missing or came in part; the staging stays as it is.
    pub fn complete(&self) -> Result<(Weights, HashSet<String>)> {
        let mut problems = Vec::new();
        for (name, partial) in &self.partial {
            let all: usize = partial.tensor.shape().iter().product();
            problems.push(format!("of tensor {name:?} {} of {all} elements were put", partial.elements));
        }
        let has_head = self.head.is_some();
        if self.rules.require_all {
            let mut missing: Vec<&String> = self.base.tensors().map(|(name, _)| name).collect();
            missing.retain(|name| !self.staged.contains_key(*name) && !self.partial.contains_key(*name));
            missing.retain(|name| !(has_head && *name == EMBEDDING) && self.rules.optional.as_ref() != Some(*name));
            missing.sort();
            problems.extend(missing.iter().map(|name| format!("tensor {name:?} is missing")));
        }
        let mut weights = self.base.clone();
        let mut changed: HashSet<String> = self.staged.keys().cloned().collect();
        for (name, tensor) in &self.staged {
            if let Some(tensor) = tensor {
                weights.replace(name, tensor.clone());
            }
        }
        if let Some(head) = &self.head {
            if !changed.contains(EMBEDDING) {
                changed.insert(EMBEDDING.into());
                weights.replace(EMBEDDING, head.clone());
            } else if weights.find(EMBEDDING).is_some_and(|e| e.bytes() != head.bytes()) {
                problems.push(format!(
                    "{LM_HEAD:?} differs from {EMBEDDING:?}, and the model uses one matrix for both (tie_word_embeddings)"
                ));
            }
        }
        if problems.is_empty() {
            return Ok((weights, changed));
        }
        let text = format!("the update is not complete ({}):\n  {}", problems.len(), problems.join("\n  "));
        Err(Error::new(ErrorKind::Shape, text))
    }
}

fn not_ours(name: &str) -> Error {
    Error::internal(format!("tensor {name:?} is used by somebody else"))
}

/// Compares the number of bytes with the shape, and the checksum with the bytes.
fn check_bytes(data: &TensorData) -> Result<()> {
    let TensorData { name, dtype, shape, bytes, checksum } = *data;
    let size = crate::error::checked_size(&format!("tensor {name:?}"), shape)?.checked_mul(dtype.size());
    if size != Some(bytes.len()) {
        return Err(Error::argument(format!(
            "tensor {name:?}: {} bytes were given, {shape:?} of {} has {}",
            bytes.len(),
            dtype.name(),
            size.map_or("more than fits in memory".into(), |n| n.to_string())
        )));
    }
    let Some(announced) = checksum else { return Ok(()) };
    let found = xxhash_rust::xxh3::xxh3_128(bytes);
    if found != announced {
        return Err(Error::format(format!(
            "tensor {name:?}: its XXH3-128 is {found:032x}, announced was {announced:032x}"
        )));
    }
    Ok(())
}

/// Copies a part into a tensor of `whole` shape, run by run along the last dimensions that are whole.
fn copy_box(
    from: Dtype,
    source: &[u8],
    to: Dtype,
    target: &mut [u8],
    (start, shape, whole): (&[usize], &[usize], &[usize]),
) {
    let rank = whole.len();
    // Dimensions from `split` on are contiguous in both: all but the first of them are whole.
    let mut split = rank;
    let mut run = 1;
    while split > 0 {
        split -= 1;
        run *= shape[split];
        if shape[split] != whole[split] {
            break;
        }
    }
    if run == 0 || shape.contains(&0) {
        return;
    }
    let runs: usize = shape[..split].iter().product();
    for r in 0..runs {
        let (mut rest, mut at, mut stride) = (r, 0, 1);
        for d in (0..rank).rev() {
            let index = if d >= split { start[d] } else { start[d] + rest % shape[d] };
            if d < split {
                rest /= shape[d];
            }
            at += index * stride;
            stride *= whole[d];
        }
        let source = &source[r * run * from.size()..(r + 1) * run * from.size()];
        transfer::copy(from, source, to, &mut target[at * to.size()..(at + run) * to.size()]);
    }
}
