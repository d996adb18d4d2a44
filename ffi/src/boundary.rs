//! What every function does at its edge: catch panics, check pointers, sizes and processes, copy structs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::status::{E_ABI, E_ARG, E_FORKED, E_NULL, E_PANIC, E_POISONED, E_SHORT_BUFFER, Failure, OK, rrt_error};

/// Set by the first bug that reached the boundary, as a panic or as what a thread reports of its own: what the objects are like
/// then, nobody knows.
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
        Err(_) => Failure::new(E_PANIC, "internal error: a panic was caught at the C boundary"),
    };
    if failure.status == E_PANIC {
        POISONED.store(true, Ordering::SeqCst);
    }
    // SAFETY: the caller's promise.
    if let Some(err) = unsafe { err.as_mut() } {
        err.set(&failure);
    }
    failure.status
}

/// Frees something; of a panic on the way there is nobody to tell but the next call.
pub fn quietly(body: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        POISONED.store(true, Ordering::SeqCst);
    }
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

/// An array in an output struct, borrowed by the caller: NULL if it has no elements.
pub fn array<T>(list: &[T]) -> *const T {
    if list.is_empty() { std::ptr::null() } else { list.as_ptr() }
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

/// Fails for flags that are not known.
pub fn only(flags: u32, known: u32, what: &str) -> Outcome<()> {
    if flags & !known == 0 {
        return Ok(());
    }
    Err(Failure::new(E_ARG, format!("{what}: unknown flags {:#x}; {known:#x} are known here", flags & !known)))
}

/// Fails unless a reserved field is 0.
pub fn reserved(value: u32, what: &str) -> Outcome<()> {
    if value == 0 { Ok(()) } else { Err(Failure::new(E_ARG, format!("{what}: reserved is {value}, it must be 0"))) }
}

/// Pieces of `data`: piece i is data[offsets[i]] … data[offsets[i + 1] − 1].
///
/// # Safety
/// `offsets` points to `count` + 1 elements, and `data` reaches to the last of them.
pub unsafe fn pieces<'a, T: 'a>(
    data: *const T,
    offsets: *const usize,
    count: usize,
    what: &str,
) -> Outcome<impl Iterator<Item = &'a [T]>> {
    let beyond = count.checked_add(1).ok_or_else(|| Failure::new(E_ARG, format!("{what}: {count} of them")))?;
    // SAFETY: the caller's promise.
    let offsets: &'a [usize] = unsafe { elements(offsets, beyond, &format!("{what}: offsets")) }?;
    if let Some(i) = offsets.windows(2).position(|w| w[0] > w[1]) {
        let text = format!("{what}: offsets must not fall, but {} follows {}", offsets[i + 1], offsets[i]);
        return Err(Failure::new(E_ARG, text));
    }
    // SAFETY: the caller's promise.
    let data: &'a [T] = unsafe { elements(data, offsets[count], what) }?;
    Ok(offsets.windows(2).map(move |w| &data[w[0]..w[1]]))
}

/// A list of strings: one text and offsets into it, `most` strings at most.
///
/// # Safety
/// As [`pieces`].
pub unsafe fn strings(
    text: *const std::ffi::c_char,
    offsets: *const usize,
    count: usize,
    what: &str,
    most: usize,
) -> Outcome<Vec<String>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    if count > most {
        return Err(Failure::new(E_ARG, format!("{what}: {count} of them, at most {most} are allowed")));
    }
    // SAFETY: the caller's promise.
    let pieces = unsafe { pieces(text.cast::<u8>(), offsets, count, what) }?;
    let string = |(i, bytes): (usize, &[u8])| match std::str::from_utf8(bytes) {
        Ok(string) => Ok(string.to_owned()),
        Err(e) => Err(Failure::new(E_ARG, format!("{what}: string {i} is not UTF-8: {e}"))),
    };
    pieces.enumerate().map(string).collect()
}

/// A struct that begins with `struct_size: u32` and grows at its end.
///
/// # Safety
/// `repr(C)`, and of its fields any bytes are a value.
pub unsafe trait Sized32: Copy {
    const NAME: &'static str;
    /// Its size in ABI 1.0: what a caller has at least.
    const FIRST_SIZE: usize;

    /// What its INIT macro says: the defaults of what an older caller does not have.
    fn initial() -> Self;
}

/// Largest struct that anybody may bring.
const LARGEST: usize = 4096;

