//! The weights that a model has, and how others take their place between two steps.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::{DeviceWeights, Loader, Memory};
use crate::engine::{InFlight, Lane};
use crate::error::{Error, ErrorKind, Result};
use crate::lifecycle::Tags;
use crate::loaded_model::Model;
use crate::update::deadline;
use crate::weights::Weights;

/// The weights that a model has at the moment.
pub(crate) struct WeightState {
    pub version: u64,
    pub generation: u64,
    /// `None` while an update writes them in place.
    pub weights: Option<Weights>,
    /// `None` while the device does not have them: in place, asleep, or not valid.
    pub device: Option<DeviceWeights>,
    pub memory: Memory,
    is_on_gpu: bool,
    /// An update in place did not come to its end.
    pub is_broken: bool,
    /// What was given back.
    pub sleeps: Tags,
}

impl WeightState {
    /// Notes what the model holds by now.
    pub fn note_memory(&mut self, lane: &mut Lane) {
        let mut memory = lane.executor().memory();
        if self.is_on_gpu || self.device.is_none() {
            memory.host = self.weights.as_ref().map_or(0, Weights::bytes_in_memory);
        }
        self.memory = memory;
    }
}

/// The weights of a model, and who makes new ones ready for its device.
pub(crate) struct ModelWeights {
    state: Mutex<WeightState>,
    pub loader: Arc<dyn Loader>,
}

impl ModelWeights {
    pub fn new(
        version: u64,
        weights: Weights,
        device: Option<DeviceWeights>,
        loader: Arc<dyn Loader>,
        memory: Memory,
    ) -> Self {
        let state = WeightState {
            is_on_gpu: matches!(device, Some(DeviceWeights::Gpu(_))),
            version,
            generation: 0,
            weights: Some(weights),
            device,
            memory,
            is_broken: false,
            sleeps: Tags::default(),
        };
        ModelWeights { state: Mutex::new(state), loader }
    }

    pub fn lock(&self) -> MutexGuard<'_, WeightState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A change of weights that is ready to be made.
pub(crate) struct Exchange<'a> {
    pub weights: Weights,
    pub changed: &'a HashSet<String>,
    pub version: u64,
    /// The generation that it was made from.
    pub base: u64,
    pub in_flight: InFlight,
    /// From when the weights are loaded.
    pub timeout: Option<Duration>,
}

impl Model {
    /// Loads weights beside the present ones and takes them over between two steps.
    pub(crate) fn exchange(&self, exchange: Exchange) -> Result<()> {
        let Exchange { weights, changed, version, base, in_flight, timeout } = exchange;
        let state = self.weights().lock();
        let (held, host) = (state.device.clone(), state.memory.host);
        // Before the load, and before anybody is cancelled for it; the closure below makes sure.
        if state.generation != base || state.sleeps.weights || state.weights.is_none() {
            let text = "the model's weights were changed, put to sleep or begun to be written in place since this began: begin anew";
            return Err(Error::new(ErrorKind::Conflict, text));
        }
        drop(state);
        let allocated = self.memory().allocated();
        if let Some(DeviceWeights::Gpu(_)) = &held {
            // On the CPU what was put is what will be used, and was counted then.
            let staged = weights.bytes_in_memory().saturating_sub(host);
            let new = changed.iter().filter_map(|name| weights.find(name)).map(|t| t.bytes().len() as u64).sum::<u64>();
            let new = new + staged;
            if let Some(budget) = self.memory_budget().filter(|b| allocated.saturating_add(new) > *b) {
                return Err(Error::limit(format!(
                    "the memory budget is {budget} bytes, {allocated} are held, and {new} more are needed until the old weights go; update in place"
                )));
            }
        }
        let device = self.weights().loader.load(&weights, held.as_ref(), changed)?;
        drop(held);
        let model = self.clone();
        self.quiesce(in_flight, deadline(timeout), move |lane| {
            if lane.generation() != base {
                let text = "another update of this model was committed since this one began: begin anew";
                return Err(Error::new(ErrorKind::Conflict, text));
            }
            if lane.holds.updating || model.weights().lock().sleeps.weights {
                let text = "the model went to sleep, or is being written in place, since the update began";
                return Err(Error::new(ErrorKind::Conflict, text));
            }
            lane.executor().install(device.clone())?;
            lane.renew(version);
            model.adopt(lane, weights, device, version);
            Ok(())
        })
    }

    /// Notes what the lane computes with from now on.
    fn adopt(&self, lane: &mut Lane, weights: Weights, device: DeviceWeights, version: u64) {
        lane.set_invalid(None);
        let mut state = self.weights().lock();
        state.version = version;
        state.generation = lane.generation();
        state.weights = Some(weights);
        state.device = Some(device);
        state.is_broken = false;
        state.note_memory(lane);
    }

    /// Gives a lane that is held for an update in place its weights: new ones under a version, or the old ones again.
    pub(crate) fn revive(&self, weights: Weights, version: Option<u64>) -> Result<()> {
        // Whatever happens, the host's copy is what later updates are compared with.
        self.weights().lock().weights = Some(weights.clone());
        let device = self.weights().loader.load(&weights, None, &HashSet::new())?;
        let model = self.clone();
        self.quiesce(InFlight::Keep, None, move |lane| {
            if lane.executor().install(device.clone())? && version.is_none() {
                lane.restart();
            }
            let version = match version {
                Some(version) => {
                    lane.renew(version);
                    version
                }
                None => model.weights().lock().version,
            };
            model.adopt(lane, weights, device, version);
            lane.holds.updating = false;
            Ok(())
        })
    }

    /// Refuses jobs until whole weights are there.
    pub(crate) fn invalidate(&self, error: &Error) {
        let text = format!("the model has no valid weights: {error}; commit an update that brings all of them");
        let error = Error::new(ErrorKind::Conflict, text);
        self.weights().lock().is_broken = true;
        let model = self.clone();
        // The engine may be gone, and with it the lane.
        let _ = self.quiesce(InFlight::Keep, None, move |lane| {
            lane.holds.updating = false;
            // Updates that began before, from whole weights, must not be committed on top.
            lane.spoil();
            model.weights().lock().generation = lane.generation();
            lane.set_invalid(Some(error));
            Ok(())
        });
    }
}
