//! Where the time of steps goes, and what a kernel's work costs by count.
//!
//! The counts are what any executor must do: each weight is read once a call, activations once in and once out, each key
//! and value once for all rows of its sequence. A kernel that reads more has a lower share of the device's limits.

use std::time::Duration;

use super::{Step, Want};
use crate::kernels::RowMeta;
use crate::model::{Buf, MatrixId, ModelSpec, Op};

/// What one kernel has cost since profiling began.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct KernelTime {
    /// The kernel's name: `linear`, `attention`, …; `head` is the pass over the vocabulary (or the score head).
    pub name: String,
    /// How often it ran.
    pub calls: u64,
    /// All of its runs together.
    pub seconds: f64,
    /// Bytes that it must move: weights, activations read and written, keys and values.
    pub bytes: u64,
    /// Floating-point operations, two a multiply-add.
    pub flops: u64,
}

/// What a device does at best, measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Reading memory that no cache holds.
    pub bytes_per_second: f64,
    /// Products of a size that the caches hold, with the arithmetic and the weights of the model's own.
    pub flops: f64,
}

/// What a call must move and compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    pub bytes: u64,
    pub flops: u64,
}

/// The kernels' times, in the order in which they first ran.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    pub on: bool,
    kernels: Vec<KernelTime>,
}

impl Profile {
    pub fn add(&mut self, name: &str, time: Duration, cost: Cost) {
        let place = self.kernels.iter().position(|k| k.name == name).unwrap_or_else(|| {
            self.kernels.push(KernelTime { name: name.to_owned(), ..KernelTime::default() });
            self.kernels.len() - 1
        });
        let kernel = &mut self.kernels[place];
        kernel.calls += 1;
        kernel.seconds += time.as_secs_f64();
        kernel.bytes += cost.bytes;
        kernel.flops += cost.flops;
    }

    /// What was added since the last time.
    pub fn take(&mut self) -> Vec<KernelTime> {
        std::mem::take(&mut self.kernels)
    }
}

/// The name under which a call is profiled where the backend runs it as one kernel.
pub(crate) fn kernel_name(op: &Op) -> &'static str {
    match op {
        Op::Embed { .. } => "embed",
        Op::Linear { .. } | Op::LinearAdd { .. } | Op::LinearGated { .. } => "linear",
        Op::Rope { .. } => "rope",
        Op::KvWrite { .. } => "kv_write",
        Op::Attention { .. } => "attention",
        Op::GatherRows { .. } => "gather_rows",
        Op::RmsNorm { .. } => "rms_norm",
    }
}

/// A step as the counts see it. `weight_bytes` and `shape` speak of a matrix as the backend holds it.
pub(crate) struct Costs<'a> {
    pub spec: &'a ModelSpec,
    pub step: &'a Step<'a>,
    pub weight_bytes: &'a dyn Fn(MatrixId) -> u64,
    /// [N, K].
    pub shape: &'a dyn Fn(MatrixId) -> [usize; 2],
}

impl Costs<'_> {
    /// T rows of a buffer (M for the last two), in bytes.
    fn rows(&self, buf: Buf) -> u64 {
        let rows = match buf {
            Buf::Picked | Buf::Final => self.step.outputs.len(),
            _ => self.step.rows.len(),
        };
        4 * (rows * buf.width(self.spec)) as u64
    }

    fn elements(&self, id: MatrixId) -> u64 {
        let [n, k] = (self.shape)(id);
        n as u64 * k as u64
    }

    fn product(&self, id: MatrixId) -> Cost {
        Cost { bytes: (self.weight_bytes)(id), flops: 2 * self.step.rows.len() as u64 * self.elements(id) }
    }

    /// What a call of the plan costs. A norm or a gate within it is not counted: its inputs are there already.
    pub fn of(&self, op: &Op) -> Cost {
        let moved = |bytes: u64| Cost { bytes, flops: 0 };
        let sum = |costs: &mut dyn Iterator<Item = Cost>| {
            costs.fold(Cost::default(), |a, b| Cost { bytes: a.bytes + b.bytes, flops: a.flops + b.flops })
        };
        match op {
            Op::Embed { table, out } => {
                let [n, _] = (self.shape)(*table);
                let row = (self.weight_bytes)(*table) / n.max(1) as u64;
                moved(row * self.step.rows.len() as u64 + self.rows(*out))
            }
            Op::Linear { x, parts, .. } => {
                let activations = moved(self.rows(*x) + parts.iter().map(|(_, out)| self.rows(*out)).sum::<u64>());
                sum(&mut parts.iter().map(|(p, _)| self.product(p.weight)).chain([activations]))
            }
            Op::LinearAdd { x, part, to } => {
                let activations = moved(self.rows(*x) + 2 * self.rows(*to));
                sum(&mut [self.product(part.weight), activations].into_iter())
            }
            Op::LinearGated { x, gate, up, out, .. } => {
                let activations = moved(self.rows(*x) + self.rows(*out));
                sum(&mut [self.product(gate.weight), self.product(up.weight), activations].into_iter())
            }
            Op::Rope { heads, .. } => {
                let rotated = (self.step.rows.len() * heads * self.spec.head_dim) as u64;
                let angles = 4 * self.step.cos_sin.len() as u64;
                Cost { bytes: 8 * rotated + angles, flops: 3 * rotated }
            }
            Op::KvWrite { .. } => moved(2 * (self.rows(Buf::K) + self.rows(Buf::V))),
            Op::Attention { .. } => self.attention(),
            Op::GatherRows { out, .. } => moved(2 * self.rows(*out)),
            Op::RmsNorm { x, out, .. } => {
                // Four operations an element, which has four bytes.
                Cost { bytes: self.rows(*x) + self.rows(*out), flops: self.rows(*x) }
            }
        }
    }

    fn attention(&self) -> Cost {
        let spec = self.spec;
        let seen = |row: &RowMeta| {
            let keys = u64::from(row.position) + 1;
            spec.sliding_window.map_or(keys, |w| keys.min(w as u64))
        };
        // Rows of a sequence stand together: its last one's last key is the last that is read, its first one's first
        // key the first.
        let mut keys_read = 0;
        for rows in self.step.rows.chunk_by(|a, b| a.table == b.table) {
            if let [first, .., last] | [first @ last] = rows {
                let begin = u64::from(first.position) + 1 - seen(first);
                keys_read += u64::from(last.position) + 1 - begin;
            }
        }
        let pairs: u64 = self.step.rows.iter().map(seen).sum();
        Cost {
            bytes: 8 * keys_read * spec.kv_width() as u64 + self.rows(Buf::Q) + self.rows(Buf::Attn),
            flops: 4 * pairs * spec.q_width() as u64,
        }
    }

    /// The pass over the vocabulary or the score head. Logits of rows that sample are written and read once.
    pub fn head(&self, head: MatrixId) -> Cost {
        let [n, k] = (self.shape)(head);
        let (mut cost, mut whole) = (Cost { bytes: self.rows(Buf::Final), flops: 0 }, false);
        let row_bytes = (self.weight_bytes)(head) / n.max(1) as u64;
        for output in self.step.outputs {
            let columns = match &output.want {
                Want::Tokens(tokens) => {
                    cost.bytes += tokens.len() as u64 * row_bytes;
                    tokens.len()
                }
                Want::Sample(_) => {
                    cost.bytes += 8 * n as u64;
                    n
                }
                _ => n,
            };
            whole |= !matches!(output.want, Want::Tokens(_));
            cost.flops += 2 * columns as u64 * k as u64;
        }
        if whole {
            cost.bytes += (self.weight_bytes)(head);
        }
        cost
    }
}
