//! rrt_tokenizer_load, rrt_tokenizer_free, rrt_encode, rrt_decode, rrt_chat_encode, rrt_chat_render

use std::ffi::c_char;
use std::path::Path;

use runtime::{EncodeOptions, Message, Tokenizer};

use crate::boundary::{Outcome, elements, enter, fill, null, only, output, quietly, reference, text};
use crate::status::{E_ABI, E_ARG, E_NOT_FOUND, E_TEMPLATE, Failure, rrt_error};
use crate::structs::rrt_message;

const ADD_SPECIAL: u32 = 1;
const PARSE_SPECIAL: u32 = 2;
const SKIP_SPECIAL: u32 = 4;
const ADD_GENERATION_PROMPT: u32 = 8;
pub const MAX_MESSAGES: usize = 1 << 16;

#[allow(non_camel_case_types)]
pub struct rrt_tokenizer {
    tokenizer: Tokenizer,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_tokenizer_load(
    path: *const c_char,
    path_len: usize,
    out: *mut *mut rrt_tokenizer,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        output(out, "out")?;
        if path.is_null() {
            return Err(null("path"));
        }
        // SAFETY: the header's condition on strings.
        let path = unsafe { text(path, path_len, "path") }?;
        let tokenizer = Tokenizer::from_folder(Path::new(path))?
            .ok_or_else(|| Failure::new(E_NOT_FOUND, format!("{path}: there is no tokenizer.json")))?;
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(rrt_tokenizer { tokenizer }))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_tokenizer_free(tokenizer: *mut rrt_tokenizer) {
    if !tokenizer.is_null() {
        // SAFETY: made by rrt_tokenizer_load, freed once.
        quietly(|| drop(unsafe { Box::from_raw(tokenizer) }));
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_encode(
    tokenizer: *const rrt_tokenizer,
    string: *const c_char,
    len: usize,
    flags: u32,
    ids: *mut u32,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let tokenizer = &unsafe { reference(tokenizer, "tokenizer") }?.tokenizer;
        // SAFETY: the header's condition on strings.
        let string = unsafe { text(string, len, "text") }?;
        only(flags, ADD_SPECIAL | PARSE_SPECIAL, "rrt_encode")?;
        let options =
            EncodeOptions { add_special: flags & ADD_SPECIAL != 0, parse_special: flags & PARSE_SPECIAL != 0 };
        // SAFETY: the header's condition on buffers.
        unsafe { fill(&tokenizer.encode(string, options)?, ids, capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_decode(
    tokenizer: *const rrt_tokenizer,
    ids: *const u32,
    count: usize,
    flags: u32,
    out: *mut c_char,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let tokenizer = &unsafe { reference(tokenizer, "tokenizer") }?.tokenizer;
        // SAFETY: the header's condition on arrays.
        let ids = unsafe { elements(ids, count, "ids") }?;
        only(flags, SKIP_SPECIAL, "rrt_decode")?;
        let string = tokenizer.decode(ids, flags & SKIP_SPECIAL != 0)?;
        // SAFETY: the header's condition on buffers.
        unsafe { fill(string.as_bytes(), out.cast::<u8>(), capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

/// Messages of the caller's, `stride` bytes apart.
///
/// # Safety
/// `messages` points to `count` of them.
pub unsafe fn conversation(messages: *const rrt_message, count: usize, stride: usize) -> Outcome<Vec<Message>> {
    if messages.is_null() {
        return Err(null("messages"));
    }
    if count > MAX_MESSAGES {
        return Err(Failure::new(E_ARG, format!("{count} messages, at most {MAX_MESSAGES} are allowed")));
    }
    if stride < size_of::<rrt_message>() {
        let text = format!("stride is {stride}, an rrt_message has {} bytes", size_of::<rrt_message>());
        return Err(Failure::new(E_ABI, text));
    }
    let mut list = Vec::with_capacity(count);
    for i in 0..count {
        // SAFETY: the caller's promise.
        let m = unsafe { messages.byte_add(i * stride).read_unaligned() };
        // SAFETY: the header's condition on strings.
        let (role, content) =
            unsafe { (text(m.role, m.role_len, "role")?, text(m.content, m.content_len, "content")?) };
        list.push(Message { role: role.to_owned(), content: content.to_owned() });
    }
    Ok(list)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_chat_encode(
    tokenizer: *const rrt_tokenizer,
    messages: *const rrt_message,
    count: usize,
    stride: usize,
    flags: u32,
    ids: *mut u32,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let tokenizer = &unsafe { reference(tokenizer, "tokenizer") }?.tokenizer;
        only(flags, ADD_GENERATION_PROMPT, "rrt_chat_encode")?;
        // SAFETY: the header's condition on arrays.
        let messages = unsafe { conversation(messages, count, stride) }?;
        let encoded = tokenizer.encode_chat(&messages, flags & ADD_GENERATION_PROMPT != 0)?;
        // SAFETY: the header's condition on buffers.
        unsafe { fill(&encoded, ids, capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_chat_render(
    tokenizer: *const rrt_tokenizer,
    messages: *const rrt_message,
    count: usize,
    stride: usize,
    flags: u32,
    out: *mut c_char,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let tokenizer = &unsafe { reference(tokenizer, "tokenizer") }?.tokenizer;
        only(flags, ADD_GENERATION_PROMPT, "rrt_chat_render")?;
        // SAFETY: the header's condition on arrays.
        let messages = unsafe { conversation(messages, count, stride) }?;
        let template =
            tokenizer.chat_template().ok_or_else(|| Failure::new(E_TEMPLATE, "the tokenizer has no chat template"))?;
        let rendered = template.render(&messages, flags & ADD_GENERATION_PROMPT != 0)?;
        // SAFETY: the header's condition on buffers.
        unsafe { fill(rendered.as_bytes(), out.cast::<u8>(), capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}
