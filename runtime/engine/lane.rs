//! One model's sequences: who waits, who runs, and what goes into the next step.

use std::collections::VecDeque;
use std::sync::Arc;

use super::angles::Angles;
use super::job::JobState;
use super::kv::KvBlocks;
use super::sequence::{Finish, Finished, NewSequence, Purpose, Sequence};
use crate::backend::{Capacity, Executor, OutputRow, Step};
use crate::error::{Error, ErrorKind};
use crate::kernels::{KV_BLOCK, RowMeta};
use crate::model::Rope;

pub(super) struct Lane {
    executor: Box<dyn Executor>,
    angles: Angles,
    max_rows: usize,
    kv: KvBlocks,
    waiting: VecDeque<Sequence>,
    running: Vec<Sequence>,
    /// After a lost device every further step would fail the same way.
    broken: Option<Error>,
}

/// A step being packed, and where its outputs go.
#[derive(Default)]
struct Packed {
    rows: Vec<RowMeta>,
    tables: Vec<u32>,
    cos_sin: Vec<f32>,
    outputs: Vec<OutputRow>,
    /// For each output: index into `running`, position.
    owners: Vec<(usize, usize)>,
}

impl Lane {
    pub(super) fn new(executor: Box<dyn Executor>, rope: Rope, capacity: Capacity) -> Self {
        Lane {
            executor,
            angles: Angles::new(rope),
            max_rows: capacity.max_rows,
            kv: KvBlocks::new(capacity.kv_blocks),
            waiting: VecDeque::new(),
            running: Vec::new(),
            broken: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Takes sequences in, or fails their job if the device is gone; returns the queued tokens that are done with.
    pub(super) fn enqueue(&mut self, job: &Arc<JobState>, sequences: Vec<NewSequence>) -> usize {
        if let Some(error) = &self.broken {
            job.fail(error.clone());
            return sequences.iter().map(NewSequence::positions).sum();
        }
        for (i, new) in sequences.into_iter().enumerate() {
            // A text of one token has no log-prob to read.
            if matches!(&new.purpose, Purpose::Read(wants) if wants.is_empty()) {
                job.finish(i, Finished::Read(Vec::new()));
            } else {
                self.waiting.push_back(Sequence::new(job.clone(), i, new));
            }
        }
        0
    }

    /// Runs one step if there is work. Returns the queued tokens that are done with.
    pub(super) fn advance(&mut self) -> usize {
        let mut released = self.drop_stopped();
        self.admit();
        let packed = self.pack();
        if packed.rows.is_empty() {
            return released;
        }
        let step =
            Step { rows: &packed.rows, tables: &packed.tables, cos_sin: &packed.cos_sin, outputs: &packed.outputs };
        log::trace!(
            "step: {} rows, {} outputs, {} running",
            packed.rows.len(),
            packed.outputs.len(),
            self.running.len()
        );
        match self.executor.step(&step) {
            Ok(outputs) if outputs.len() == packed.owners.len() => {
                for ((owner, position), output) in packed.owners.into_iter().zip(outputs) {
                    let sequence = &mut self.running[owner];
                    match sequence.accept(position, output) {
                        Ok(Some(finished)) => {
                            sequence.job.finish(sequence.index, finished);
                            released += sequence.queued_tokens();
                            self.kv.give_back(std::mem::take(&mut sequence.blocks));
                        }
                        Ok(None) => {}
                        Err(error) => sequence.job.fail(error),
                    }
                }
                // A running sequence holds blocks until it is finished.
                self.running.retain(|s| !s.blocks.is_empty());
            }
            Ok(_) => released += self.fail_all(&Error::internal("the executor returned another number of outputs")),
            Err(error) => {
                if error.kind() == ErrorKind::DeviceLost {
                    self.broken = Some(error.clone());
                }
                released += self.fail_all(&error);
            }
        }
        released
    }

    /// Ends every job with `error`.
    pub(super) fn fail_all(&mut self, error: &Error) -> usize {
        let mut released = 0;
        for mut sequence in self.running.drain(..).chain(self.waiting.drain(..)) {
            sequence.job.fail(error.clone());
            released += sequence.queued_tokens();
            self.kv.give_back(std::mem::take(&mut sequence.blocks));
        }
        released
    }

    /// Lets go of sequences whose job was cancelled or has failed.
    fn drop_stopped(&mut self) -> usize {
        let mut released = 0;
        let mut stopped = |sequence: &mut Sequence| {
            let (cancelled, failed) = (sequence.job.is_cancelled(), sequence.job.has_failed());
            if !cancelled && !failed {
                return false;
            }
            released += sequence.queued_tokens();
            if cancelled && !failed && sequence.is_sampling() {
                let partial = sequence.finish_sampling(Finish::Cancelled);
                sequence.job.finish(sequence.index, partial);
            } else {
                sequence.job.fail(Error::new(ErrorKind::Cancelled, "the job was cancelled"));
            }
            true
        };
        let mut freed = Vec::new();
        self.running.retain_mut(|s| {
            let stop = stopped(s);
            if stop {
                freed.append(&mut s.blocks);
            }
            !stop
        });
        self.waiting.retain_mut(|s| !stopped(s));
        self.kv.give_back(freed);
        released
    }

    /// Starts waiting sequences, in order, while there are blocks and rows for them.
    fn admit(&mut self) {
        while self.running.len() < self.max_rows
            && let Some(first) = self.waiting.front()
            && let Some(blocks) = self.kv.take(first.most_positions())
        {
            if let Some(mut sequence) = self.waiting.pop_front() {
                sequence.start(blocks);
                self.running.push(sequence);
            }
        }
    }

    /// Fills a step: first a row for each sequence that needs just one, then chunks of the others, oldest first.
    fn pack(&mut self) -> Packed {
        let mut packed = Packed::default();
        let left = |s: &Sequence| s.needed() - s.computed;
        for single in [true, false] {
            for i in 0..self.running.len() {
                let room = self.max_rows - packed.rows.len();
                let count = left(&self.running[i]);
                if count > 0 && (count == 1) == single && room > 0 {
                    self.pack_rows(i, count.min(room), &mut packed);
                }
            }
        }
        packed
    }

    fn pack_rows(&mut self, owner: usize, count: usize, packed: &mut Packed) {
        let sequence = &mut self.running[owner];
        let table = packed.tables.len();
        packed.tables.extend_from_slice(&sequence.blocks);
        for position in sequence.computed..sequence.computed + count {
            if let Some(want) = sequence.want_at(position) {
                packed.outputs.push(OutputRow { row: packed.rows.len() as u32, want });
                packed.owners.push((owner, position));
            }
            let block = sequence.blocks[position / KV_BLOCK] as usize;
            // Rows, positions and slots are below 2^32: rows by max_rows, slots by the KV cache's size check.
            packed.rows.push(RowMeta {
                token: sequence.tokens[position],
                position: position as u32,
                slot: (block * KV_BLOCK + position % KV_BLOCK) as u32,
                table: table as u32,
            });
            self.angles.push(position, sequence.forward_len_at(position), &mut packed.cos_sin);
        }
        sequence.computed += count;
    }
}
