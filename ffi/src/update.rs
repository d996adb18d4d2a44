//! rrt_pause, rrt_resume, rrt_model_sleep, rrt_model_wake, rrt_model_tensor, rrt_update_*, rrt_adapter_update_begin

use std::path::Path;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use runtime::weights::{Dtype, TensorData};
use runtime::{AdapterUpdate, AdapterUpdateOptions, InFlight, Require, Storage, Tags, Update, UpdateOptions};

use crate::adapter::{live_adapter, rrt_adapter};
use crate::boundary::{Outcome, Sized32, elements, enter, input, output, quietly, reference, text, write};
use crate::model::{live_model, rrt_model};
use crate::runtime::{Child, open_runtime, rrt_runtime};
use crate::status::{E_ARG, E_BUSY, E_CONFLICT, E_PANIC, E_RANGE, E_UNSUPPORTED, Failure, rrt_error};
use crate::structs::{MAX_RANK, rrt_tensor_desc, rrt_tensor_info, rrt_update_opts};

const EXPECT_VERSION: u32 = 1;
const CHECK_FINITE: u32 = 2;
const CONVERT: u32 = 4;
const SLEEP_WEIGHTS: u32 = 1;
const SLEEP_KV_CACHE: u32 = 2;

#[allow(non_camel_case_types)]
pub struct rrt_update {
    /// `None` once it was aborted.
    update: Mutex<Option<Target>>,
    child: Child,
}

/// What an update is of.
enum Target {
    Model(Update),
    Adapter(AdapterUpdate),
}

impl Target {
    fn put(&mut self, data: &TensorData) -> Outcome<()> {
        match self {
            Target::Model(update) => update.put(data)?,
            Target::Adapter(update) => update.put(data)?,
        }
        Ok(())
    }

    fn put_slice(&mut self, data: &TensorData, start: &[usize]) -> Outcome<()> {
        match self {
            Target::Model(update) => update.put_slice(data, start)?,
            Target::Adapter(update) => update.put_slice(data, start)?,
        }
        Ok(())
    }

    fn put_files(&mut self, path: &Path) -> Outcome<()> {
        match self {
            Target::Model(update) => update.put_files(path)?,
            Target::Adapter(update) => update.put_files(path)?,
        }
        Ok(())
    }

    fn put_delta(&mut self, path: &Path) -> Outcome<u64> {
        match self {
            Target::Model(update) => Ok(update.put_delta(path)?),
            Target::Adapter(_) => {
                Err(Failure::new(E_UNSUPPORTED, "deltas are of a model's weights, not of an adapter's"))
            }
        }
    }

    fn commit(&mut self, version: u64) -> Outcome<()> {
        match self {
            Target::Model(update) => update.commit(version)?,
            Target::Adapter(update) => update.commit(version)?,
        }
        Ok(())
    }

    fn has_ended(&self) -> bool {
        match self {
            Target::Model(update) => update.has_ended(),
            Target::Adapter(update) => update.has_ended(),
        }
    }
}

fn in_flight(value: i32) -> Outcome<InFlight> {
    match value {
        0 => Ok(InFlight::Wait),
        1 => Ok(InFlight::Cancel),
        2 => Ok(InFlight::Keep),
        other => Err(Failure::new(E_ARG, format!("in_flight is {other}, it must be 0, 1 or 2"))),
    }
}

fn timeout(ns: u64) -> Option<Duration> {
    (ns != u64::MAX).then(|| Duration::from_nanos(ns))
}

