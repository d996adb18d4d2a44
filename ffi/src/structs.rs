//! The structs of the header, field by field. In brackets: the size that a struct had in the first version of the ABI that has
//! it, on 64-bit systems. It is what a caller has at least, and never changes.

use std::ffi::{c_char, c_void};
use std::ptr::null;

use crate::adapter::rrt_adapter;
use crate::boundary::Sized32;
use crate::model::rrt_model;
#[cfg(test)]
use crate::status::rrt_error;

macro_rules! structs {
    ($($(#[$meta:meta])* struct $name:ident [$first:literal] { $($field:ident: $ty:ty = $default:expr,)* })*) => {
        $(
            $(#[$meta])*
            #[repr(C)]
            #[derive(Clone, Copy)]
            pub struct $name { $(pub $field: $ty,)* }

            // SAFETY: repr(C), begins with struct_size; integers, floats and pointers.
            unsafe impl Sized32 for $name {
                const NAME: &'static str = stringify!($name);
                const FIRST_SIZE: usize = $first;

                fn initial() -> Self {
                    $name { $($field: $default,)* }
                }
            }
        )*

        /// (struct, its first size), for the test that compares with the first header.
        #[cfg(test)]
        pub fn first_sizes() -> Vec<(&'static str, usize)> {
            vec![$((stringify!($name), $first),)*]
        }

        /// For the test that compares with the C compiler.
        #[cfg(test)]
        pub fn layout() -> Vec<Layout> {
            vec![$(layout_of!($name: $($field)*),)*]
        }
    };
}

/// (struct, size, alignment, [(field, offset)])
#[cfg(test)]
type Layout = (&'static str, usize, usize, Vec<(&'static str, usize)>);

#[cfg(test)]
macro_rules! layout_of {
    ($name:ident: $($field:ident)*) => {(
        stringify!($name),
        size_of::<$name>(),
        align_of::<$name>(),
        vec![$((stringify!($field), std::mem::offset_of!($name, $field)),)*],
    )};
}

/// An element of the caller's array, whose stride says how large it is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct rrt_event {
    pub kind: i32,
    pub status: i32,
    pub job: u64,
    pub user_tag: u64,
    pub sequence: u32,
    pub first: u32,
    pub count: u32,
    pub finish: i32,
    pub text_len: u64,
}

impl rrt_event {
    /// Its size in ABI 1.0, as the bracketed ones below.
    pub const FIRST_SIZE: usize = 48;
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct rrt_sequences {
    pub ids: *const u32,
    pub offsets: *const usize,
    pub count: usize,
}

/// Dimensions of a tensor that fit into a struct.
pub const MAX_RANK: usize = 8;

const NO_SEQUENCES: rrt_sequences = rrt_sequences { ids: null(), offsets: null(), count: 0 };

#[repr(C)]
#[derive(Clone, Copy)]
pub struct rrt_message {
    pub role: *const c_char,
    pub role_len: usize,
    pub content: *const c_char,
    pub content_len: usize,
}

structs! {
    struct rrt_device_info [280] {
        struct_size: u32 = size_of::<rrt_device_info>() as u32,
        r#type: i32 = 0,
        max_binding_bytes: u64 = 0,
        has_f16: u32 = 0,
        has_subgroups: u32 = 0,
        name: [c_char; 128] = [0; 128],
        driver: [c_char; 128] = [0; 128],
    }
    struct rrt_open_opts [64] {
        struct_size: u32 = size_of::<rrt_open_opts>() as u32,
        flags: u32 = 0,
        device: *const c_char = null(),
        device_len: usize = 0,
        threads: u32 = 0,
        reserved: u32 = 0,
        max_jobs: u64 = 0,
        max_queued_tokens: u64 = 0,
        shader_cache: *const c_char = null(),
        shader_cache_len: usize = 0,
    }
    struct rrt_limits [80] {
        struct_size: u32 = size_of::<rrt_limits>() as u32,
        reserved: u32 = 0,
        max_sequences: u64 = 0,
        max_tokens: u64 = 0,
        max_alternatives: u64 = 0,
        max_stops: u32 = 0,
        max_biases: u32 = 0,
        max_top_logprobs: u32 = 0,
        max_kept_ids: u32 = 0,
        max_speculate: u32 = 0,
        max_rank: u32 = 0,
        max_guide_bytes: u64 = 0,
        max_messages: u64 = 0,
        max_threads: u64 = 0,
    }
    struct rrt_model_opts [72] {
        struct_size: u32 = size_of::<rrt_model_opts>() as u32,
        flags: u32 = 0,
        path: *const c_char = null(),
        path_len: usize = 0,
        precision: i32 = 0,
        max_batch_tokens: u32 = 0,
        kv_tokens: u64 = 0,
        memory: u64 = 0,
        max_context: u64 = 0,
        weights_version: u64 = 0,
        weights: i32 = 0,
        steps_at_once: u32 = 0,
    }
    struct rrt_model_info [128] {
        struct_size: u32 = size_of::<rrt_model_info>() as u32,
        head: i32 = 0,
        vocab_size: u32 = 0,
        hidden_size: u32 = 0,
        layers: u32 = 0,
        heads: u32 = 0,
        kv_heads: u32 = 0,
        head_dim: u32 = 0,
        labels: u32 = 0,
        has_tokenizer: u32 = 0,
        has_chat_template: u32 = 0,
        asleep: u32 = 0,
        max_context: u64 = 0,
        kv_tokens: u64 = 0,
        bytes_allocated: u64 = 0,
        bytes_mapped: u64 = 0,
        weights_version: u64 = 0,
        pad_id: i64 = -1,
        eos_ids: *const u32 = null(),
        eos_count: usize = 0,
        architecture: *const c_char = null(),
        architecture_len: usize = 0,
    }
    struct rrt_sample_req [280] {
        struct_size: u32 = size_of::<rrt_sample_req>() as u32,
        flags: u32 = 0,
        model: *const rrt_model = null(),
        prompts: rrt_sequences = NO_SEQUENCES,
        streams: *const u64 = null(),
        seed: u64 = 0,
        n_samples: u32 = 1,
        max_new_tokens: u32 = 128,
        temperature: f32 = 1.0,
        top_k: u32 = 0,
        top_p: f32 = 1.0,
        min_p: f32 = 0.0,
        repetition_penalty: f32 = 1.0,
        reserved: u32 = 0,
        stop_ids: *const u32 = null(),
        stop_id_count: usize = 0,
        stop_text: *const c_char = null(),
        stop_offsets: *const usize = null(),
        stop_count: usize = 0,
        adapter: *const rrt_adapter = null(),
        typical_p: f32 = 1.0,
        presence_penalty: f32 = 0.0,
        frequency_penalty: f32 = 0.0,
        min_new_tokens: u32 = 0,
        best_of: u32 = 0,
        top_logprobs: u32 = 0,
        kept_ids: u32 = 0,
        speculate: u32 = 0,
        bias_ids: *const u32 = null(),
        bias: *const f32 = null(),
        bias_count: usize = 0,
        banned_ids: *const u32 = null(),
        banned_count: usize = 0,
        allowed_ids: *const u32 = null(),
        allowed_count: usize = 0,
        guide_kind: i32 = 0,
        priority: i32 = 0,
        guide: *const c_char = null(),
        guide_len: usize = 0,
        choice_offsets: *const usize = null(),
        choice_count: usize = 0,
        deadline_ns: u64 = 0,
        user_tag: u64 = 0,
    }
    struct rrt_score_req [128] {
        struct_size: u32 = size_of::<rrt_score_req>() as u32,
        flags: u32 = 0,
        model: *const rrt_model = null(),
        kind: i32 = 1,
        label: u32 = 0,
        sequences: rrt_sequences = NO_SEQUENCES,
        prompt_lens: *const usize = null(),
        rule: *const c_char = null(),
        rule_len: usize = 0,
        adapter: *const rrt_adapter = null(),
        positions: *const usize = null(),
        position_offsets: *const usize = null(),
        step_id: u32 = 0,
        top_logprobs: u32 = 0,
        priority: i32 = 0,
        reserved: u32 = 0,
        deadline_ns: u64 = 0,
        user_tag: u64 = 0,
    }
    struct rrt_reward [80] {
        struct_size: u32 = size_of::<rrt_reward>() as u32,
        flags: u32 = 0,
        model: *const rrt_model = null(),
        name: *const c_char = null(),
        name_len: usize = 0,
        rule: *const c_char = null(),
        rule_len: usize = 0,
        adapter: *const rrt_adapter = null(),
        weight: f32 = 1.0,
        label: u32 = 0,
        question: *const c_char = null(),
        question_len: usize = 0,
    }
    struct rrt_rollout_req [88] {
        struct_size: u32 = size_of::<rrt_rollout_req>() as u32,
        flags: u32 = 0,
        sample: *const rrt_sample_req = null(),
        reference: *const rrt_model = null(),
        rewards: *const rrt_reward = null(),
        reward_count: usize = 0,
        reward_stride: usize = size_of::<rrt_reward>(),
        messages: *const rrt_message = null(),
        message_offsets: *const usize = null(),
        message_stride: usize = size_of::<rrt_message>(),
        advantage: i32 = 0,
        clip_low: f32 = 0.0,
        clip_high: f32 = 0.0,
        reserved: u32 = 0,
    }
    struct rrt_follow_opts [24] {
        struct_size: u32 = size_of::<rrt_follow_opts>() as u32,
        flags: u32 = 0,
        interval_ns: u64 = 200_000_000,
        update: *const rrt_update_opts = null(),
    }
    struct rrt_adapter_opts [48] {
        struct_size: u32 = size_of::<rrt_adapter_opts>() as u32,
        flags: u32 = 0,
        path: *const c_char = null(),
        path_len: usize = 0,
        version: u64 = 0,
        config: *const c_char = null(),
        config_len: usize = 0,
    }
    struct rrt_update_opts [40] {
        struct_size: u32 = size_of::<rrt_update_opts>() as u32,
        flags: u32 = 0,
        expect_version: u64 = 0,
        storage: i32 = 0,
        in_flight: i32 = 0,
        require: i32 = 0,
        reserved: u32 = 0,
        timeout_ns: u64 = u64::MAX,
    }
    struct rrt_tensor_desc [72] {
        struct_size: u32 = size_of::<rrt_tensor_desc>() as u32,
        flags: u32 = 0,
        name: *const c_char = null(),
        name_len: usize = 0,
        dtype: i32 = 0,
        reserved: u32 = 0,
        rank: usize = 0,
        shape: *const u64 = null(),
        data: *const c_void = null(),
        bytes: usize = 0,
        checksum: *const u8 = null(),
    }
    struct rrt_tensor_info [96] {
        struct_size: u32 = size_of::<rrt_tensor_info>() as u32,
        dtype: i32 = 0,
        name: *const c_char = null(),
        name_len: usize = 0,
        shape: [u64; MAX_RANK] = [0; MAX_RANK],
        rank: u32 = 0,
        reserved: u32 = 0,
    }
    struct rrt_sequences_view [176] {
        struct_size: u32 = size_of::<rrt_sequences_view>() as u32,
        reserved: u32 = 0,
        count: usize = 0,
        offsets: *const usize = null(),
        ids: *const u32 = null(),
        logprob: *const f32 = null(),
        sample_logprob: *const f32 = null(),
        entropy: *const f32 = null(),
        kept: *const u32 = null(),
        threshold: *const f32 = null(),
        finish: *const i32 = null(),
        prompt_index: *const u32 = null(),
        sample_index: *const u32 = null(),
        version: *const u64 = null(),
        text_offsets: *const usize = null(),
        text: *const c_char = null(),
        span_offsets: *const usize = null(),
        span_end: *const u32 = null(),
        span_version: *const u64 = null(),
        adapter_version: *const u64 = null(),
        ceiling: *const f32 = null(),
        kept_offsets: *const usize = null(),
        kept_ids: *const u32 = null(),
    }
    struct rrt_scores_view [96] {
        struct_size: u32 = size_of::<rrt_scores_view>() as u32,
        reserved: u32 = 0,
        count: usize = 0,
        offsets: *const usize = null(),
        values: *const f32 = null(),
        version: *const u64 = null(),
        adapter_version: *const u64 = null(),
        score: *const f32 = null(),
        label_count: usize = 0,
        label_offsets: *const usize = null(),
        label_text: *const c_char = null(),
        position: *const u32 = null(),
        entropy: *const f32 = null(),
    }
    struct rrt_topk_view [40] {
        struct_size: u32 = size_of::<rrt_topk_view>() as u32,
        reserved: u32 = 0,
        count: usize = 0,
        offsets: *const usize = null(),
        ids: *const u32 = null(),
        logprob: *const f32 = null(),
    }
    struct rrt_rollout_view [144] {
        struct_size: u32 = size_of::<rrt_rollout_view>() as u32,
        reserved: u32 = 0,
        count: usize = 0,
        ref_logprob: *const f32 = null(),
        kl1: *const f32 = null(),
        kl2: *const f32 = null(),
        kl3: *const f32 = null(),
        reward_count: usize = 0,
        rewards: *const f32 = null(),
        reward: *const f32 = null(),
        advantage: *const f32 = null(),
        group_count: usize = 0,
        group_mean: *const f32 = null(),
        group_std: *const f32 = null(),
        group_zero_variance: *const u32 = null(),
        group_best: *const u32 = null(),
        group_worst: *const u32 = null(),
        reward_version: *const u64 = null(),
        ref_version: *const u64 = null(),
    }
    struct rrt_job_timing [120] {
        struct_size: u32 = size_of::<rrt_job_timing>() as u32,
        reserved: u32 = 0,
        queued_ns: u64 = 0,
        elapsed_ns: u64 = 0,
        prefill_rows: u64 = 0,
        decode_rows: u64 = 0,
        drafted_rows: u64 = 0,
        accepted_rows: u64 = 0,
        recomputed_rows: u64 = 0,
        cached_rows: u64 = 0,
        sampled_tokens: u64 = 0,
        preemptions: u64 = 0,
        count: usize = 0,
        sequence_queued_ns: *const u64 = null(),
        sequence_prefill_ns: *const u64 = null(),
        sequence_decode_ns: *const u64 = null(),
    }
    struct rrt_memory [72] {
        struct_size: u32 = size_of::<rrt_memory>() as u32,
        models: u32 = 0,
        allocated: u64 = 0,
        mapped: u64 = 0,
        weights: u64 = 0,
        kv_cache: u64 = 0,
        scratch: u64 = 0,
        host: u64 = 0,
        adapters: u64 = 0,
        budget: u64 = 0,
    }
    struct rrt_timing [184] {
        struct_size: u32 = size_of::<rrt_timing>() as u32,
        reserved: u32 = 0,
        steps: u64 = 0,
        step_ns: u64 = 0,
        prefill_rows: u64 = 0,
        decode_rows: u64 = 0,
        drafted_rows: u64 = 0,
        accepted_rows: u64 = 0,
        recomputed_rows: u64 = 0,
        cached_rows: u64 = 0,
        sampled_tokens: u64 = 0,
        preemptions: u64 = 0,
        longest_wait_ns: u64 = 0,
        kv_evictions: u64 = 0,
        kv_copies: u64 = 0,
        submitted: u64 = 0,
        refused: u64 = 0,
        jobs: u64 = 0,
        running: u64 = 0,
        waiting: u64 = 0,
        queued_tokens: u64 = 0,
        kv_blocks: u64 = 0,
        kv_used: u64 = 0,
        kv_cached: u64 = 0,
    }
}

macro_rules! inits {
    ($($function:ident => $name:ident;)*) => {
        $(#[unsafe(no_mangle)]
        pub unsafe extern "C" fn $function(out: *mut $name) {
            if !out.is_null() {
                // SAFETY: the caller's struct.
                unsafe { out.write($name::initial()) };
            }
        })*
    };
}

inits! {
    rrt_open_opts_init => rrt_open_opts;
    rrt_model_opts_init => rrt_model_opts;
    rrt_sample_req_init => rrt_sample_req;
    rrt_score_req_init => rrt_score_req;
    rrt_reward_init => rrt_reward;
    rrt_rollout_req_init => rrt_rollout_req;
    rrt_follow_opts_init => rrt_follow_opts;
    rrt_adapter_opts_init => rrt_adapter_opts;
    rrt_update_opts_init => rrt_update_opts;
    rrt_tensor_desc_init => rrt_tensor_desc;
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    /// Sizes and offsets as the C compiler sees them, by a program made from this table.
    #[test]
    fn the_header_has_the_same_layout() {
        let mut c =
            "#include \"rewardrt.h\"\n#define SAME(a, b) _Static_assert((a) == (b), #a \" is not \" #b)\n".to_owned();
        use super::{rrt_error, rrt_event, rrt_message, rrt_sequences};
        let mut all = super::layout();
        all.push(layout_of!(rrt_error: code len text));
        all.push(layout_of!(rrt_event: kind status job user_tag sequence first count finish text_len));
        all.push(layout_of!(rrt_message: role role_len content content_len));
        all.push(layout_of!(rrt_sequences: ids offsets count));
        let header = include_str!("../include/rewardrt.h");
        let defined = header.lines().filter(|line| line.starts_with("typedef struct") && line.ends_with('{')).count();
        assert_eq!(all.len(), defined, "a struct of the header is not compared");
        for (name, size, align, fields) in all {
            c += &format!("SAME(sizeof({name}), {size});\nSAME(_Alignof({name}), {align});\n");
            for (field, offset) in fields {
                c += &format!("SAME(offsetof({name}, {}), {offset});\n", field.trim_start_matches("r#"));
            }
        }
        c += "SAME(sizeof(rrt_error), 512);\n";
        compiles(&c, "include");
    }

    /// Compiles against the header in this folder of the crate.
    fn compiles(c: &str, include: &str) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("layout.c");
        std::fs::write(&file, c).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-std=c11", "-Werror", "-c", "-I"]).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(include));
        let output = cc.arg(&file).arg("-o").arg(folder.path().join("layout.o")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A host that was compiled with the first header brings structs of its sizes.
    #[test]
    fn first_sizes_are_those_of_the_first_header() {
        let header = include_str!("../abi/v1.0/rewardrt.h");
        let mut all = super::first_sizes();
        all.push(("rrt_event", super::rrt_event::FIRST_SIZE));
        all.retain(|(name, _)| header.contains(&format!("typedef struct {name} {{")));
        assert!(all.len() >= 22, "{}", all.len());
        let mut c = "#include \"rewardrt.h\"\n".to_owned();
        for (name, size) in all {
            c += &format!("_Static_assert(sizeof({name}) == {size}, \"{name}\");\n");
        }
        compiles(&c, "abi/v1.0");
    }

    /// Numbers are append-only: the table of names and the header say the same.
    #[test]
    fn every_status_is_in_the_header_with_its_number() {
        let header = include_str!("../include/rewardrt.h");
        let mut found = 0;
        for line in header.lines() {
            let Some((name, rest)) = line.trim().split_once(" = ") else { continue };
            if !(name.starts_with("RRT_E_") || ["RRT_OK", "RRT_PENDING", "RRT_TIMEOUT"].contains(&name)) {
                continue;
            }
            let digits = rest.split([',', ' ', '/']).next().unwrap();
            let number: i32 = digits.parse().unwrap();
            assert_eq!(crate::status::name(number).to_str().unwrap(), name);
            found += 1;
        }
        assert_eq!(found, 29);
    }
}
