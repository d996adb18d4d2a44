//! Programs made from the header: NULL for every pointer, and every wrong size, of every function.

use std::fmt::Write;

use super::header::{Function, Parameter, functions, initialisers, sized_structs};
use super::{compile_sanitized, run, talking_model, text, without_vulkan};
use crate::common::golden;

/// Pointers that may be NULL where everything else is given.
const OPTIONAL: [(&str, &str); 5] = [
    ("rrt_set_log", "fn"),
    ("rrt_set_log", "user_data"),
    ("rrt_job_peek", "ids"),
    ("rrt_job_peek", "logprob"),
    ("rrt_job_peek", "sample_logprob"),
];

/// Its length is the descriptor's rank, which is 0 here: an array without elements may be NULL.
const EMPTY: (&str, &str) = ("rrt_update_slice", "start");

/// The program's beginning: one of everything, alive.
const PROLOGUE: &str = r#"#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "rewardrt.h"

static rrt_error err;
static int failures;
static int calls;
static unsigned char space[16][8192];
static unsigned char input[8192];
static const unsigned char zeros[8192];
#define CANARY ((void *)0x5a5a)
static void *canary = CANARY;
static uint64_t job;
static rrt_runtime *runtime;
static rrt_model *model;
static rrt_tokenizer *tokenizer;
static rrt_adapter *adapter;
static rrt_session *session;
static rrt_update *update;
static rrt_follower *follower;
static rrt_result *result, *scored;
static const uint32_t some_ids[2] = { 5, 17 };
static const size_t some_offsets[2] = { 0, 2 };
static const uint64_t some_numbers[8];

static void must(rrt_status status, const char *what) {
    if (status != RRT_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rrt_status_name(status), err.text);
        exit(1);
    }
}

static void expect(int good, rrt_status got, const char *what) {
    calls++;
    if (!good) {
        fprintf(stderr, "%s: %s (%s)\n", what, rrt_status_name(got), err.text);
        failures++;
    }
}

/* Nothing is written where the call failed. */
void untouched(const char *what) {
    size_t i;
    for (i = 0; i < 16; i++) {
        if (memcmp(space[i], zeros, sizeof zeros) != 0) {
            fprintf(stderr, "%s: wrote into output %u\n", what, (unsigned)i);
            failures++;
            memset(space[i], 0, sizeof space[i]);
        }
    }
    if (canary != CANARY) {
        fprintf(stderr, "%s: gave a handle\n", what);
        failures++;
        canary = CANARY;
    }
}

void size_is(unsigned char *p, uint32_t size) { memcpy(p, &size, sizeof size); }

