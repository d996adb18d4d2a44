//! New values for an adapter from a trainer's memory.

use std::path::Path;
use std::sync::Arc;

use crate::adapter::{Adapter, ContentName, Loaded};
use crate::error::{Error, ErrorKind, Result};
use crate::update::Require;
use crate::weights::{AdapterCheckpoint, AdapterLayout, Checkpoint, LoadOptions, Staging, StagingRules, TensorData};

/// How an adapter is updated.
#[derive(Clone, Copy, Debug, Default)]
pub struct AdapterUpdateOptions {
    /// The update is refused unless this is the adapter's version.
    pub expect_version: Option<u64>,
    /// Which of its tensors the update must bring.
    pub require: Require,
}

/// New values for an [`Adapter`] on their way, beside the old ones. Dropping it aborts it.
///
/// Tensors have PEFT's names, as in adapter_model.safetensors and `get_peft_model_state_dict`:
/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight` of shape [R, K], `….lora_B.weight` of shape [N, R],
/// `base_model.model.score.weight`. Any of f32, f16 and bf16 is taken, exactly; NaN and infinities are refused. Ranks,
/// scales and modules stay: they are the config's, and [`Adapter::replace`] reads another one.
///
/// ```no_run
/// # fn f(model: &rewardrt::Model, config: &str, tensors: Vec<(String, Vec<usize>, Vec<u8>)>) -> rewardrt::Result<()> {
/// use rewardrt::weights::{Dtype, TensorData};
/// use rewardrt::{AdapterOptions, AdapterUpdateOptions};
///
/// let policy = model.adapter_from_config(config, &AdapterOptions::default())?;
/// let mut update = policy.update(&AdapterUpdateOptions::default())?;
/// for (name, shape, bytes) in &tensors {
///     update.put(&TensorData { name, dtype: Dtype::BF16, shape, bytes, checksum: None })?;
/// }
/// update.commit(policy.version() + 1)?;
/// # Ok(())
/// # }
/// ```
pub struct AdapterUpdate {
    adapter: Adapter,
    /// What the adapter was when it began; not its values, which would keep their memory.
    base: ContentName,
    layout: AdapterLayout,
    has_head: bool,
    staging: Option<Staging>,
    end: &'static str,
}

impl Adapter {
    /// Begins an update. Requests go on with the adapter as it is until the commit; several updates may be under way, and the
    /// first to be committed wins.
    ///
    /// # Errors
    /// `Conflict` if the adapter has another version than is expected; `Limit` if there is no room for the new values;
    /// `HostMemory`.
    pub fn update(&self, options: &AdapterUpdateOptions) -> Result<AdapterUpdate> {
        let at = |error: Error| error.at(format!("adapter {:?}", self.name()));
        let Loaded { content, weights, layout, .. } = self.current();
        let base = ContentName { id: content.id, version: content.version };
        if let Some(expected) = options.expect_version.filter(|v| *v != base.version) {
            let text = format!("it has version {}, the update expects {expected}", base.version);
            return Err(at(Error::new(ErrorKind::Conflict, text)));
        }
        // Held, it would keep its place on the device if it were replaced meanwhile.
        drop(content);
        let require_all = options.require == Require::All;
        // What is put, what is made of it, and a copy of the present values for those that are not put.
        let copies = if require_all { 2 } else { 3 };
        self.model().check_adapter_room(copies * layout.bytes(true), self.model().stats().adapter_bytes).map_err(at)?;
        let present = layout.as_weights((!require_all).then_some(&*weights)).map_err(at)?;
        let rules = StagingRules {
            owner: "the adapter",
            require_all,
            optional: layout.head().filter(|_| !layout.needs_head() && weights.head().is_none()).map(str::to_owned),
            ignores_weightless: false,
            check_finite: true,
            // To f32, which is exact.
            convert: true,
            in_place: false,
            tied: false,
        };
        let (has_head, staging) = (weights.head().is_some(), Some(Staging::new(present, rules)));
        Ok(AdapterUpdate { adapter: self.clone(), base, layout, has_head, staging, end: "" })
    }
}

