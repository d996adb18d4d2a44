//! rrt_session_new, rrt_session_append, rrt_session_sample, rrt_session_tokens, rrt_session_fork, rrt_session_free

use runtime::Session;

use crate::boundary::{Outcome, elements, enter, fill, input, output, quietly, reference};
use crate::job::queue_samples;
use crate::model::{live_model, rrt_model};
use crate::request::{bad, sample_request};
use crate::runtime::Child;
use crate::status::{E_ARG, Failure, rrt_error};
use crate::structs::rrt_sample_req;

#[allow(non_camel_case_types)]
pub struct rrt_session {
    session: Session,
    child: Child,
}

/// # Safety
/// `p` is NULL or a live session.
unsafe fn live_session<'a>(p: *const rrt_session) -> Outcome<&'a rrt_session> {
    // SAFETY: the caller's promise.
    let session = unsafe { reference(p, "session") }?;
    session.child.0.owner.check()?;
    Ok(session)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_new(
    model: *mut rrt_model,
    ids: *const u32,
    count: usize,
    out: *mut *mut rrt_session,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and arrays.
        let (model, ids) = unsafe { (live_model(model)?, elements(ids, count, "ids")?) };
        output(out, "out")?;
        let handle = rrt_session { session: model.model.session(ids)?, child: Child::of(&model.child.0) };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_append(
    session: *mut rrt_session,
    ids: *const u32,
    count: usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and arrays.
        let (session, ids) = unsafe { (live_session(session)?, elements(ids, count, "ids")?) };
        Ok(session.session.append(ids)?)
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_sample(
    session: *mut rrt_session,
    req: *const rrt_sample_req,
    job: *mut u64,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and structs.
        let (session, req) = unsafe { (live_session(session)?, input(req)?) };
        output(job, "job")?;
        // SAFETY: the header's condition on handles.
        if !req.model.is_null() && !unsafe { live_model(req.model) }?.model.is(session.session.model()) {
            return Err(Failure::new(E_ARG, "the request's model is not the session's"));
        }
        if req.prompts.count > 0 {
            return Err(bad(format!("the request has {} prompts; in a session it has none", req.prompts.count)));
        }
        if !req.streams.is_null() {
            return Err(bad("streams is set; a session's turns have stream 0".into()));
        }
        // SAFETY: the header's conditions on arrays and handles.
        let request = unsafe { sample_request(&req) }?;
        let submit = |request: &runtime::SampleRequest| session.session.sample(request);
        let id = queue_samples(&session.child.0, &request, req.user_tag, submit)?;
        // SAFETY: not NULL.
        unsafe { job.write(id) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_tokens(
    session: *const rrt_session,
    ids: *mut u32,
    capacity: usize,
    need: *mut usize,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's conditions on handles and buffers.
        unsafe { fill(&live_session(session)?.session.tokens(), ids, capacity, need) }
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_fork(
    session: *const rrt_session,
    out: *mut *mut rrt_session,
    err: *mut rrt_error,
) -> i32 {
    let body = || {
        // SAFETY: the header's condition on handles.
        let session = unsafe { live_session(session) }?;
        output(out, "out")?;
        let handle = rrt_session { session: session.session.fork()?, child: Child::of(&session.child.0) };
        // SAFETY: not NULL.
        unsafe { out.write(Box::into_raw(Box::new(handle))) };
        Ok(())
    };
    // SAFETY: the header's condition on err.
    unsafe { enter(err, body) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn rrt_session_free(session: *mut rrt_session) {
    if !session.is_null() {
        // SAFETY: made by rrt_session_new or rrt_session_fork, freed once.
        quietly(|| drop(unsafe { Box::from_raw(session) }));
    }
}
