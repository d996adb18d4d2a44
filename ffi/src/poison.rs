//! What is left of the library after a bug: in a process of its own, since the others' tests are in this one.

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::process::Command;
use std::ptr::null_mut;

use crate::boundary::{Sized32, enter};
use crate::follow::rrt_follow;
use crate::job::*;
use crate::model::*;
use crate::poll::*;
use crate::result::*;
use crate::runtime::*;
use crate::status::{E_PANIC, E_POISONED, OK, rrt_error};
use crate::structs::*;

const CHILD: &str = "REWARDRT_TEST_CHILD";
const PROMPT: [u32; 4] = [5, 17, 40, 9];
const OFFSETS: [usize; 2] = [0, 4];

/// Not a test of its own: what the process of the next one does.
#[test]
fn child() {
    if std::env::var(CHILD).is_err() {
        return;
    }
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/llama-gqa-9-3");
    let (mut runtime, mut model, mut result) = (null_mut(), null_mut(), null_mut());
    let (mut err, mut job, mut running, mut other, mut state, mut count) =
        (rrt_error { code: 0, len: 0, text: [0; 504] }, 0u64, 0u64, 0u64, 0i32, 0usize);
    let open = rrt_open_opts { device: c"cpu".as_ptr(), device_len: 3, ..rrt_open_opts::initial() };
    let load = rrt_model_opts { path: folder.as_ptr().cast(), path_len: folder.len(), ..rrt_model_opts::initial() };
    // SAFETY: structs and arrays that live longer than the calls, handles that are used before they are freed.
    unsafe {
        assert_eq!(rrt_open(&open, &mut runtime, &mut err), OK);
        assert_eq!(rrt_model_load(runtime, &load, &mut model, &mut err), OK);
        let request = rrt_sample_req {
            flags: 1, // IGNORE_EOS
            model,
            prompts: rrt_sequences { ids: PROMPT.as_ptr(), offsets: OFFSETS.as_ptr(), count: 1 },
            max_new_tokens: 8,
            ..rrt_sample_req::initial()
        };
        let long = rrt_sample_req { max_new_tokens: 60, ..request };
        assert_eq!(rrt_submit_sample(runtime, &request, &mut job, &mut err), OK);
        assert_eq!(rrt_submit_sample(runtime, &long, &mut running, &mut err), OK);

        assert_eq!(enter(&mut err, || panic!("a bug")), E_PANIC);
        let text = CStr::from_ptr(err.text.as_ptr()).to_str().unwrap();
        assert!(err.code == E_PANIC && text.contains("internal error"), "{text}");
        assert_eq!(rrt_runtime_state(runtime, &mut state, &mut err), OK);
        assert_eq!(state, 3);

        // Nothing begins any more …
        assert_eq!(rrt_submit_sample(runtime, &request, &mut other, &mut err), E_POISONED);
        let text = CStr::from_ptr(err.text.as_ptr()).to_str().unwrap();
        assert!(other == 0 && text.contains("RRT_E_PANIC"), "{text}");
        let score = rrt_score_req { model, kind: 2, sequences: request.prompts, ..rrt_score_req::initial() };
        assert_eq!(rrt_submit_score(runtime, &score, &mut other, &mut err), E_POISONED);
        let rollout = rrt_rollout_req { sample: &request, ..rrt_rollout_req::initial() };
        assert_eq!(crate::rollout::rrt_rollout(runtime, &rollout, &mut other, &mut err), E_POISONED);
        let (mut runtime2, mut model2, mut follower) = (null_mut(), null_mut(), null_mut());
        assert_eq!(rrt_open(&open, &mut runtime2, &mut err), E_POISONED);
        assert_eq!(rrt_model_load(runtime, &load, &mut model2, &mut err), E_POISONED);
        let follow = rrt_follow_opts::initial();
        let status = rrt_follow(model, folder.as_ptr().cast(), folder.len(), &follow, &mut follower, &mut err);
        assert_eq!(status, E_POISONED);
        assert!(runtime2.is_null() && model2.is_null() && follower.is_null());

        // … and what has begun comes to its end.
        let both = [job, running];
        assert_eq!(rrt_wait(runtime, both.as_ptr(), 2, 0, u64::MAX, &mut err), OK);
        // Whoever waits may hear of the end before the queue of events does.
        let (mut event, mut told) = (MaybeUninit::<rrt_event>::uninit(), 0);
        while told < 2 {
            assert_eq!(rrt_poll(runtime, event.as_mut_ptr(), 1, size_of::<rrt_event>(), &mut count, &mut err), OK);
            told += count;
        }
        assert_eq!(rrt_job_take(runtime, job, &mut result, &mut err), OK);
        let mut view = rrt_sequences_view::initial();
        assert_eq!(rrt_result_sequences(result, &mut view, &mut err), OK);
        assert_eq!(*view.offsets.add(1), 8);
        assert_eq!(rrt_job_cancel(runtime, running, &mut err), OK);
        assert_eq!(rrt_job_drop(runtime, running, &mut err), OK);
        rrt_result_free(result);
        rrt_model_free(model);
        assert_eq!(rrt_close(runtime, u64::MAX, &mut err), OK);
    }
    println!("closed");
}

#[test]
fn after_a_bug_nothing_begins_and_everything_ends() {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "poison::child", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (said, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success() && said.contains("closed"), "{said}\n{errors}");
}
