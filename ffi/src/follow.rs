//! rrt_follow, rrt_follower_wait, rrt_follower_state, rrt_follower_free

use std::ffi::c_char;
use std::path::Path;
use std::time::Duration;

use runtime::{FollowOptions, Follower, UpdateOptions};

use crate::boundary::{Outcome, enter, input, only, output, quietly, reference, text};
use crate::model::{live_model, rrt_model};
use crate::runtime::Child;
use crate::status::rrt_error;
use crate::structs::rrt_follow_opts;
use crate::update::update_options;

#[allow(non_camel_case_types)]
pub struct rrt_follower {
    follower: Follower,
    child: Child,
}

/// # Safety
/// `p` is NULL or a live follower.
unsafe fn live_follower<'a>(p: *const rrt_follower) -> Outcome<&'a Follower> {
    // SAFETY: the caller's promise.
    let follower = unsafe { reference(p, "follower") }?;
    follower.child.0.owner.check_process()?;
    Ok(&follower.follower)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_follow(
    model: *mut rrt_model,
    path: *const c_char,
    path_len: usize,
    opts: *const rrt_follow_opts,
    out: *mut *mut rrt_follower,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles, structs and strings.
        let (model, opts, path) = unsafe { (live_model(model)?, input(opts)?, text(path, path_len, "path")?) };
        output(out, "out")?;
        only(opts.flags, 0, "rrt_follow_opts")?;
        let update = if opts.update.is_null() {
            UpdateOptions::default()
        } else {
            // SAFETY: the header's condition on structs.
            update_options(&unsafe { input(opts.update) }?)?
        };
        let interval = match opts.interval_ns {
            0 => FollowOptions::default().interval,
            ns => Duration::from_nanos(ns),
        };
        let options = FollowOptions { interval, update };
        let follower = model.model.follow(Path::new(path), &options)?;
        let handle = rrt_follower { follower, child: Child::of(&model.child.0) };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_follower_wait(
    follower: *mut rrt_follower,
    version: u64,
    timeout_ns: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let follower = unsafe { live_follower(follower) }?;
        let timeout = if timeout_ns == u64::MAX { Duration::MAX } else { Duration::from_nanos(timeout_ns) };
        Ok(follower.wait_for(version, timeout)?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_follower_state(
    follower: *const rrt_follower,
    updates: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let follower = unsafe { live_follower(follower) }?;
        output(updates, "updates")?;
        // SAFETY: not NULL.
        unsafe { updates.write(follower.updates()) };
        follower.last_error().map_or(Ok(()), |error| Err(error.into()))
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_follower_free(follower: *mut rrt_follower) {
    if !follower.is_null() {
        quietly(|| {
            // SAFETY: made by rrt_follow, freed once.
            let follower = unsafe { Box::from_raw(follower) };
            // A child process has no thread that could be joined: what it inherited is left alone.
            if follower.child.0.owner.check_process().is_err() {
                std::mem::forget(follower);
            }
        });
    }
}
