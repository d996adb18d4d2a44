//! rrt_abi_version, rrt_abi_check, rrt_version, rrt_status_name

use std::ffi::{CStr, c_char};

use crate::status::{self, E_ABI, OK};

const MAJOR: u32 = 0;
const MINOR: u32 = 2;

#[unsafe(no_mangle)]
pub extern "C" fn rrt_abi_version() -> u32 {
    MAJOR << 16 | MINOR
}

#[unsafe(no_mangle)]
pub extern "C" fn rrt_abi_check(header_abi: u32) -> i32 {
    let (major, minor) = (header_abi >> 16, header_abi & 0xffff);
    // Before 1.0 every minor may break.
    let serves = if MAJOR == 0 { minor == MINOR } else { minor <= MINOR };
    if major == MAJOR && serves { OK } else { E_ABI }
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
