//! New weights for a model that is in use: all of an update or nothing of it, under a version that results carry.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::engine::InFlight;
use crate::error::{Error, ErrorKind, Result};
use crate::exchange::Exchange;
use crate::loaded_model::Model;
use crate::model::Head;
use crate::weights::{
    Checkpoint, Delta, Dtype, LoadOptions, Staging, StagingRules, Tensor, TensorData, TensorInfo, Weights,
};

/// Where the new weights are until they are committed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Storage {
    /// Beside the old ones, which serve until the commit and after a failed one. Needs room for what is put.
    #[default]
    Shadow,
    /// In the place of the old ones. The model computes nothing from [`Model::update`] to the end of the update, and an
    /// update that ends without a commit once something was put leaves the model without valid weights: its jobs fail
    /// and later ones are refused until a whole update is committed. Needs room for the tensors where the old ones are mapped,
    /// since the new ones are in memory, and for none after that.
    InPlace,
}

/// Which tensors an update must bring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Require {
    /// Every tensor of the model.
    #[default]
    All,
    /// Any; the others stay as they are.
    Subset,
}

/// How an update is made.
#[derive(Clone, Copy, Debug, Default)]
pub struct UpdateOptions {
    /// The update is refused unless this is the model's version.
    pub expect_version: Option<u64>,
    /// Where the new weights are until they are committed.
    pub storage: Storage,
    /// What becomes of the sequences that are under way at the commit, or in place when the update begins.
    pub in_flight: InFlight,
    /// Which tensors it must bring.
    pub require: Require,
    /// Refuse NaN and infinities.
    pub check_finite: bool,
    /// Round tensors of another dtype to the model's own, to nearest, ties to even. A finite value that would become infinite
    /// is refused. Without it another dtype is an error.
    pub convert: bool,
    /// How long to wait for sequences under way; `None`: until they are done.
    pub timeout: Option<Duration>,
}

/// New weights on their way. Dropping it aborts it.
///
/// ```no_run
/// # fn f(model: &rewardrt::Model, tensors: Vec<(String, Vec<usize>, Vec<u8>)>) -> rewardrt::Result<()> {
/// use rewardrt::weights::{Dtype, TensorData};
/// use rewardrt::{InFlight, UpdateOptions};
///
/// let options = UpdateOptions { in_flight: InFlight::Keep, check_finite: true, ..UpdateOptions::default() };
/// let mut update = model.update(&options)?;
/// for (name, shape, bytes) in &tensors {
///     update.put(&TensorData { name, dtype: Dtype::BF16, shape, bytes, checksum: None })?;
/// }
/// update.commit(model.weights_version() + 1)?;
/// # Ok(())
/// # }
/// ```
pub struct Update {
    model: Model,
    options: UpdateOptions,
    version: u64,
    generation: u64,
    /// The model's present weights are valid.
    is_based: bool,
    /// Bytes the model held when it began.
    held: u64,
    staging: Option<Staging>,
    end: &'static str,
}

impl Model {
    /// Begins an update. In shadow the model goes on as it is until the commit, and several updates may be under way: the
    /// first to be committed wins.
    ///
    /// # Errors
    /// `Conflict` if the model has another version than is expected, is asleep, or is being written in place, or if its
    /// weights are not valid and the update does not bring all of them; in place also `Timeout` and `Busy`.
    pub fn update(&self, options: &UpdateOptions) -> Result<Update> {
        let options = *options;
        let deadline = deadline(options.timeout);
        let state = self.weights().lock();
        let conflict = |text: String| Err(Error::new(ErrorKind::Conflict, text));
        if let Some(expected) = options.expect_version.filter(|v| *v != state.version) {
            return conflict(format!(
                "the model's weights have version {}, the update expects {expected}",
                state.version
            ));
        }
        if state.sleeps.weights {
            return conflict("the model's weights are asleep; wake them first".into());
        }
        if state.is_broken && options.require != Require::All {
            return conflict(
                "the model's weights are not valid since an update in place was not finished: only an update that requires all tensors can begin".into(),
            );
        }
        let in_place = options.storage == Storage::InPlace;
        let Some(mut weights) = state.weights.clone() else {
            return conflict("another update writes the model's weights in place".into());
        };
        let (version, generation) = (state.version, state.generation);
        let is_based = !state.is_broken;
        drop(state);
        let held = self.memory().allocated();
        if in_place {
            // Nobody else may hold the tensors that are to be written.
            drop(weights);
            let model = self.clone();
            weights = self.quiesce(options.in_flight, deadline, move |lane| {
                let mut state = model.weights().lock();
                let free = lane.generation() == generation && !lane.holds.updating && !state.sleeps.weights;
                let Some(weights) = state.weights.take_if(|_| free) else {
                    let text = "another update of this model was committed, or the model went to sleep, while this one began: begin anew";
                    return Err(Error::new(ErrorKind::Conflict, text));
                };
                state.device = None;
                lane.executor().unload();
                lane.holds.updating = true;
                Ok(weights)
            })?;
        }
        let rules = StagingRules {
            owner: "the model",
            require_all: options.require == Require::All,
            optional: None,
            ignores_weightless: true,
            check_finite: options.check_finite,
            convert: options.convert,
            in_place,
            tied: self.spec().head == Head::LanguageModel { tied: true },
        };
        let staging = Some(Staging::new(weights, rules));
        Ok(Update { model: self.clone(), options, version, generation, is_based, held, staging, end: "" })
    }
}