static void set_up(const char *folder, const char *adapter_folder, const char *followed) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_adapter_opts with = RRT_ADAPTER_OPTS_INIT;
    rrt_update_opts change = RRT_UPDATE_OPTS_INIT;
    rrt_follow_opts follow = RRT_FOLLOW_OPTS_INIT;
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    rrt_score_req score = RRT_SCORE_REQ_INIT;
    rrt_rollout_req roll = RRT_ROLLOUT_REQ_INIT;
    uint64_t number = 0;
    open.device = "cpu";
    open.device_len = 3;
    must(rrt_open(&open, &runtime, &err), "open");
    load.path = folder;
    load.path_len = strlen(folder);
    load.kv_tokens = 2048;
    must(rrt_model_load(runtime, &load, &model, &err), "load");
    must(rrt_tokenizer_load(folder, strlen(folder), &tokenizer, &err), "tokenizer");
    with.path = adapter_folder;
    with.path_len = strlen(adapter_folder);
    must(rrt_adapter_load(model, &with, &adapter, &err), "adapter");
    must(rrt_session_new(model, some_ids, 2, &session, &err), "session");
    must(rrt_update_begin(model, &change, &update, &err), "update");
    must(rrt_follow(model, followed, strlen(followed), &follow, &follower, &err), "follow");
    sample.model = model;
    sample.prompts.ids = some_ids;
    sample.prompts.offsets = some_offsets;
    sample.prompts.count = 1;
    sample.max_new_tokens = 2;
    sample.top_logprobs = 2;
    roll.sample = &sample;
    must(rrt_rollout(runtime, &roll, &number, &err), "rollout");
    must(rrt_wait(runtime, &number, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
    must(rrt_job_take(runtime, number, &result, &err), "take");
    score.model = model;
    score.kind = RRT_SCORE_LOGPROBS;
    score.sequences = sample.prompts;
    must(rrt_submit_score(runtime, &score, &number, &err), "score");
    must(rrt_wait(runtime, &number, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
    must(rrt_job_take(runtime, number, &scored, &err), "take");
    sample.flags = RRT_SAMPLE_STREAM;
    must(rrt_submit_sample(runtime, &sample, &job, &err), "stream");
    must(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
}

static void tear_down(void) {
    rrt_result_free(result);
    rrt_result_free(scored);
    rrt_follower_free(follower);
    rrt_update_free(update);
    rrt_session_free(session);
    rrt_adapter_free(adapter);
    rrt_tokenizer_free(tokenizer);
    rrt_model_free(model);
    must(rrt_close(runtime, UINT64_MAX, &err), "close");
    runtime = NULL;
}
"#;

fn has_initialiser(name: &str) -> bool {
    initialisers().iter().any(|(_, kind)| kind == name)
}

/// An input struct, of which the caller gives the size.
fn is_input(p: &Parameter) -> bool {
    p.kind.starts_with("const ") && has_initialiser(p.target())
}

/// An output struct, of which the caller gives the size.
fn is_output(p: &Parameter) -> bool {
    !p.kind.starts_with("const ") && sized_structs().contains(p.target()) && !has_initialiser(p.target())
}

/// What is passed where nothing is wrong; `place` is the parameter's.
fn given(f: &Function, p: &Parameter, place: usize) -> String {
    let handle = |name: &str| match (f.name.as_str(), name) {
        ("rrt_result_scores", "result") => "scored".to_owned(),
        _ => name.to_owned(),
    };
    match p.kind.as_str() {
        "rrt_error*" => "&err".into(),
        "rrt_log_fn" | "void*" => "NULL".into(),
        kind if kind.ends_with("**") => format!("({kind})&canary"),
        "const char*" => "\"x\"".into(),
        "const uint32_t*" => "some_ids".into(),
        "const uint64_t*" => "some_numbers".into(),
        "const rrt_message*" => "(const rrt_message *)zeros".into(),
        kind if is_input(p) => format!("({kind})input"),
        kind if kind.ends_with('*')
            && ["char", "uint32_t", "uint64_t", "int32_t", "size_t", "float", "rrt_event"].contains(&p.target()) =>
        {
            format!("({kind})space[{place}]")
        }
        kind if sized_structs().contains(p.target()) => format!("({kind})space[{place}]"),
        kind if kind.ends_with('*') => {
            let name = p.target().strip_prefix("rrt_").unwrap();
            assert!(
                ["runtime", "model", "tokenizer", "adapter", "session", "update", "follower", "result"].contains(&name),
                "{}: {kind}",
                f.name
            );
            handle(name)
        }
        "size_t" if p.name == "stride" => "1024".into(),
        "size_t" => "1".into(),
        "uint64_t" if p.name == "job" => "job".into(),
        _ => "0".into(),
    }
}

/// Puts defaults into `input` for the function's input struct, if it has one.
fn fill_input(c: &mut String, f: &Function) {
    if let Some(p) = f.parameters.iter().find(|p| is_input(p)) {
        let (kind, init) = (p.target(), initialisers().into_iter().find(|(_, k)| k == p.target()).unwrap().0);
        writeln!(c, "    {{ {kind} x = {init}; memset(input, 0, sizeof input); memcpy(input, &x, sizeof x); }}")
            .unwrap();
    }
}

fn call(f: &Function, arguments: &[String]) -> String {
    format!("{}({})", f.name, arguments.join(", "))
}

fn program(body: &str) -> String {
    format!(
        "{PROLOGUE}\n{body}\n\
         int main(int argc, char **argv) {{\n    if (argc != 4) return 2;\n    set_up(argv[1], argv[2], argv[3]);\n    sweep();\n    \
         tear_down();\n    if (failures > 0) return 1;\n    printf(\"%d calls\\n\", calls);\n    return 0;\n}}\n"
    )
}

/// Builds and runs it; how many calls it made.
fn sweep(name: &str, body: &str) -> usize {
    let folder = tempfile::tempdir().unwrap();
    let model = talking_model(&folder.path().join("model"));
    let source = folder.path().join(format!("{name}.c"));
    std::fs::write(&source, program(body)).unwrap();
    let binary = folder.path().join(name);
    compile_sanitized(&source, &binary);
    let followed = folder.path().join("followed");
    std::fs::create_dir(&followed).unwrap();
    let adapter = golden("adapters/wide-all");
    let output = run(without_vulkan(&binary).arg(&model).arg(adapter).arg(&followed));
    text(&output.stdout).trim().strip_suffix(" calls").unwrap().parse().unwrap()
}

#[test]
fn null_is_an_error_everywhere() {
    let mut c = "static void sweep(void) {\n    rrt_status status;\n".to_owned();
    let mut expected = 0;
    for f in functions() {
        let all: Vec<String> = f.parameters.iter().enumerate().map(|(i, p)| given(&f, p, i)).collect();
        let frees = f.returns == "void";
        for (i, p) in f.parameters.iter().enumerate() {
            if !p.is_pointer() || p.kind == "rrt_error*" || (&*f.name, &*p.name) == EMPTY {
                continue;
            }
            let mut arguments = all.clone();
            arguments[i] = "NULL".into();
            let call = call(&f, &arguments);
            let what = format!("{} without {}", f.name, p.name);
            if frees {
                writeln!(c, "    {call}; expect(1, RRT_OK, \"{what}\");").unwrap();
                expected += 1;
                continue;
            }
            // Closing nothing is no error.
            let is_optional = OPTIONAL.contains(&(&*f.name, &*p.name)) || f.name == "rrt_close";
            let status = if is_optional { "RRT_OK" } else { "RRT_E_NULL" };
            fill_input(&mut c, &f);
            writeln!(c, "    memset(&err, 0, sizeof err);\n    status = {call};").unwrap();
            writeln!(c, "    expect(status == {status}, status, \"{what}\");").unwrap();
            if is_optional {
                writeln!(c, "    memset(space, 0, sizeof space);").unwrap();
            } else {
                writeln!(c, "    expect(err.code == status && err.len > 0 && err.text[err.len] == 0, status, \"{what}: its error\");").unwrap();
                writeln!(c, "    untouched(\"{what}\");").unwrap();
                expected += 1;
                // And nobody has to take the error.
                let last = arguments.len() - 1;
                arguments[last] = "NULL".into();
                writeln!(c, "    status = {};", self::call(&f, &arguments)).unwrap();
                writeln!(c, "    expect(status == RRT_E_NULL, status, \"{what}, nor an error\");").unwrap();
                expected += 1;
            }
            expected += 1;
        }
    }
    c += "}\n";
    assert!(expected > 400, "{expected}");
    assert_eq!(sweep("nulls", &c), expected);
}

#[test]
fn a_wrong_size_is_an_error_everywhere() {
    let mut c = "static void sweep(void) {\n    rrt_status status;\n".to_owned();
    let mut expected = 0;
    for f in functions() {
        let arguments: Vec<String> = f.parameters.iter().enumerate().map(|(i, p)| given(&f, p, i)).collect();
        let call = call(&f, &arguments);
        // What was right gave something that has to go again.
        let mut frees = String::new();
        for handle in f.parameters.iter().filter(|p| p.kind.ends_with("**")) {
            let free = match handle.target() {
                "rrt_runtime" => "rrt_close((rrt_runtime *)canary, UINT64_MAX, &err)".to_owned(),
                kind => format!("{kind}_free(({kind} *)canary)"),
            };
            writeln!(frees, "    if (canary != CANARY) {free};\n    canary = CANARY;").unwrap();
        }
        for (i, p) in f.parameters.iter().enumerate().filter(|(_, p)| is_input(p) || is_output(p)) {
            let kind = p.target();
            let bytes = if is_input(p) { "input".to_owned() } else { format!("space[{i}]") };
            for (size, beyond, is_wrong) in [
                ("0", 0, true),
                ("3", 0, true),
                (&*format!("sizeof({kind}) - 1"), 0, true),
                ("UINT32_MAX", 0, true),
                ("5000", 0, true),
                // A newer header's fields that are set, which an output struct may have.
                (&*format!("sizeof({kind}) + 16"), 1, is_input(p)),
                (&*format!("sizeof({kind}) + 16"), 0, false),
                (&*format!("sizeof({kind})"), 0, false),
            ] {
                let what = format!("{}, {kind} of {size}, {beyond} beyond", f.name);
                fill_input(&mut c, &f);
                writeln!(c, "    memset(space, 0, sizeof space); size_is({bytes}, (uint32_t)({size}));").unwrap();
                writeln!(c, "    {bytes}[sizeof({kind}) + 7] = {beyond};\n    status = {call};").unwrap();
                let condition = if is_wrong { "==" } else { "!=" };
                writeln!(c, "    expect(status {condition} RRT_E_ABI, status, \"{what}\");").unwrap();
                writeln!(c, "    expect({bytes}[sizeof({kind}) + 7] == {beyond}, status, \"{what}: beyond\");")
                    .unwrap();
                expected += 2;
                if is_wrong {
                    // But for what this program put there.
                    writeln!(
                        c,
                        "    size_is({bytes}, 0);\n    {bytes}[sizeof({kind}) + 7] = 0;\n    untouched(\"{what}\");"
                    )
                    .unwrap();
                }
                if !is_wrong && is_output(p) && f.name != "rrt_list_devices" {
                    writeln!(c, "    expect(status == RRT_OK, status, \"{what}\");").unwrap();
                    expected += 1;
                }
                c += &frees;
            }
        }
    }
    c += "}\n";
    assert!(expected > 400, "{expected}");
    assert_eq!(sweep("sizes", &c), expected);
}
