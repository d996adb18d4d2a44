//! rrt_list_devices, rrt_open, rrt_close, rrt_runtime_state, rrt_runtime_device, and what models, jobs and results share of a
//! runtime.

use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use runtime::{DeviceType, Runtime, RuntimeOptions, RuntimeState};

use crate::boundary::{
    Outcome, Owner, Sized32, enter, fill, input, null, only, output, reference, reserved, room, text, write,
};
use crate::job::Jobs;
use crate::status::{E_ABI, E_ARG, E_BUSY, E_SHORT_BUFFER, Failure, TIMEOUT, rrt_error};
use crate::structs::{rrt_device_info, rrt_open_opts};

/// RRT_STATE_POISONED
const POISONED: i32 = 3;

/// What models, adapters and the other children of a runtime share with it.
pub struct Shared {
    pub owner: Owner,
    /// Those alive.
    pub children: AtomicUsize,
    pub jobs: Jobs,
}

/// Counts a model, an adapter, a session, an update, a follower or a result for as long as it lives.
pub struct Child(pub Arc<Shared>);

impl Child {
    pub fn of(shared: &Arc<Shared>) -> Self {
        shared.children.fetch_add(1, Ordering::SeqCst);
        Child(shared.clone())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.0.children.fetch_sub(1, Ordering::SeqCst);
    }
}

#[allow(non_camel_case_types)]
pub struct rrt_runtime {
    pub runtime: Runtime,
    pub shared: Arc<Shared>,
}

/// # Safety
/// `p` is NULL or a live runtime.
pub unsafe fn open_runtime<'a>(p: *const rrt_runtime) -> Outcome<&'a rrt_runtime> {
    // SAFETY: the caller's promise.
    let runtime = unsafe { reference(p, "runtime") }?;
    runtime.shared.owner.check_process()?;
    Ok(runtime)
}

/// A number of the caller's, of which 0 means the default.
pub fn size(value: u64, what: &str) -> Outcome<Option<usize>> {
    match usize::try_from(value) {
        Ok(0) => Ok(None),
        Ok(n) => Ok(Some(n)),
        Err(_) => Err(Failure::new(E_ARG, format!("{what} is {value}, which does not fit this machine"))),
    }
}

