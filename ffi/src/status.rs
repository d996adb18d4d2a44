//! Status numbers, append-only, and the error struct.

use std::ffi::{CStr, c_char};

use runtime::{Error, ErrorKind};

macro_rules! statuses {
    ($($name:ident = $value:literal;)*) => {
        $(
            #[allow(dead_code)] // Some numbers are reserved, or given by the engine's kinds only.
            pub const $name: i32 = $value;
        )*

        /// Name of a status; "RRT_?" for a number that is none.
        pub fn name(status: i32) -> &'static CStr {
            match status {
                $($value => {
                    const NAME: &str = concat!("RRT_", stringify!($name), "\0");
                    CStr::from_bytes_with_nul(NAME.as_bytes()).unwrap_or_default()
                })*
                _ => c"RRT_?",
            }
        }
    };
}

statuses! {
    OK = 0; PENDING = 1; TIMEOUT = 2;
    E_ARG = -1; E_NULL = -2; E_ABI = -3; E_SHORT_BUFFER = -4; E_RANGE = -5; E_NOT_FOUND = -6; E_BUSY = -7; E_FULL = -8;
    E_CANCELLED = -9; E_CONFLICT = -10; E_DUPLICATE = -11;
    E_IO = -20; E_FORMAT = -21; E_UNSUPPORTED = -22; E_SHAPE = -23; E_LIMIT = -24; E_TEMPLATE = -25;
    E_NO_DEVICE = -40; E_OOM_DEVICE = -41; E_OOM_HOST = -42; E_DEVICE_LOST = -43; E_GPU = -44; E_NONFINITE = -45;
    E_PANIC = -60; E_POISONED = -61; E_FORKED = -62;
}

/// What a call ends with when it is not `OK`.
pub struct Failure {
    pub status: i32,
    pub text: String,
}

impl Failure {
    pub fn new(status: i32, text: impl Into<String>) -> Self {
        Failure { status, text: text.into() }
    }
}

/// The status of a kind of error.
pub fn of_kind(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::Argument => E_ARG,
        ErrorKind::Io => E_IO,
        ErrorKind::Format => E_FORMAT,
        ErrorKind::Unsupported => E_UNSUPPORTED,
        ErrorKind::Shape => E_SHAPE,
        ErrorKind::Limit => E_LIMIT,
        ErrorKind::Template => E_TEMPLATE,
        ErrorKind::Full => E_FULL,
        ErrorKind::Cancelled => E_CANCELLED,
        ErrorKind::NotFound => E_NOT_FOUND,
        ErrorKind::Busy => E_BUSY,
        ErrorKind::Conflict => E_CONFLICT,
        ErrorKind::Duplicate => E_DUPLICATE,
        ErrorKind::Timeout => TIMEOUT,
        ErrorKind::NoDevice => E_NO_DEVICE,
        ErrorKind::DeviceMemory => E_OOM_DEVICE,
        ErrorKind::HostMemory => E_OOM_HOST,
        ErrorKind::DeviceLost => E_DEVICE_LOST,
        ErrorKind::Gpu => E_GPU,
        ErrorKind::NonFinite => E_NONFINITE,
        ErrorKind::Poisoned => E_POISONED,
        _ => E_PANIC,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(of_kind(error.kind()), error.to_string())
    }
}

const TEXT: usize = 504;

#[repr(C)]
pub struct rrt_error {
    pub code: i32,
    pub len: u32,
    pub text: [c_char; TEXT],
}

impl rrt_error {
    pub fn set(&mut self, failure: &Failure) {
        let mut end = failure.text.len().min(TEXT - 1);
        while !failure.text.is_char_boundary(end) {
            end -= 1;
        }
        self.code = failure.status;
        // At most 503.
        self.len = end as u32;
        self.text = [0; TEXT];
        for (to, from) in self.text.iter_mut().zip(&failure.text.as_bytes()[..end]) {
            *to = *from as c_char;
        }
    }
}