impl AdapterUpdate {
    /// Does something with what was put so far, and names the adapter in what goes wrong.
    fn with_staging<T>(&mut self, act: impl FnOnce(&mut Staging) -> Result<T>) -> Result<T> {
        let end = self.end;
        let staging = self.staging.as_mut();
        staging
            .ok_or_else(|| Error::new(ErrorKind::Conflict, format!("the update was {end}")))
            .and_then(act)
            .map_err(|e| e.at(format!("adapter {:?}", self.adapter.name())))
    }

    /// Takes a tensor, under PEFT's name. Its bytes are copied before this returns.
    ///
    /// # Errors
    /// `NotFound` for a name that is not the adapter's, `Duplicate` if it was put before, `Shape`, `Argument` for another number
    /// of bytes, `Format` if the checksum differs, `NonFinite` or `HostMemory`. Nothing of the tensor is taken then, and the
    /// update can go on. `Conflict` if it has ended.
    pub fn put(&mut self, tensor: &TensorData) -> Result<()> {
        self.with_staging(|staging| staging.put(tensor))
    }

    /// Takes a part of a tensor: `tensor.shape` is the part's, `start` its first index in each dimension. The tensor is
    /// there when its parts cover it.
    ///
    /// # Errors
    /// As [`AdapterUpdate::put`]; `Shape` for a part that reaches out, `Duplicate` for one that overlaps another.
    pub fn put_slice(&mut self, tensor: &TensorData, start: &[usize]) -> Result<()> {
        self.with_staging(|staging| staging.put_slice(tensor, start))
    }

    /// Takes every tensor of a safetensors file, or of a folder that PEFT's `save_pretrained` wrote, whose config must ask for
    /// the factors that the adapter has. Files are read, not mapped: they may change once this has returned.
    ///
    /// # Errors
    /// Those of opening the file or [`Model::load_adapter`](crate::Model::load_adapter); `Shape` for a folder with other ranks, scales
    /// or modules; those of [`AdapterUpdate::put`]. Nothing is taken then.
    pub fn put_files(&mut self, path: &Path) -> Result<()> {
        let model = self.adapter.model().clone();
        let load = LoadOptions { use_mmap: false, ..self.adapter.load_options().clone() };
        let layout = self.layout.clone();
        self.with_staging(|staging| {
            if !path.is_dir() {
                return staging.put_checkpoint(path, &Checkpoint::open(path, &load)?);
            }
            let checkpoint = AdapterCheckpoint::open(path, model.spec(), model.plan(), &load)?;
            if let Some(difference) = layout.difference(checkpoint.layout()) {
                let text = format!("{difference}; replace the adapter by it instead");
                return Err(Error::new(ErrorKind::Shape, text).at(path.display()));
            }
            staging.put_checkpoint(path, &Checkpoint::open(&AdapterCheckpoint::tensor_file(path)?, &load)?)
        })
    }

    /// Makes the new values the adapter's. Requests that are submitted from now on use them; sequences that were submitted
    /// before end with the values that they began with. Nothing waits for them. On success the update has ended.
    ///
    /// # Errors
    /// `Shape` listing what is missing, `Argument` if the version is the present one, `Conflict` if the adapter has had other
    /// values since the update began, `Limit`, `Unsupported` (too large for a device that computes in f16), `HostMemory` or
    /// `DeviceMemory`. The old values serve on then, and the update can go on, but for `Conflict`.
    pub fn commit(&mut self, version: u64) -> Result<()> {
        let (adapter, layout, base, had_head) = (self.adapter.clone(), self.layout.clone(), self.base, self.has_head);
        self.with_staging(|staging| {
            let (tensors, changed) = staging.complete()?;
            if version == base.version {
                return Err(Error::argument(format!("version {version} is the one that the adapter has now")));
            }
            let has_head = had_head || layout.head().is_some_and(|name| changed.contains(name));
            adapter.replace_content(base, Arc::new(layout.read(&tensors, has_head)?), version)
        })?;
        (self.staging, self.end) = (None, "committed");
        Ok(())
    }

    /// True after [`commit`](AdapterUpdate::commit) has succeeded.
    pub fn has_ended(&self) -> bool {
        self.staging.is_none()
    }

    /// Ends the update without a change.
    pub fn abort(self) {}
}
