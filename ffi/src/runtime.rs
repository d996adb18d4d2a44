//! rrt_list_devices, rrt_open, rrt_close, and what models, jobs and results share of a runtime.

use std::collections::HashMap;
use std::ffi::c_char;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use runtime::{DeviceType, Runtime, RuntimeOptions};

use crate::boundary::{Outcome, Owner, enter, input, null, output, reference, text, write};
use crate::job::Pending;
use crate::status::{E_ARG, E_BUSY, E_SHORT_BUFFER, Failure, TIMEOUT, rrt_error};
use crate::structs::{rrt_device_info, rrt_open_opts};

/// What outlives the runtime's handle as long as models, adapters, updates and results do.
pub struct Shared {
    pub owner: Owner,
    /// Models, adapters, updates and results alive.
    pub children: AtomicUsize,
}

/// Counts a model, an adapter, an update or a result for as long as it lives.
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
    jobs: Mutex<HashMap<u64, Pending>>,
}

impl rrt_runtime {
    pub fn jobs(&self) -> MutexGuard<'_, HashMap<u64, Pending>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// # Safety
/// `p` is NULL or a live runtime.
pub unsafe fn open_runtime<'a>(p: *const rrt_runtime) -> Outcome<&'a rrt_runtime> {
    // SAFETY: the caller's promise.
    let runtime = unsafe { reference(p, "runtime") }?;
    runtime.shared.owner.check_process()?;
    Ok(runtime)
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
        // SAFETY: not NULL.
        unsafe { need.write(list.len()) };
        if list.len() > capacity {
            return Err(Failure::new(
                E_SHORT_BUFFER,
                format!("the buffer holds {capacity}, {} are needed", list.len()),
            ));
        }
        for (i, info) in list.iter().enumerate() {
            let offset = i.checked_mul(stride).filter(|_| stride >= 8);
            let offset = offset.ok_or_else(|| Failure::new(E_ARG, format!("stride is {stride}")))?;
            // SAFETY: the caller's array of `capacity` structs, `stride` bytes apart.
            unsafe { write(out.byte_add(offset), info) }?;
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
        if opts.flags != 0 || opts.reserved != 0 {
            return Err(Failure::new(E_ARG, "rrt_open_opts: flags and reserved must be 0"));
        }
        let mut options = RuntimeOptions::default();
        if !opts.device.is_null() {
            // SAFETY: the header's condition on strings.
            options.device = unsafe { text(opts.device, opts.device_len, "device") }?.to_owned();
        }
        options.threads = (opts.threads > 0).then_some(opts.threads as usize);
        let shared = Arc::new(Shared { owner: Owner::current(), children: AtomicUsize::new(0) });
        let runtime = rrt_runtime { runtime: Runtime::open(&options)?, shared, jobs: Mutex::default() };
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
                    format!("{children} models, adapters, updates or results are still alive; free them first"),
                ));
            }
            let jobs: Vec<_> = handle.jobs().values().map(Pending::watch).collect();
            jobs.iter().for_each(runtime::JobWatch::cancel);
            let start = Instant::now();
            for job in &jobs {
                let left = Duration::from_nanos(timeout_ns).saturating_sub(start.elapsed());
                if !job.wait_timeout(left) {
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
