//! rrt_adapter_load, rrt_adapter_replace, rrt_adapter_merge, rrt_adapter_unmerge, rrt_adapter_free

use std::ffi::c_char;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, TryLockError};

use runtime::{Adapter, AdapterOptions, MergedAdapter};

use crate::boundary::{Outcome, enter, input, output, quietly, reference, text};
use crate::model::{live_model, rrt_model};
use crate::runtime::Child;
use crate::status::{E_ARG, E_BUSY, E_CONFLICT, Failure, rrt_error};
use crate::structs::{rrt_adapter_opts, rrt_update_opts};
use crate::update::update_options;

const NO_MMAP: u32 = 1;

#[allow(non_camel_case_types)]
pub struct rrt_adapter {
    pub adapter: Adapter,
    /// While it is merged.
    merged: Mutex<Option<MergedAdapter>>,
    pub child: Child,
}

/// The adapter of a request; NULL is none.
///
/// # Safety
/// `p` is NULL or a live adapter.
pub unsafe fn chosen(p: *const rrt_adapter) -> Outcome<Option<Adapter>> {
    if p.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    Ok(Some(unsafe { live_adapter(p) }?.adapter.clone()))
}

/// # Safety
/// `p` is NULL or a live adapter.
pub unsafe fn live_adapter<'a>(p: *const rrt_adapter) -> Outcome<&'a rrt_adapter> {
    // SAFETY: the caller's promise.
    let adapter = unsafe { reference(p, "adapter") }?;
    adapter.child.0.owner.check()?;
    Ok(adapter)
}

/// One thread at a time may merge an adapter.
fn merging(adapter: &rrt_adapter) -> Outcome<MutexGuard<'_, Option<MergedAdapter>>> {
    match adapter.merged.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => {
            Err(Failure::new(E_BUSY, "another thread merges the adapter, or takes it out again"))
        }
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_load(
    model: *mut rrt_model,
    opts: *const rrt_adapter_opts,
    out: *mut *mut rrt_adapter,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (model, opts) = unsafe { (live_model(model)?, input(opts)?) };
        output(out, "out")?;
        if opts.flags & !NO_MMAP != 0 {
            return Err(Failure::new(E_ARG, format!("rrt_adapter_opts: unknown flags {:#x}", opts.flags)));
        }
        // SAFETY: the header's condition on strings.
        let (path, config) =
            unsafe { (text(opts.path, opts.path_len, "path")?, text(opts.config, opts.config_len, "config")?) };
        let mut options = AdapterOptions { version: opts.version, ..AdapterOptions::default() };
        options.load.use_mmap = opts.flags & NO_MMAP == 0;
        let adapter = match (path, config) {
            ("", "") => return Err(Failure::new(E_ARG, "rrt_adapter_opts: neither path nor config is given")),
            (path, "") => model.model.load_adapter(Path::new(path), &options)?,
            ("", config) => model.model.adapter_from_config(config, &options)?,
            _ => return Err(Failure::new(E_ARG, "rrt_adapter_opts: path and config are both given, one is wanted")),
        };
        let handle = rrt_adapter { adapter, merged: Mutex::default(), child: Child::of(&model.child.0) };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_replace(
    adapter: *mut rrt_adapter,
    path: *const c_char,
    path_len: usize,
    version: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and strings.
        let (adapter, path) = unsafe { (live_adapter(adapter)?, text(path, path_len, "path")?) };
        Ok(adapter.adapter.replace(Path::new(path), version)?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_merge(
    adapter: *mut rrt_adapter,
    opts: *const rrt_update_opts,
    new_version: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (adapter, opts) = unsafe { (live_adapter(adapter)?, input(opts)?) };
        let mut merged = merging(adapter)?;
        // Weights that came later have taken it out.
        if merged.as_ref().is_some_and(MergedAdapter::is_current) {
            return Err(Failure::new(E_CONFLICT, "the adapter is merged already"));
        }
        *merged = Some(adapter.adapter.merge(new_version, &update_options(&opts)?)?);
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_unmerge(
    adapter: *mut rrt_adapter,
    opts: *const rrt_update_opts,
    new_version: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (adapter, opts) = unsafe { (live_adapter(adapter)?, input(opts)?) };
        let mut merged = merging(adapter)?;
        let there = merged.as_ref().ok_or_else(|| Failure::new(E_CONFLICT, "the adapter is not merged"))?;
        there.unmerge(new_version, &update_options(&opts)?)?;
        *merged = None;
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_free(adapter: *mut rrt_adapter) {
    if !adapter.is_null() {
        // SAFETY: made by rrt_adapter_load, freed once.
        quietly(|| drop(unsafe { Box::from_raw(adapter) }));
    }
}
