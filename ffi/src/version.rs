//! rrt_abi_version, rrt_abi_check, rrt_version, rrt_status_name, rrt_get_limits

use std::ffi::{CStr, c_char};

use runtime::{MAX_SEQUENCES, MAX_THREADS, RequestLimits};

use crate::boundary::{Sized32, enter, write};
use crate::status::{self, E_ABI, OK, rrt_error};
use crate::structs::{MAX_RANK, rrt_limits};
use crate::tokenizer::MAX_MESSAGES;

const MAJOR: u32 = 1;
const MINOR: u32 = 0;

#[unsafe(no_mangle)]
pub extern "C" fn rrt_abi_version() -> u32 {
    MAJOR << 16 | MINOR
}

#[unsafe(no_mangle)]
pub extern "C" fn rrt_abi_check(header_abi: u32) -> i32 {
    // The same major, and no minor that is newer than the library's.
    let served = MAJOR << 16..=rrt_abi_version();
    if served.contains(&header_abi) { OK } else { E_ABI }
}

#[unsafe(no_mangle)]
pub extern "C" fn rrt_version() -> *const c_char {
    const VERSION: &str = concat!("rewardrt ", env!("CARGO_PKG_VERSION"), "\0");
    CStr::from_bytes_with_nul(VERSION.as_bytes()).unwrap_or_default().as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn rrt_status_name(status: i32) -> *const c_char {
    status::name(status).as_ptr()
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_get_limits(out: *mut rrt_limits, err: *mut rrt_error) -> i32 {
    let body = || {
        let limits = RequestLimits::get();
        // All of them are small.
        let value = rrt_limits {
            max_sequences: MAX_SEQUENCES as u64,
            max_tokens: limits.tokens as u64,
            max_alternatives: limits.alternatives as u64,
            max_stops: limits.stops as u32,
            max_biases: limits.biases as u32,
            max_top_logprobs: limits.top_logprobs as u32,
            max_kept_ids: limits.kept_ids as u32,
            max_speculate: limits.speculate as u32,
            max_rank: MAX_RANK as u32,
            max_guide_bytes: limits.guide_bytes as u64,
            max_messages: MAX_MESSAGES as u64,
            max_threads: MAX_THREADS as u64,
            ..rrt_limits::initial()
        };
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &value) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
