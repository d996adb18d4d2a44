//! Pausing, and giving memory back for a while.

use std::collections::HashSet;
use std::time::Duration;

use crate::engine::InFlight;
use crate::error::{Error, ErrorKind, Result};
use crate::loaded_model::Model;
use crate::runtime::Runtime;
use crate::update::deadline;

/// Kinds of memory that a model can give back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tags {
    /// The weights on the device, and what is quantised from the checkpoint. The checkpoint's own bytes stay, mapped or in
    /// host memory, so that waking reads no file but a mapped one.
    pub weights: bool,
    /// The KV cache, with all that is in it.
    pub kv_cache: bool,
}

impl Tags {
    /// Everything that can be given back.
    pub const ALL: Tags = Tags { weights: true, kv_cache: true };

    fn any(self) -> bool {
        self.weights || self.kv_cache
    }
}

impl Runtime {
    /// Stops every model of this runtime between two steps; jobs may still be submitted, and wait. Cancelling and deadlines
    /// work on. Weights may be updated meanwhile, for sequences that are kept with [`InFlight::Keep`].
    ///
    /// # Errors
    /// `Timeout` if sequences did not finish in time, `Busy` if they cannot (a model sleeps, or the runtime is paused with
    /// sequences kept); everything goes on then, unless another pause is in force or on its way.
    pub fn pause(&self, in_flight: InFlight, timeout: Option<Duration>) -> Result<()> {
        if in_flight == InFlight::Cancel {
            // Their next jobs would be submitted after the pause, and wait for its end.
            self.rollouts().cancel();
        }
        self.engine().pause(in_flight, deadline(timeout))
    }

    /// Goes on after [`Runtime::pause`]; without effect if nothing is paused.
    ///
    /// # Errors
    /// `Poisoned` if the engine has stopped.
    pub fn resume(&self) -> Result<()> {
        self.engine().resume()
    }
}

fn written() -> Error {
    Error::new(ErrorKind::Conflict, "an update writes the model's weights in place")
}

impl Model {
    /// Gives memory back until [`Model::wake`]. Jobs may still be submitted, and wait. Sequences that are kept under way are
    /// computed again after a sleep of the KV cache, with the same results.
    ///
    /// # Errors
    /// `Timeout` if sequences did not finish in time, `Busy` if they cannot, `Conflict` while an update writes in place;
    /// nothing changed then.
    pub fn sleep(&self, tags: Tags, in_flight: InFlight, timeout: Option<Duration>) -> Result<()> {
        if !tags.any() {
            return Ok(());
        }
        if self.weights().lock().weights.is_none() {
            return Err(written());
        }
        let model = self.clone();
        self.quiesce(in_flight, deadline(timeout), move |lane| {
            if lane.holds.updating {
                return Err(written());
            }
            let mut state = model.weights().lock();
            lane.holds.asleep = true;
            if tags.weights && !state.sleeps.weights {
                lane.executor().unload();
                state.device = None;
                state.sleeps.weights = true;
            }
            if tags.kv_cache && !state.sleeps.kv_cache {
                lane.restart();
                lane.executor().free_cache();
                state.sleeps.kv_cache = true;
            }
            state.note_memory(lane);
            Ok(())
        })
    }

    /// Takes memory back that [`Model::sleep`] gave; the model goes on when nothing of it is missing any more.
    ///
    /// # Errors
    /// `DeviceMemory`, `HostMemory` or an error of the device; what could be had stays, and the model sleeps on.
    pub fn wake(&self, tags: Tags) -> Result<()> {
        let mut device = None;
        let state = self.weights().lock();
        let (sleeps, weights, generation) = (state.sleeps, state.weights.clone(), state.generation);
        drop(state);
        if tags.weights
            && sleeps.weights
            && let Some(weights) = weights
        {
            device = Some(self.weights().loader.load(&weights, None, &HashSet::new())?);
        }
        let model = self.clone();
        self.quiesce(InFlight::Keep, None, move |lane| {
            let mut state = model.weights().lock();
            // Others may have woken it meanwhile, and given it other weights.
            if let Some(device) = device
                && state.sleeps.weights
                && lane.generation() == generation
            {
                if lane.executor().install(device.clone())? {
                    lane.restart();
                }
                state.device = Some(device);
                state.sleeps.weights = false;
            }
            let mut restored = Ok(());
            if tags.kv_cache && state.sleeps.kv_cache {
                restored = lane.executor().restore_cache();
                state.sleeps.kv_cache = restored.is_err();
            }
            lane.holds.asleep = state.sleeps.any();
            state.note_memory(lane);
            restored
        })
    }

    /// Gives the memory of the KV cache back to the system and takes it anew, which forgets every prefix that is kept. Does
    /// nothing while the model has jobs, is paused, asleep or being updated.
    ///
    /// # Errors
    /// `DeviceMemory`, `HostMemory` or an error of the device: the model sleeps then, see [`Model::wake`].
    pub fn trim(&self) -> Result<()> {
        let model = self.clone();
        self.quiesce(InFlight::Keep, None, move |lane| {
            if !lane.is_idle() {
                return Ok(());
            }
            let mut state = model.weights().lock();
            lane.restart();
            lane.executor().free_cache();
            let restored = lane.executor().restore_cache();
            state.sleeps.kv_cache = restored.is_err();
            lane.holds.asleep = state.sleeps.any();
            state.note_memory(lane);
            restored
        })
    }

    /// What the model has given back.
    pub fn sleeping(&self) -> Tags {
        self.weights().lock().sleeps
    }
}
