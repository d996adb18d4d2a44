//! Taking weights from a folder in which a trainer leaves them, step by step.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::engine::panic_text;
use crate::error::{Error, ErrorKind, Result, io_error};
use crate::loaded_model::Model;
use crate::update::{Require, UpdateOptions};
use crate::weights::Delta;

/// How a folder is followed.
#[derive(Clone, Copy, Debug)]
pub struct FollowOptions {
    /// How often the folder is looked at; not zero.
    pub interval: Duration,
    /// How each update is made; `expect_version` and `require` are not used.
    pub update: UpdateOptions,
}

impl Default for FollowOptions {
    fn default() -> Self {
        FollowOptions { interval: Duration::from_millis(200), update: UpdateOptions::default() }
    }
}

/// Keeps a model at the newest weights of a folder, until it is dropped.
pub struct Follower {
    model: Model,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Default)]
struct State {
    stop: bool,
    /// A commit is under way: the model's version may be ahead of `updates`.
    commits: bool,
    updates: u64,
    error: Option<Error>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Model {
    /// Follows a folder: of its subfolders `step_N` the one with the largest N above the model's version becomes the
    /// model's weights, with version N. It holds a checkpoint, or a [`Delta`] whose base version is the model's; the newest
    /// checkpoint, and then the deltas that lead on from it, are taken.
    ///
    /// A writer makes a step's folder under another name and renames it ([`publish`](crate::weights::publish) does, and
    /// makes sure that it is on the disk): what is there under its name is complete. What does not open or does not fit is
    /// reported by [`Follower::last_error`], once to the log, and tried again; the model keeps its weights. Folders may be
    /// removed once they are taken, but files must not be changed in place: the model may have them mapped.
    ///
    /// # Errors
    /// `Argument` for an interval of zero, `NotFound` or `Io` if the folder cannot be read, `HostMemory` if no thread can be
    /// started.
    pub fn follow(&self, folder: &Path, options: &FollowOptions) -> Result<Follower> {
        if options.interval.is_zero() {
            return Err(Error::argument("interval is 0, it must be the time between two looks at the folder"));
        }
        steps(folder)?;
        let shared = Arc::new(Shared::default());
        let (for_thread, model, folder, options) = (shared.clone(), self.clone(), folder.to_owned(), *options);
        let thread = std::thread::Builder::new()
            .name("rewardrt-follow".into())
            .spawn(move || run(&for_thread, &model, &folder, options))
            .map_err(|e| Error::new(ErrorKind::HostMemory, format!("cannot start a thread: {e}")))?;
        Ok(Follower { model: self.clone(), shared, thread: Some(thread) })
    }
}

impl Follower {
    /// Updates made so far.
    pub fn updates(&self) -> u64 {
        self.shared.lock().updates
    }

    /// What went wrong when the folder was last looked at.
    pub fn last_error(&self) -> Option<Error> {
        self.shared.lock().error.clone()
    }

    /// Waits until the model has `version` or a later one, whoever brought it there.
    ///
    /// # Errors
    /// `Timeout` if that takes longer than `timeout`; what stopped the follower, if it has stopped by an error (`Poisoned`,
    /// `DeviceLost` or `Internal`).
    pub fn wait_for(&self, version: u64, timeout: Duration) -> Result<()> {
        let deadline = Instant::now().checked_add(timeout);
        let mut state = self.shared.lock();
        loop {
            let has = self.model.weights_version();
            if has >= version && !state.commits {
                return Ok(());
            }
            if let Some(error) = state.error.as_ref().filter(|_| state.stop) {
                return Err(error.clone());
            }
            let left = deadline.map_or(timeout, |d| d.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                let why = state.error.as_ref().map_or_else(String::new, |e| format!(": {e}"));
                return Err(Error::new(
                    ErrorKind::Timeout,
                    format!("the model has version {has}, not yet {version}{why}"),
                ));
            }
            // Told after every look at the folder: others may have updated the model.
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, model: &Model, folder: &Path, options: FollowOptions) {
    loop {
        // Whoever waits must hear of a panic, too.
        let looked = catch_unwind(AssertUnwindSafe(|| advance(shared, model, folder, options.update)))
            .unwrap_or_else(|panic| Err(Error::internal(panic_text(&*panic))));
        let known = shared.lock().error.as_ref().map(Error::to_string);
        if let Err(error) = &looked
            && known.is_none_or(|known| known != error.to_string())
        {
            // Not under the lock: the host's logger may wait for a thread that asks this follower something.
            log::warn!("following {}: {error}", folder.display());
        }
        let mut state = shared.lock();
        state.commits = false;
        state.error = looked.err();
        let is_over = matches!(
            state.error.as_ref().map(Error::kind),
            Some(ErrorKind::Poisoned | ErrorKind::DeviceLost | ErrorKind::Internal)
        );
        state.stop |= is_over;
        shared.changed.notify_all();
        let begun = Instant::now();
        while !state.stop {
            let left = options.interval.saturating_sub(begun.elapsed());
            if left.is_zero() {
                break;
            }
            state = shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        if state.stop {
            return;
        }
    }
}

/// Takes what is there.
fn advance(shared: &Shared, model: &Model, folder: &Path, options: UpdateOptions) -> Result<()> {
    loop {
        let version = model.weights_version();
        let Some((next, path, is_delta)) = choose(model, folder, version)? else { return Ok(()) };
        let update = UpdateOptions { expect_version: Some(version), require: Require::All, ..options };
        let mut update = model.update(&update)?;
        if is_delta {
            let leads_to = update.put_delta(&path)?;
            if leads_to != next {
                let text = format!("{}: the delta leads to version {leads_to}, its folder says {next}", path.display());
                return Err(Error::format(text));
            }
        } else {
            update.put_files(&path)?;
        }
        shared.lock().commits = true;
        update.commit(next)?;
        let mut state = shared.lock();
        state.commits = false;
        state.updates += 1;
        shared.changed.notify_all();
        if state.stop {
            return Ok(());
        }
    }
}

/// The newest checkpoint above `version`, or else the delta that leads on from it.
fn choose(model: &Model, folder: &Path, version: u64) -> Result<Option<(u64, PathBuf, bool)>> {
    let mut newer = steps(folder)?;
    newer.retain(|(n, _)| *n > version);
    newer.sort();
    let mut failed = None;
    let mut delta = None;
    for (n, path) in newer.into_iter().rev() {
        let options = model.load_options();
        let base = match Delta::is_delta(&path, options) {
            Ok(true) => Delta::open(&path, options).map(|d| Some(d.base_version())),
            Ok(false) => Ok(None),
            Err(error) => Err(error),
        };
        match base {
            Ok(None) => return Ok(Some((n, path, false))),
            Ok(Some(base)) if base == version => delta = Some((n, path, true)),
            // One of a chain that does not begin here.
            Ok(Some(_)) => {}
            Err(error) => failed = Some(error),
        }
    }
    match (delta, failed) {
        (Some(delta), _) => Ok(Some(delta)),
        (None, Some(error)) => Err(error),
        (None, None) => Ok(None),
    }
}

/// The subfolders called `step_N`.
fn steps(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(|e| io_error(folder, e))? {
        let path = entry.map_err(|e| io_error(folder, e))?.path();
        let number = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step_")?.parse().ok());
        if let Some(number) = number
            && path.is_dir()
        {
            found.push((number, path));
        }
    }
    Ok(found)
}
