//! The C ABI of rewardrt. `include/rewardrt.h` is the manual; this crate is one file per object of it.
//!
//! Every `extern "C"` function goes through [`boundary::enter`] (or has nothing that can panic): no panic crosses.
#![allow(missing_docs)] // The header documents what these items are.

#[cfg(panic = "abort")]
compile_error!("rewardrt-ffi turns panics into RRT_E_PANIC, which needs panic = \"unwind\"");

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the sizes that structs had in ABI 1.0 are known for 64-bit systems");

mod adapter;
mod boundary;
mod events;
mod follow;
mod job;
mod log_callback;
mod model;
mod numbers;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod poison;
mod poll;
mod request;
mod result;
mod rollout;
mod runtime;
mod session;
mod status;
mod stream;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod stress;
mod structs;
mod tokenizer;
mod update;
mod version;
mod watch;
