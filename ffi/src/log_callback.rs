//! rrt_set_log

use std::ffi::{c_char, c_void};
use std::sync::{Once, PoisonError, RwLock};

use log::{LevelFilter, Log, Metadata, Record};

use crate::boundary::enter;
use crate::status::{E_ARG, Failure, rrt_error};

type Callback = extern "C" fn(*mut c_void, i32, *const c_char, usize);

struct Target {
    callback: Callback,
    user_data: *mut c_void,
}

// SAFETY: the header demands a callback that any thread may call.
unsafe impl Send for Target {}
// SAFETY: as above.
unsafe impl Sync for Target {}

/// Held for reading while a callback runs, so that clearing it waits for running ones.
static TARGET: RwLock<Option<Target>> = RwLock::new(None);

struct Forward;

impl Log for Forward {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        // Only what this library says: wgpu has much to tell.
        if !record.target().starts_with("rewardrt") {
            return;
        }
        let target = TARGET.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(target) = &*target {
            let text = record.args().to_string();
            (target.callback)(target.user_data, record.level() as i32, text.as_ptr().cast(), text.len());
        }
    }

    fn flush(&self) {}
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_set_log(
    callback: Option<Callback>,
    user_data: *mut c_void,
    max_level: i32,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        let level = match max_level {
            0 => LevelFilter::Off,
            1 => LevelFilter::Error,
            2 => LevelFilter::Warn,
            3 => LevelFilter::Info,
            4 => LevelFilter::Debug,
            5 => LevelFilter::Trace,
            other => return Err(Failure::new(E_ARG, format!("max_level is {other}, it must be from 0 to 5"))),
        };
        static INSTALL: Once = Once::new();
        // If the host has a logger of its own in this library (a static Rust host), that one stays.
        INSTALL.call_once(|| {
            let _ = log::set_logger(&Forward);
        });
        log::set_max_level(if callback.is_some() { level } else { LevelFilter::Off });
        let target = callback.map(|callback| Target { callback, user_data });
        *TARGET.write().unwrap_or_else(PoisonError::into_inner) = target;
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