pub(crate) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

impl Update {
    fn staging(&mut self) -> Result<&mut Staging> {
        let end = self.end;
        self.staging.as_mut().ok_or_else(|| Error::new(ErrorKind::Conflict, format!("the update was {end}")))
    }

    /// Makes sure that the memory budget has room for what is to be put: `over` the model's own memory, where that is allowed.
    fn room<S: AsRef<str> + std::fmt::Debug>(&mut self, names: &[S], over: bool) -> Result<()> {
        let (held, budget) = (self.held, self.model.memory_budget());
        let staging = self.staging()?;
        let (staged, more) = (staging.bytes(), names.iter().map(|name| staging.cost(name.as_ref(), over)).sum::<u64>());
        match budget {
            Some(budget) if held.saturating_add(staged).saturating_add(more) > budget => Err(Error::limit(format!(
                "{names:?}: the memory budget is {budget} bytes; {held} are held, {staged} staged, and {more} more are needed"
            ))),
            _ => Ok(()),
        }
    }

    /// Takes a tensor, under its name in the checkpoint. Its bytes are copied before this returns.
    ///
    /// # Errors
    /// `NotFound` for a name that is not the model's, `Duplicate` if it was put before, `Shape` for another shape or dtype,
    /// `Argument` for another number of bytes, `Format` if the checksum differs, `NonFinite`, `Limit` (memory budget) or
    /// `HostMemory`. Nothing of the tensor is taken then, and the update can go on. `Conflict` if it has ended.
    pub fn put(&mut self, tensor: &TensorData) -> Result<()> {
        self.room(&[tensor.name], true)?;
        self.staging()?.put(tensor)
    }

    /// Takes a part of a tensor: `tensor.shape` is the part's, `start` its first index in each dimension. The tensor is
    /// there when its parts cover it.
    ///
    /// # Errors
    /// As [`Update::put`]; `Shape` for a part that reaches out, `Duplicate` for one that overlaps another.
    pub fn put_slice(&mut self, tensor: &TensorData, start: &[usize]) -> Result<()> {
        self.room(&[tensor.name], false)?;
        self.staging()?.put_slice(tensor, start)
    }

    /// Takes every tensor of a safetensors file, or of a folder with `model.safetensors` or an index. Files are mapped
    /// where the model's own are: they must not be changed as long as the model uses them.
    ///
    /// # Errors
    /// Those of opening a checkpoint, and those of [`Update::put`], naming the file.
    pub fn put_files(&mut self, path: &Path) -> Result<()> {
        let options = self.model.load_options().clone();
        let mut checkpoint = Checkpoint::open(path, &LoadOptions { use_mmap: true, ..options.clone() })?;
        // What is mapped and fits as it is takes no memory.
        let dtypes: HashMap<String, Dtype> = self.model.tensors().into_iter().map(|(n, d, _)| (n, d)).collect();
        let takes = |name: &str, info: &TensorInfo| {
            let known = dtypes.get(name);
            known.is_some_and(|dtype| !options.use_mmap || dtype.name() != info.dtype)
        };
        let names: Vec<&str> = checkpoint.tensors().filter(|(n, t)| takes(n, t)).map(|(n, _)| n).collect();
        self.room(&names, true)?;
        if !options.use_mmap {
            checkpoint = Checkpoint::open(path, &options)?;
        }
        self.staging()?.put_checkpoint(path, &checkpoint)
    }

