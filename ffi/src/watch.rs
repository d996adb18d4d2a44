//! What can be seen and done of any job from outside.

use std::time::Duration;

use runtime::{Ending, JobWatch, RolloutWatch, Streamed};

/// A job's watch, whatever kind of job it is.
#[derive(Clone)]
pub enum Watch {
    Job(JobWatch),
    Rollout(RolloutWatch),
}

impl Watch {
    pub fn is_done(&self) -> bool {
        self.wait_timeout(Duration::ZERO)
    }

    pub fn wait_timeout(&self, timeout: Duration) -> bool {
        match self {
            Watch::Job(watch) => watch.wait_timeout(timeout),
            Watch::Rollout(watch) => watch.wait_timeout(timeout),
        }
    }

    pub fn cancel(&self) {
        match self {
            Watch::Job(watch) => watch.cancel(),
            Watch::Rollout(watch) => watch.cancel(),
        }
    }

    /// Sequences that have ended, and sequences in all.
    pub fn progress(&self) -> (usize, usize) {
        match self {
            Watch::Job(watch) => watch.progress(),
            Watch::Rollout(watch) => watch.progress(),
        }
    }

    pub fn ending(&self) -> Option<Ending> {
        match self {
            Watch::Job(watch) => watch.ending(),
            Watch::Rollout(watch) => watch.ending(),
        }
    }

    pub fn on_change(&self, observer: impl Fn() + Send + Sync + 'static) {
        match self {
            Watch::Job(watch) => watch.on_change(observer),
            Watch::Rollout(watch) => watch.on_change(observer),
        }
    }

    /// What has been sampled meanwhile; rollouts do not stream.
    pub fn next_chunk(&self) -> Streamed {
        match self {
            Watch::Job(watch) => watch.next_chunk(Duration::ZERO),
            Watch::Rollout(_) => Streamed::Done,
        }
    }
}