fn dtype(value: i32) -> Outcome<Dtype> {
    match value {
        0 => Ok(Dtype::F32),
        1 => Ok(Dtype::F16),
        2 => Ok(Dtype::BF16),
        other => Err(Failure::new(E_ARG, format!("dtype is {other}, it must be 0, 1 or 2"))),
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_pause(
    runtime: *mut rrt_runtime,
    in_flight_rule: i32,
    timeout_ns: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        Ok(runtime.runtime.pause(in_flight(in_flight_rule)?, timeout(timeout_ns))?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_resume(runtime: *mut rrt_runtime, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        Ok(runtime.runtime.resume()?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

fn tags(flags: u32) -> Outcome<Tags> {
    if flags & !(SLEEP_WEIGHTS | SLEEP_KV_CACHE) != 0 || flags == 0 {
        return Err(Failure::new(E_ARG, format!("tags is {flags:#x}, it must be 1, 2 or 3")));
    }
    Ok(Tags { weights: flags & SLEEP_WEIGHTS != 0, kv_cache: flags & SLEEP_KV_CACHE != 0 })
}

pub fn tags_number(tags: Tags) -> u32 {
    u32::from(tags.weights) * SLEEP_WEIGHTS + u32::from(tags.kv_cache) * SLEEP_KV_CACHE
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_sleep(
    model: *mut rrt_model,
    flags: u32,
    in_flight_rule: i32,
    timeout_ns: u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = unsafe { live_model(model) }?;
        Ok(model.model.sleep(tags(flags)?, in_flight(in_flight_rule)?, timeout(timeout_ns))?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_wake(model: *mut rrt_model, flags: u32, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = unsafe { live_model(model) }?;
        Ok(model.model.wake(tags(flags)?)?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_model_tensor(
    model: *const rrt_model,
    index: usize,
    out: *mut rrt_tensor_info,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let model = unsafe { live_model(model) }?;
        let tensors = model.tensors();
        let Some((name, dtype, shape)) = tensors.get(index) else {
            return Err(Failure::new(E_RANGE, format!("index is {index}, the model has {} tensors", tensors.len())));
        };
        let mut info = rrt_tensor_info {
            dtype: match dtype {
                Dtype::F32 => 0,
                Dtype::F16 => 1,
                Dtype::BF16 => 2,
            },
            // Models have matrices and vectors.
            rank: shape.len() as u32,
            name: name.as_ptr().cast(),
            name_len: name.len(),
            ..rrt_tensor_info::initial()
        };
        info.shape.iter_mut().zip(shape).for_each(|(to, n)| *to = *n as u64);
        // SAFETY: the header's condition on structs.
        unsafe { write(out, &info) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

pub fn update_options(opts: &rrt_update_opts) -> Outcome<UpdateOptions> {
    if opts.flags & !(EXPECT_VERSION | CHECK_FINITE | CONVERT) != 0 || opts.reserved != 0 {
        let text = format!("rrt_update_opts: flags are {:#x}, of which 7 are known; reserved must be 0", opts.flags);
        return Err(Failure::new(E_ARG, text));
    }
    Ok(UpdateOptions {
        expect_version: (opts.flags & EXPECT_VERSION != 0).then_some(opts.expect_version),
        storage: match opts.storage {
            0 => Storage::Shadow,
            1 => Storage::InPlace,
            other => return Err(Failure::new(E_ARG, format!("storage is {other}, it must be 0 or 1"))),
        },
        in_flight: in_flight(opts.in_flight)?,
        require: match opts.require {
            0 => Require::All,
            1 => Require::Subset,
            other => return Err(Failure::new(E_ARG, format!("require is {other}, it must be 0 or 1"))),
        },
        check_finite: opts.flags & CHECK_FINITE != 0,
        convert: opts.flags & CONVERT != 0,
        timeout: timeout(opts.timeout_ns),
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_begin(
    model: *mut rrt_model,
    opts: *const rrt_update_opts,
    out: *mut *mut rrt_update,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (model, opts) = unsafe { (live_model(model)?, input(opts)?) };
        output(out, "out")?;
        let options = update_options(&opts)?;
        let target = Target::Model(model.model.update(&options)?);
        // SAFETY: not NULL.
        unsafe { hand_out(target, Child::of(&model.child.0), out) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

/// # Safety
/// `out` can be written.
unsafe fn hand_out(target: Target, child: Child, out: *mut *mut rrt_update) {
    let handle = rrt_update { update: Mutex::new(Some(target)), child };
    // SAFETY: the caller's promise.
    unsafe { out.write(Box::into_raw(Box::new(handle))) };
}

/// Of an adapter's update, what may be chosen.
fn adapter_options(opts: &rrt_update_opts) -> Outcome<AdapterUpdateOptions> {
    let UpdateOptions { expect_version, storage, in_flight, require, .. } = update_options(opts)?;
    if storage != Storage::Shadow || in_flight != InFlight::Wait {
        let text = format!(
            "storage is {} and in_flight {}; an adapter's new values are put beside the old ones, with which sequences under way end: both must be 0",
            opts.storage, opts.in_flight
        );
        return Err(Failure::new(E_UNSUPPORTED, text));
    }
    Ok(AdapterUpdateOptions { expect_version, require })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_adapter_update_begin(
    adapter: *mut rrt_adapter,
    opts: *const rrt_update_opts,
    out: *mut *mut rrt_update,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (adapter, opts) = unsafe { (live_adapter(adapter)?, input(opts)?) };
        output(out, "out")?;
        let target = Target::Adapter(adapter.adapter.update(&adapter_options(&opts)?)?);
        // SAFETY: not NULL.
        unsafe { hand_out(target, Child::of(&adapter.child.0), out) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

/// One thread at a time may use an update.
///
/// # Safety
/// `p` is NULL or a live update.
unsafe fn live_update<'a>(p: *mut rrt_update) -> Outcome<MutexGuard<'a, Option<Target>>> {
    // SAFETY: the caller's promise.
    let handle = unsafe { reference(p.cast_const(), "update") }?;
    handle.child.0.owner.check()?;
    match handle.update.try_lock() {
        Ok(guard) => Ok(guard),
        Err(TryLockError::WouldBlock) => Err(Failure::new(E_BUSY, "another thread uses the update")),
        Err(TryLockError::Poisoned(_)) => Err(Failure::new(E_PANIC, "an earlier call on the update panicked")),
    }
}

/// Does something with an update that was not aborted.
///
/// # Safety
/// As [`live_update`].
unsafe fn with_update<T>(p: *mut rrt_update, act: impl FnOnce(&mut Target) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the caller's promise.
    let mut guard = unsafe { live_update(p) }?;
    act(guard.as_mut().ok_or_else(|| Failure::new(E_CONFLICT, "the update was aborted"))?)
}

/// Reads a descriptor and hands the tensor on.
///
/// # Safety
/// The header's condition on rrt_tensor_desc.
unsafe fn tensor<T>(desc: *const rrt_tensor_desc, act: impl FnOnce(&TensorData) -> Outcome<T>) -> Outcome<T> {
    // SAFETY: the header's condition on structs.
    let desc = unsafe { input(desc) }?;
    if desc.flags != 0 || desc.reserved != 0 {
        return Err(Failure::new(E_ARG, "rrt_tensor_desc: flags and reserved must be 0"));
    }
    if desc.rank > MAX_RANK {
        return Err(Failure::new(E_ARG, format!("rank is {}, at most {MAX_RANK} is allowed", desc.rank)));
    }
    // SAFETY: the header's conditions on strings and arrays.
    let (name, shape, bytes) = unsafe {
        (
            text(desc.name, desc.name_len, "name")?,
            indices(desc.shape, desc.rank, "shape")?,
            elements(desc.data.cast::<u8>(), desc.bytes, "data")?,
        )
    };
    let checksum = if desc.checksum.is_null() {
        None
    } else {
        // SAFETY: the caller's promise: 16 bytes.
        let sum = unsafe { elements(desc.checksum, 16, "checksum") }?;
        <[u8; 16]>::try_from(sum).ok().map(u128::from_be_bytes)
    };
    act(&TensorData { name, dtype: dtype(desc.dtype)?, shape: &shape, bytes, checksum })
}

/// # Safety
/// `p` points to `count` elements.
unsafe fn indices(p: *const u64, count: usize, what: &str) -> Outcome<Vec<usize>> {
    // SAFETY: the caller's promise.
    let values = unsafe { elements(p, count, what) }?;
    let fits = |v: &u64| usize::try_from(*v);
    let all: Result<Vec<usize>, _> = values.iter().map(fits).collect();
    all.map_err(|_| Failure::new(E_ARG, format!("{what}: {values:?} does not fit this machine")))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_tensor(
    update: *mut rrt_update,
    desc: *const rrt_tensor_desc,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        unsafe { with_update(update, |update| tensor(desc, |data| update.put(data))) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_slice(
    update: *mut rrt_update,
    desc: *const rrt_tensor_desc,
    start: *const u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        let put = |update: &mut Target, data: &TensorData| {
            // SAFETY: the header's condition: an index for each dimension.
            let start = unsafe { indices(start, data.shape.len(), "start") }?;
            update.put_slice(data, &start)
        };
        // SAFETY: the header's conditions on handles and structs.
        unsafe { with_update(update, |update| tensor(desc, |data| put(update, data))) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_file(
    update: *mut rrt_update,
    path: *const std::ffi::c_char,
    path_len: usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on strings.
        let path = unsafe { text(path, path_len, "path") }?;
        // SAFETY: the header's condition on handles.
        unsafe { with_update(update, |update| update.put_files(Path::new(path))) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_delta(
    update: *mut rrt_update,
    path: *const std::ffi::c_char,
    path_len: usize,
    version: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(version, "version")?;
        // SAFETY: the header's condition on strings.
        let path = unsafe { text(path, path_len, "path") }?;
        // SAFETY: the header's condition on handles.
        let leads_to = unsafe { with_update(update, |update| update.put_delta(Path::new(path))) }?;
        // SAFETY: not NULL.
        unsafe { version.write(leads_to) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_commit(update: *mut rrt_update, new_version: u64, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        unsafe { with_update(update, |update| update.commit(new_version)) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_abort(update: *mut rrt_update, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let mut guard = unsafe { live_update(update) }?;
        match guard.take_if(|update| !update.has_ended()) {
            Some(Target::Model(update)) => update.abort(),
            Some(Target::Adapter(update)) => update.abort(),
            None => return Err(Failure::new(E_CONFLICT, "the update has ended")),
        }
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_update_free(update: *mut rrt_update) {
    if !update.is_null() {
        quietly(|| {
            // SAFETY: made by rrt_update_begin or rrt_adapter_update_begin, freed once.
            let update = unsafe { Box::from_raw(update) };
            // A child process has no engine that could answer: what it inherited is left alone.
            if update.child.0.owner.check_process().is_err() {
                std::mem::forget(update);
            }
        });
    }
}
