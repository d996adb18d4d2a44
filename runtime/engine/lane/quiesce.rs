//! Bringing a lane to rest between two steps: before its weights change, before it pauses or sleeps.

use std::time::Instant;

use super::{Lane, LaneJob, Released, root};
use crate::engine::sequence::{Role, Sequence};
use crate::error::{Error, ErrorKind, Result};

/// What becomes of the sequences that are under way when weights change or work pauses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InFlight {
    /// They finish as they began; what has not begun waits.
    #[default]
    Wait,
    /// Every job that was submitted before ends, as if cancelled: sampling jobs with what they have.
    Cancel,
    /// They stop where they are, and go on later. If the weights have changed by then, what was sampled stays, its keys
    /// and values are computed again, and [`VersionSpan`](crate::VersionSpan)s say which weights sampled what; texts that
    /// are scored begin again.
    Keep,
}

/// Something to do with a lane once it is at rest, or an error if it does not come to rest in time.
pub(crate) struct Quiesce {
    pub in_flight: InFlight,
    pub deadline: Option<Instant>,
    pub then: Then,
}

/// What is done with a lane at rest.
type Then = Box<dyn FnOnce(Result<&mut Lane>) + Send>;

/// Why a lane takes no steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Holds {
    pub paused: bool,
    /// Its weights are being written.
    pub updating: bool,
    /// Its weights or its cache are not there.
    pub asleep: bool,
}

impl Holds {
    pub fn any(self) -> bool {
        self.paused || self.updating || self.asleep
    }
}

/// True if what a sequence has so far came from the weights at hand.
fn has_begun(sequence: &Sequence) -> bool {
    match &sequence.role {
        Role::Sample { sampler, .. } => !sampler.tokens.is_empty(),
        Role::Read { outputs, .. } => !outputs.is_empty(),
    }
}

impl Lane {
    /// Takes a wish for rest in; it is fulfilled at once if it can be.
    pub fn quiesce(&mut self, wish: Quiesce) -> Released {
        let mut released = Released::default();
        if wish.in_flight == InFlight::Cancel {
            self.jobs.values().for_each(|job| job.state.cancel());
            released += self.drop_stopped();
        }
        self.wishes.push_back(wish);
        self.settle();
        self.publish();
        released += std::mem::take(&mut self.freed);
        released
    }

    /// Fulfils the wishes for rest that can be, in their order, and refuses those that are late.
    pub(super) fn settle(&mut self) {
        // Who stands behind another one need not wait longer for that.
        let now = Instant::now();
        let late = |wish: &Quiesce| wish.deadline.is_some_and(|deadline| now >= deadline);
        let mut place = 1;
        while place < self.wishes.len() {
            let wish = &self.wishes[place];
            if wish.in_flight != InFlight::Keep && late(wish) {
                self.wishes.remove(place).into_iter().for_each(|wish| self.refuse_late(wish));
            } else {
                place += 1;
            }
        }
        while let Some(wish) = self.wishes.front() {
            let at_rest = wish.in_flight == InFlight::Keep || !self.is_under_way();
            let stuck = self.holds.any();
            if !at_rest && !late(wish) && !stuck {
                return;
            }
            let Some(wish) = self.wishes.pop_front() else { return };
            if at_rest {
                (wish.then)(Ok(self));
            } else if stuck {
                let text = "sequences are under way and the model is paused, asleep or being updated, so that they cannot finish: choose to keep or to cancel them";
                (wish.then)(Err(Error::new(ErrorKind::Busy, text)));
            } else {
                self.refuse_late(wish);
            }
        }
    }

    fn refuse_late(&self, wish: Quiesce) {
        let text = format!("{} sequences under way did not finish in time; nothing changed", self.running.len());
        (wish.then)(Err(Error::new(ErrorKind::Timeout, text)));
    }

    /// Answers everybody who waits for rest.
    pub fn refuse_wishes(&mut self, error: &Error) {
        for wish in std::mem::take(&mut self.wishes) {
            (wish.then)(Err(error.clone()));
        }
    }

    /// The weights are no longer those of their generation.
    pub fn spoil(&mut self) {
        self.generation += 1;
        self.restart();
    }

    /// True if a sequence has begun under the weights at hand and is not done.
    fn is_under_way(&self) -> bool {
        !self.running.is_empty() || self.jobs.values().any(|job| job.waiting.iter().any(has_begun))
    }

    /// Which of a job's waiting sequences may start: where rest is wished for, only those that have begun.
    pub(super) fn next_waiting(&self, job: &LaneJob) -> Option<usize> {
        if self.wishes.is_empty() {
            (!job.waiting.is_empty()).then_some(0)
        } else {
            job.waiting.iter().position(has_begun)
        }
    }

    /// True if there is nothing to compute at the moment.
    pub fn rests(&self) -> bool {
        self.holds.any() || self.jobs.is_empty()
    }

    /// True if time alone can change something: deadlines, cancellations.
    pub fn is_waited_for(&self) -> bool {
        !self.jobs.is_empty() || !self.wishes.is_empty()
    }

    /// What is to be done while no step is taken.
    pub fn tend(&mut self) -> Released {
        let mut released = self.drop_stopped();
        self.settle();
        released += std::mem::take(&mut self.freed);
        if released.jobs > 0 {
            self.free_adapters();
            self.publish();
        }
        released
    }

    /// Goes on under other weights. What the cache holds is no longer reachable.
    pub fn renew(&mut self, version: u64) {
        self.version = version;
        self.generation += 1;
        self.restart();
    }

    /// Has every sequence compute its keys and values anew.
    pub fn restart(&mut self) {
        let mut running = std::mem::take(&mut self.running);
        running.sort_by_key(|s| std::cmp::Reverse(s.seniority));
        for sequence in running {
            if let Some(job) = self.jobs.get_mut(&sequence.job_number) {
                job.running -= 1;
                job.waiting.push_front(sequence);
            }
        }
        self.kv.clear();
        for sequence in self.jobs.values_mut().flat_map(|job| &mut job.waiting) {
            sequence.path = self.kv.path(root(self.generation, sequence.adapter.as_ref()));
            // A score of two versions would be nobody's.
            if let Role::Read { outputs, .. } = &mut sequence.role {
                outputs.clear();
            }
        }
    }

    /// Which weights these are: rises with every change, whatever their versions are called.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Refuses jobs from now on, those that wait included, or no longer.
    pub fn set_invalid(&mut self, error: Option<Error>) {
        if let Some(error) = &error {
            let released = self.fail_all(error);
            self.freed += released;
        }
        self.broken = error;
    }
}