fn put(text: &str, out: &mut [c_char]) {
    let mut end = text.len().min(out.len() - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    for (to, from) in out.iter_mut().zip(&text.as_bytes()[..end]) {
        *to = *from as c_char;
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_list_devices(
    out: *mut rrt_device_info,
    capacity: usize,
    stride: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(need, "need")?;
        if capacity > 0 && out.is_null() {
            return Err(null("out"));
        }
        let (cpu, gpus) = runtime::devices()?;
        let mut list = Vec::new();
        let mut info = rrt_device_info::initial();
        put(&format!("cpu, {} threads", cpu.threads), &mut info.name);
        put(cpu.isa, &mut info.driver);
        list.push(info);
        for gpu in gpus {
            let mut info = rrt_device_info::initial();
            info.r#type = match gpu.device_type {
                DeviceType::Discrete => 1,
                DeviceType::Integrated => 2,
                DeviceType::Virtual => 3,
                DeviceType::Software => 4,
                DeviceType::Other => 5,
            };
            info.max_binding_bytes = gpu.max_binding;
            info.has_f16 = gpu.has_f16.into();
            info.has_subgroups = gpu.has_subgroups.into();
            put(&gpu.name, &mut info.name);
            put(&gpu.driver, &mut info.driver);
            list.push(info);
        }
        if capacity > 0 && stride < rrt_device_info::FIRST_SIZE {
            let least = rrt_device_info::FIRST_SIZE;
            return Err(Failure::new(
                E_ABI,
                format!("stride is {stride}, an rrt_device_info has at least {least} bytes"),
            ));
        }
        for i in 0..list.len().min(capacity) {
            // SAFETY: the caller's array of `capacity` structs, `stride` bytes apart, of which this is one.
            let room = unsafe { room(out.byte_add(i * stride).cast_const()) }
                .map_err(|e| Failure::new(e.status, format!("element {i}: {}", e.text)))?;
            if room > stride {
                return Err(Failure::new(
                    E_ABI,
                    format!("element {i}: struct_size is {room}, stride is only {stride}"),
                ));
            }
        }
        // SAFETY: not NULL.
        unsafe { need.write(list.len()) };
        if list.len() > capacity {
            return Err(Failure::new(
                E_SHORT_BUFFER,
                format!("the buffer holds {capacity}, {} are needed", list.len()),
            ));
        }
        for (i, info) in list.iter().enumerate() {
            // SAFETY: as above.
            unsafe { write(out.byte_add(i * stride), info) }?;
        }
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_open(opts: *const rrt_open_opts, out: *mut *mut rrt_runtime, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on structs.
        let opts = unsafe { input(opts) }?;
        output(out, "out")?;
        Owner::current().check()?;
        only(opts.flags, 0, "rrt_open_opts")?;
        reserved(opts.reserved, "rrt_open_opts")?;
        let mut options = RuntimeOptions::default();
        if !opts.device.is_null() {
            // SAFETY: the header's condition on strings.
            options.device = unsafe { text(opts.device, opts.device_len, "device") }?.to_owned();
        }
        options.threads = (opts.threads > 0).then_some(opts.threads as usize);
        options.max_jobs = size(opts.max_jobs, "max_jobs")?.unwrap_or(options.max_jobs);
        options.max_queued_tokens =
            size(opts.max_queued_tokens, "max_queued_tokens")?.unwrap_or(options.max_queued_tokens);
        if !opts.shader_cache.is_null() {
            // SAFETY: the header's condition on strings.
            let folder = unsafe { text(opts.shader_cache, opts.shader_cache_len, "shader_cache") }?;
            options.gpu.shader_cache = Some(PathBuf::from(folder));
        }
        let (children, jobs) = (AtomicUsize::new(0), Jobs::default());
        let shared = Arc::new(Shared { owner: Owner::current(), children, jobs });
        let runtime = rrt_runtime { runtime: Runtime::open(&options)?, shared };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(runtime))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_close(runtime: *mut rrt_runtime, timeout_ns: u64, err: *mut rrt_error) -> i32 {
    let body = || {
        if runtime.is_null() {
            return Ok(());
        }
        {
            // SAFETY: a live runtime.
            let handle = unsafe { reference(runtime.cast_const(), "runtime") }?;
            handle.shared.owner.check_process()?;
            let children = handle.shared.children.load(Ordering::SeqCst);
            if children > 0 {
                return Err(Failure::new(
                    E_BUSY,
                    format!(
                        "{children} models, adapters, sessions, updates, followers or results are still alive; free them first"
                    ),
                ));
            }
            let jobs = handle.shared.jobs.all();
            jobs.iter().for_each(|job| job.watch.cancel());
            let start = Instant::now();
            for job in &jobs {
                let left = Duration::from_nanos(timeout_ns).saturating_sub(start.elapsed());
                if !job.watch.wait_timeout(left) {
                    return Err(Failure::new(TIMEOUT, "jobs did not end in time; the runtime is still open"));
                }
            }
        }
        // SAFETY: made by rrt_open, and the header forbids further use.
        drop(unsafe { Box::from_raw(runtime) });
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_runtime_state(runtime: *const rrt_runtime, state: *mut i32, err: *mut rrt_error) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        output(state, "state")?;
        let number = match runtime.runtime.state() {
            _ if Owner::current().check().is_err() => POISONED,
            RuntimeState::Running => 0,
            RuntimeState::Paused => 1,
            RuntimeState::Lost => 2,
            RuntimeState::Poisoned => POISONED,
        };
        // SAFETY: not NULL.
        unsafe { state.write(number) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_runtime_device(
    runtime: *const rrt_runtime,
    out: *mut c_char,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let runtime = unsafe { open_runtime(runtime) }?;
        // SAFETY: the header's condition on buffers.
        unsafe { fill(runtime.runtime.device_name().as_bytes(), out.cast::<u8>(), capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
