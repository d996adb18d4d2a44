//! Adapters of a loaded model: policies that share one copy of the base weights.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::engine::{AdapterContent, NewAdapter};
use crate::error::{Error, ErrorKind, Result};
use crate::loaded_model::Model;
use crate::weights::{AdapterCheckpoint, AdapterLayout, AdapterWeights, LoadOptions};

/// How an adapter is loaded.
#[derive(Clone, Debug, Default)]
pub struct AdapterOptions {
    /// What it is called in messages; `None`: as its folder, or "adapter".
    pub name: Option<String>,
    /// The version that results carry.
    pub version: u64,
    /// How its files are opened.
    pub load: LoadOptions,
}

/// A LoRA adapter of a model. Cheap to clone.
///
/// Requests name it, or another one, or none; rows of all of them share steps, and what is returned for a sequence
/// depends on the sequence and its own adapter alone. So a policy is a base model with an adapter and the reference is the
/// same model without one:
///
/// ```no_run
/// # fn f(model: &rewardrt::Model, prompts: Vec<Vec<u32>>) -> rewardrt::Result<()> {
/// use rewardrt::{AdapterOptions, LogprobRequest, SampleRequest};
///
/// let policy = model.load_adapter("step-1".as_ref(), &AdapterOptions { version: 1, ..AdapterOptions::default() })?;
/// let request = SampleRequest { prompts: prompts.clone(), adapter: Some(policy.clone()), ..SampleRequest::default() };
/// let answers = model.sample(&request)?.wait()?;
/// let pairs = answers.iter().map(|a| (prompts[a.prompt].clone(), a.tokens.iter().map(|t| t.id).collect()));
/// let reference = model.logprobs(&LogprobRequest::completions(pairs))?.wait()?;
/// policy.replace("step-2".as_ref(), 2)?;
/// # let _ = reference;
/// # Ok(())
/// # }
/// ```
///
/// When the last clone is dropped, and the last sequence that uses it has ended, its memory is free.
#[derive(Clone)]
pub struct Adapter {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    load: LoadOptions,
    // Dropped before `freed` tells the engine that it may be the last.
    current: Mutex<Loaded>,
    freed: Freed,
}

#[derive(Clone)]
pub(crate) struct Loaded {
    pub content: Arc<AdapterContent>,
    pub weights: Arc<AdapterWeights>,
    pub layout: AdapterLayout,
    folder: Option<PathBuf>,
}

/// Names a content without keeping it.
#[derive(Clone, Copy)]
pub(crate) struct ContentName {
    pub id: u64,
    pub version: u64,
}

/// Tells the engine to look which contents are still in use.
struct Freed(Model);

impl Drop for Freed {
    fn drop(&mut self) {
        self.0.free_adapters();
    }
}

impl Model {
    /// Loads a LoRA adapter from the folder that PEFT's `save_pretrained` wrote: factors of any of q, k, v, o, gate, up and
    /// down, and on a sequence classifier a score head of its own. Nothing of the base model is copied or changed. Steps go
    /// on while it is read.
    ///
    /// # Errors
    /// `Io`, `NotFound`, `Format`, `Unsupported`, `Shape` or `NonFinite`, naming the file and every field or tensor; `Limit`
    /// if it does not fit [`ModelOptions::memory`](crate::ModelOptions::memory); `HostMemory` or `DeviceMemory`. Nothing
    /// stays loaded.
    pub fn load_adapter(&self, folder: &Path, options: &AdapterOptions) -> Result<Adapter> {
        let name = options.name.clone().unwrap_or_else(|| {
            folder.file_name().map_or_else(|| folder.display().to_string(), |n| n.to_string_lossy().into_owned())
        });
        let loaded = self.read_adapter(&name, folder, options.version, &options.load)?;
        Ok(self.new_adapter(name, options, loaded))
    }

    /// Makes the LoRA adapter that the text of a PEFT adapter_config.json describes. All its values are zero, so that it
    /// changes nothing, until [`Adapter::update`] brings others; a score head of its own comes with them.
    ///
    /// # Errors
    /// As [`Model::load_adapter`].
    pub fn adapter_from_config(&self, config: &str, options: &AdapterOptions) -> Result<Adapter> {
        let name = options.name.clone().unwrap_or_else(|| "adapter".into());
        let loaded = (|| {
            let layout = AdapterLayout::new(config.as_bytes(), self.spec(), self.plan())?;
            layout.check_purpose(layout.head().is_some(), self.spec(), self.plan())?;
            self.check_adapter_room(layout.bytes(false), 0)?;
            let weights = Arc::new(layout.zeros()?);
            self.add_content(&name, options.version, weights, layout, None)
        })();
        Ok(self.new_adapter(name.clone(), options, loaded.map_err(|e| e.at(format!("adapter {name:?}")))?))
    }

    fn new_adapter(&self, name: String, options: &AdapterOptions, loaded: Loaded) -> Adapter {
        let (load, freed) = (options.load.clone(), Freed(self.clone()));
        Adapter { inner: Arc::new(Inner { name, load, current: Mutex::new(loaded), freed }) }
    }