fn misfit<T: Sized32>(size: usize) -> Failure {
    let text = format!(
        "{}: struct_size is {size}; from {} (ABI 1.0) on, this library knows {}: set it through the INIT macro",
        T::NAME,
        T::FIRST_SIZE,
        size_of::<T>()
    );
    Failure::new(E_ABI, text)
}

/// Copies an input struct: what an older caller's lacks gets its default, what a newer one's has beyond must be zero.
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
    if !(T::FIRST_SIZE..=LARGEST).contains(&size) {
        return Err(misfit::<T>(size));
    }
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts(p.cast::<u8>(), size) };
    if bytes.iter().skip(known).any(|b| *b != 0) {
        return Err(Failure::new(
            E_ABI,
            format!("{}: fields beyond byte {known} are set, which this library does not know", T::NAME),
        ));
    }
    let mut value = T::initial();
    // SAFETY: at most as many bytes as either has, and any bytes are a value.
    unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), std::ptr::from_mut(&mut value).cast::<u8>(), size.min(known));
    }
    Ok(value)
}

/// The size that the caller set in an output struct.
///
/// # Safety
/// `p` is NULL or points to a struct whose first field is its size.
pub unsafe fn room<T: Sized32>(p: *const T) -> Outcome<usize> {
    if p.is_null() {
        return Err(null(T::NAME));
    }
    // SAFETY: the caller's promise.
    let size = unsafe { p.cast::<u32>().read_unaligned() } as usize;
    if (T::FIRST_SIZE..=LARGEST).contains(&size) { Ok(size) } else { Err(misfit::<T>(size)) }
}

/// Writes an output struct up to the size that the caller set.
///
/// # Safety
/// `p` is NULL or points to a struct whose first field is its size.
pub unsafe fn write<T: Sized32>(p: *mut T, value: &T) -> Outcome<()> {
    // SAFETY: the caller's promise.
    let count = unsafe { room(p.cast_const()) }?.min(size_of::<T>());
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
            return Err(Failure::new(
                E_POISONED,
                "an earlier call had RRT_E_PANIC; only waiting, taking, closing and freeing work now",
            ));
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A struct of ABI 1.0 that had two fields then and has three now.
    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Grown {
        struct_size: u32,
        first: u32,
        later: u64,
    }

    // SAFETY: repr(C), integers.
    unsafe impl Sized32 for Grown {
        const NAME: &'static str = "grown";
        const FIRST_SIZE: usize = 8;

        fn initial() -> Self {
            Grown { struct_size: 16, first: 1, later: 77 }
        }
    }

    fn given(words: &[u32]) -> Outcome<Grown> {
        // SAFETY: the words hold as many bytes as the first of them says, or it is out of range.
        unsafe { input(words.as_ptr().cast::<Grown>()) }
    }

    #[test]
    fn an_older_caller_gets_the_defaults_of_what_it_lacks() {
        assert_eq!(given(&[8, 5]).ok(), Some(Grown { struct_size: 8, first: 5, later: 77 }));
        assert_eq!(given(&[12, 5, 6]).ok().map(|g| g.later), Some(6));
        assert_eq!(given(&[16, 5, 6, 0]).ok().map(|g| g.later), Some(6));
    }

    #[test]
    fn a_newer_caller_may_not_ask_for_what_is_unknown() {
        assert_eq!(given(&[20, 5, 6, 0, 0]).ok().map(|g| g.later), Some(6));
        for wrong in [&[20, 5, 6, 0, 1][..], &[7, 5], &[0, 0], &[u32::MAX, 0], &[4097, 0]] {
            assert_eq!(given(wrong).err().map(|f| f.status), Some(E_ABI), "{wrong:?}");
        }
    }

    #[test]
    fn an_older_caller_gets_what_it_has_room_for() {
        let mut words = [8u32, 0, 9, 9];
        let value = Grown { struct_size: 16, first: 3, later: 4 };
        // SAFETY: eight bytes are there, and more.
        unsafe { write(words.as_mut_ptr().cast::<Grown>(), &value) }.ok().unwrap();
        assert_eq!(words, [8, 3, 9, 9]);
    }

    #[test]
    fn an_array_without_elements_is_null() {
        assert!(array::<u64>(&[]).is_null());
        let list = [3u64];
        assert_eq!(array(&list), list.as_ptr());
    }
}