    /// Takes the tensors that a delta changes, as they become by it; all others stay as they are, whatever
    /// [`UpdateOptions::require`] says. Returns the delta's version.
    ///
    /// # Errors
    /// Those of [`Delta::open`] and [`Delta::apply`], naming folder and tensor; `Conflict` if it is made for another version than
    /// the model's, `NotFound` or `Shape` for tensors that are not the model's. Nothing is taken then, except in place.
    pub fn put_delta(&mut self, folder: &Path) -> Result<u64> {
        let options = self.model.load_options().clone();
        let delta = Delta::open(folder, &options)?;
        if !self.is_based {
            let text =
                format!("{}: the model has no valid weights to which a delta could be applied", folder.display());
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        if delta.base_version() != self.version {
            let text = format!(
                "{}: the delta leads from version {} to {}, the model has version {}",
                folder.display(),
                delta.base_version(),
                delta.version(),
                self.version
            );
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        let layouts: BTreeMap<&str, _> = delta.tensors().map(|t| (t.name, t.layout)).collect();
        let names: Vec<String> = layouts.keys().map(|name| (*name).to_owned()).collect();
        self.room(&names, false)?;
        self.staging()?.derive_all(&names, |name, model, out| {
            let declared = layouts.get(name).and_then(Option::as_ref);
            if let Some((dtype, shape)) =
                declared.filter(|(d, s)| d.as_str() != model.dtype().name() || *s != model.shape())
            {
                let (ours, kind) = (model.shape(), model.dtype().name());
                let text = format!("tensor {name:?} is {dtype} {shape:?} in the delta, {kind} {ours:?} in the model");
                return Err(Error::new(ErrorKind::Shape, text).at(folder.display()));
            }
            delta.apply(name, model.bytes(), out)
        })?;
        Ok(delta.version())
    }

    /// Takes tensors that `make` computes from the model's present ones, which it returns.
    pub(crate) fn derive(
        &mut self,
        names: &[String],
        make: impl Fn(&str, &Tensor, &mut [u8]) -> Result<()>,
    ) -> Result<Vec<(String, Tensor)>> {
        self.room(names, false)?;
        let staging = self.staging()?;
        let originals = names.iter().map(|name| Ok((name.clone(), staging.present(name)?.clone())));
        let originals = originals.collect::<Result<_>>()?;
        staging.derive_all(names, make)?;
        Ok(originals)
    }

    /// The generation that the weights will have once this is committed.
    pub(crate) fn next_generation(&self) -> u64 {
        self.generation + 1
    }

    /// Makes the new weights the model's: waits for, ends or stops the sequences under way, then changes all weights
    /// between two steps. What begins after that, and what is kept under way, is computed with the new ones; caches of the
    /// old ones are gone. On success the update has ended.
    ///
    /// # Errors
    /// `Shape` listing what is missing, `Argument` if the version is the present one, `Conflict` if another update was
    /// committed since this one began, `Timeout`, `Busy` (sequences under way cannot finish, for the model is paused
    /// or sleeps), `Limit` (no room for both on a GPU), or what makes the weights unusable on the device. In shadow the old
    /// weights serve on and the update may go on; in place see [`Storage::InPlace`].
    pub fn commit(&mut self, version: u64) -> Result<()> {
        let in_place = self.options.storage == Storage::InPlace;
        let present = self.version;
        let (weights, changed) = self.staging()?.complete()?;
        if version == present {
            return Err(Error::argument(format!("version {version} is the one that the model has now")));
        }
        if in_place {
            self.commit_in_place(weights, version)?
        } else {
            self.exchange(weights, &changed, version)?
        }
        self.staging = None;
        self.end = "committed";
        Ok(())
    }

    /// Takes the new weights in between two steps.
    fn exchange(&self, weights: Weights, changed: &HashSet<String>, version: u64) -> Result<()> {
        self.model.exchange(Exchange {
            weights,
            changed,
            version,
            base: self.generation,
            in_flight: self.options.in_flight,
            timeout: self.options.timeout,
        })
    }

    fn commit_in_place(&mut self, weights: Weights, version: u64) -> Result<()> {
        self.staging = None;
        self.end = "not finished in place";
        let result = self.model.revive(weights, Some(version));
        if let Err(error) = &result {
            self.model.invalidate(error);
        }
        result
    }

    /// True after [`commit`](Update::commit) has succeeded, or failed in place.
    pub fn has_ended(&self) -> bool {
        self.staging.is_none()
    }

    /// Ends the update. In shadow nothing has changed.
    pub fn abort(mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        let Some(staging) = self.staging.take() else { return };
        self.end = "aborted";
        if self.options.storage == Storage::Shadow {
            return;
        }
        // In place and unfinished: the old weights come back, unless something was written or they were not valid before.
        let spoilt = staging.touched || !self.is_based;
        let revived = if spoilt {
            let text = "an update in place was aborted after it had begun to write";
            let mut state = self.model.weights().lock();
            (state.weights, state.is_broken) = (Some(staging.into_base()), true);
            Err(Error::new(ErrorKind::Conflict, text))
        } else {
            self.model.revive(staging.into_base(), None)
        };
        if let Err(error) = revived {
            self.model.invalidate(&error);
        }
    }
}

impl Drop for Update {
    fn drop(&mut self) {
        self.give_up();
    }
}