    fn read_adapter(&self, name: &str, folder: &Path, version: u64, load: &LoadOptions) -> Result<Loaded> {
        let checkpoint = AdapterCheckpoint::open(folder, self.spec(), self.plan(), load)?;
        self.check_adapter_room(checkpoint.bytes(), 0).map_err(|e| e.at(folder.display()))?;
        let weights = Arc::new(checkpoint.read()?);
        let layout = checkpoint.layout().clone();
        self.add_content(name, version, weights, layout, Some(folder)).map_err(|e| e.at(folder.display()))
    }

    /// Looks at the memory budget before memory is taken: `bytes` more, beside the `held` that other adapters take. The device
    /// counts again.
    pub(crate) fn check_adapter_room(&self, bytes: u64, held: u64) -> Result<()> {
        let room = self.adapter_room().saturating_sub(held);
        if bytes <= room {
            return Ok(());
        }
        Err(Error::limit(format!(
            "{bytes} bytes are needed, and the model's memory budget leaves {room} for adapters; load the model with more memory or fewer kv_tokens"
        )))
    }

    /// Brings an adapter's values to the device.
    fn add_content(
        &self,
        name: &str,
        version: u64,
        weights: Arc<AdapterWeights>,
        layout: AdapterLayout,
        folder: Option<&Path>,
    ) -> Result<Loaded> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let content = Arc::new(AdapterContent { id: NEXT.fetch_add(1, Ordering::Relaxed), version });
        let room = self.adapter_room();
        self.add_adapter(NewAdapter { content: content.clone(), weights: weights.clone(), room })?;
        let (rank, kib) = (weights.rank(), weights.bytes() >> 10);
        let from = folder.map_or_else(|| "from memory".into(), |f| f.display().to_string());
        log::info!("adapter {name:?}: version {version}, rank {rank}, {kib} KiB, {from}");
        Ok(Loaded { content, weights, layout, folder: folder.map(Path::to_owned) })
    }
}

impl Adapter {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    pub(crate) fn current(&self) -> Loaded {
        self.inner.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The largest rank of its modules.
    pub fn rank(&self) -> usize {
        self.current().weights.rank()
    }

    /// The version that results of new requests carry.
    pub fn version(&self) -> u64 {
        self.current().content.version
    }

    /// Bytes of its values; the device may take somewhat more.
    pub fn bytes(&self) -> u64 {
        self.current().weights.bytes()
    }

    /// The folder that it was loaded from or replaced by; `None` after [`adapter_from_config`](Model::adapter_from_config) or an
    /// [`update`](Adapter::update).
    pub fn folder(&self) -> Option<PathBuf> {
        self.current().folder
    }

    /// How its files are opened.
    pub(crate) fn load_options(&self) -> &LoadOptions {
        &self.inner.load
    }

    /// Puts other values in its place, which may have other ranks and modules. Requests that are submitted from now on use
    /// them, in every clone; sequences that were submitted before end with the values that they began with. Steps go on
    /// while they are read, and for that time there is room for both.
    ///
    /// # Errors
    /// As [`Model::load_adapter`]; the old values stay then.
    pub fn replace(&self, folder: &Path, version: u64) -> Result<()> {
        let loaded = self.model().read_adapter(&self.inner.name, folder, version, &self.inner.load)?;
        self.exchange(loaded, |_| Ok(()))
    }

    /// Puts values from memory in its place, if it still has the ones of `expected`.
    ///
    /// # Errors
    /// `Conflict` if others came since, or what keeps the device from taking them; the old values stay then.
    pub(crate) fn replace_content(
        &self,
        expected: ContentName,
        weights: Arc<AdapterWeights>,
        version: u64,
    ) -> Result<()> {
        let check = |present: &Loaded| {
            if present.content.id == expected.id {
                return Ok(());
            }
            let text = format!(
                "the adapter has had other values, of version {}, since the update began with version {}",
                present.content.version, expected.version
            );
            Err(Error::new(ErrorKind::Conflict, text))
        };
        // The old content is let go of again, or it would stay on the device.
        let layout = {
            let present = self.current();
            check(&present)?;
            present.layout
        };
        self.exchange(self.model().add_content(&self.inner.name, version, weights, layout, None)?, check)
    }

    fn exchange(&self, loaded: Loaded, check: impl Fn(&Loaded) -> Result<()>) -> Result<()> {
        let result = {
            let mut current = self.inner.current.lock().unwrap_or_else(PoisonError::into_inner);
            check(&current).map(|()| std::mem::replace(&mut *current, loaded))
        };
        // Whichever of the two nobody uses is free now.
        let result = result.map(drop);
        self.model().free_adapters();
        result
    }

    pub(crate) fn model(&self) -> &Model {
        &self.inner.freed.0
    }

    pub(crate) fn weights(&self) -> Arc<AdapterWeights> {
        self.current().weights
    }

    /// What a request of `model` gets.
    pub(crate) fn content(&self, model: &Model) -> Result<Arc<AdapterContent>> {
        if self.inner.freed.0.is(model) {
            return Ok(self.current().content);
        }
        Err(Error::argument(format!("the adapter {:?} was loaded for another model", self.inner.name)))
    }
}

impl fmt::Debug for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Adapter").field("name", &self.name()).field("version", &self.version()).finish_non_exhaustive()
    }
}
