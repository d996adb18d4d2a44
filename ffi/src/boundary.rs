//! What every function does at its edge: catch panics, check pointers, sizes and processes, copy structs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::status::{E_ABI, E_ARG, E_FORKED, E_NULL, E_PANIC, E_POISONED, E_SHORT_BUFFER, Failure, OK, rrt_error};

/// Set by the first panic that reached the boundary: what the objects are like then, nobody knows.
static POISONED: AtomicBool = AtomicBool::new(false);

pub type Outcome<T> = Result<T, Failure>;

/// Runs the body of an `extern "C"` function: failures go to `err`, panics become `RRT_E_PANIC`.
///
/// # Safety
/// `err` is NULL or points to an rrt_error of the caller's.
pub unsafe fn enter(err: *mut rrt_error, body: impl FnOnce() -> Outcome<()>) -> i32 {
    // This library's own copy of std: a caught panic goes to the log instead of stderr.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| std::panic::set_hook(Box::new(|info| log::error!(target: "rewardrt", "{info}"))));
    let failure = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => return OK,
        Ok(Err(failure)) => failure,
        Err(_) => {
            POISONED.store(true, Ordering::SeqCst);
            Failure::new(E_PANIC, "internal error: a panic was caught at the C boundary")
        }
    };
    // SAFETY: the caller's promise.
    if let Some(err) = unsafe { err.as_mut() } {
        err.set(&failure);
    }
    failure.status
}

/// Frees something; a panic on the way is swallowed, there is nobody to tell.
pub fn quietly(body: impl FnOnce()) {
    let _ = catch_unwind(AssertUnwindSafe(body));
}

pub fn null(what: &str) -> Failure {
    Failure::new(E_NULL, format!("{what} is NULL"))
}

/// # Safety
/// `p` is NULL or a live handle or struct.
pub unsafe fn reference<'a, T>(p: *const T, what: &str) -> Outcome<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { p.as_ref() }.ok_or_else(|| null(what))
}

/// Checks an output pointer before any work is done for it.
pub fn output<T>(p: *mut T, what: &str) -> Outcome<*mut T> {
    if p.is_null() { Err(null(what)) } else { Ok(p) }
}

/// Elements that a caller passes as pointer and count; NULL only with count 0.
///
/// # Safety
/// `p` points to `count` elements.
pub unsafe fn elements<'a, T>(p: *const T, count: usize, what: &str) -> Outcome<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if p.is_null() {
        return Err(null(what));
    }
    if count > isize::MAX as usize / size_of::<T>().max(1) {
        return Err(Failure::new(E_ARG, format!("{what}: {count} elements do not fit in memory")));
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(p, count) })
}

/// # Safety
/// `p` points to `len` bytes.
pub unsafe fn text<'a>(p: *const std::ffi::c_char, len: usize, what: &str) -> Outcome<&'a str> {
    // SAFETY: the caller's promise.
    let bytes = unsafe { elements(p.cast::<u8>(), len, what) }?;
    std::str::from_utf8(bytes).map_err(|e| Failure::new(E_ARG, format!("{what} is not UTF-8: {e}")))
}

/// A struct that begins with `struct_size: u32` and of which all-zero bytes are a value.
///
/// # Safety
/// `repr(C)`, and as described.
pub unsafe trait Sized32: Copy {
    const NAME: &'static str;
}

/// Copies an input struct: smaller than this version's is refused, what is beyond must be zero.
///
/// # Safety
/// `p` is NULL or points to at least 4 bytes, and to as many as those say.
pub unsafe fn input<T: Sized32>(p: *const T) -> Outcome<T> {
    if p.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: the caller's promise: every struct begins with its size.
    let size = unsafe { p.cast::<u32>().read_unaligned() } as usize;
    let known = size_of::<T>();
    if size < known || size > 4096 {
        return Err(Failure::new(E_ABI, format!("{}: struct_size is {size}, this library knows {known}", T::NAME)));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(p.cast::<u8>(), size) };
    if bytes[known..].iter().any(|b| *b != 0) {
        return Err(Failure::new(
            E_ABI,
            format!("{}: fields beyond byte {known} are set, which this library does not know", T::NAME),
        ));
    }
    // SAFETY: `known` readable bytes of a Copy struct.
    Ok(unsafe { p.read_unaligned() })
}

/// Writes an output struct up to the size that the caller set.
///
/// # Safety
/// `p` is NULL or points to a struct whose first field is its size.
pub unsafe fn write<T: Sized32>(p: *mut T, value: &T) -> Outcome<()> {
    if p.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { p.cast::<u32>().read_unaligned() } as usize;
    if !(8..=4096).contains(&size) {
        return Err(Failure::new(
            E_ABI,
            format!("{}: struct_size is {size}, this library knows {}", T::NAME, size_of::<T>()),
        ));
    }
    let count = size.min(size_of::<T>());
    let from = std::ptr::from_ref(value).cast::<u8>();
    // SAFETY: `count` bytes on both sides; the caller's struct_size stays.
    unsafe { std::ptr::copy_nonoverlapping(from.add(4), p.cast::<u8>().add(4), count - 4) };
    Ok(())
}

/// Writes elements to (buffer, capacity, *need).
///
/// # Safety
/// `buffer` points to `capacity` elements or is NULL with capacity 0; `need` is NULL or writable.
pub unsafe fn fill<T: Copy>(values: &[T], buffer: *mut T, capacity: usize, need: *mut usize) -> Outcome<()> {
    if need.is_null() {
        return Err(null("need"));
    }
    if buffer.is_null() && capacity > 0 {
        return Err(null("the output buffer"));
    }
    // SAFETY: not NULL.
    unsafe { need.write(values.len()) };
    if values.len() > capacity {
        return Err(Failure::new(E_SHORT_BUFFER, format!("the buffer holds {capacity}, {} are needed", values.len())));
    }
    if !values.is_empty() {
        // SAFETY: at most `capacity` elements.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), buffer, values.len()) };
    }
    Ok(())
}

/// The process a handle belongs to.
#[derive(Clone, Copy)]
pub struct Owner(u32);

impl Owner {
    pub fn current() -> Self {
        Owner(std::process::id())
    }

    /// Fails in another process than the handle's, and after a panic.
    pub fn check(self) -> Outcome<()> {
        self.check_process()?;
        if POISONED.load(Ordering::SeqCst) {
            return Err(Failure::new(E_POISONED, "an earlier call panicked; only close and free work now"));
        }
        Ok(())
    }

    pub fn check_process(self) -> Outcome<()> {
        if self.0 == std::process::id() {
            return Ok(());
        }
        Err(Failure::new(E_FORKED, "the handle was made before fork(): open a runtime in the child"))
    }
}
