/* A host of ABI 1.0, compiled with ffi/abi/v1.0/rewardrt.h whatever the library has become. Prints "ok".
 *
 *   v1_0 MODEL_FOLDER       a small checkpoint without a tokenizer (tests/golden/llama-gqa-9-3)
 */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "rewardrt.h"

static rrt_error err;

static int ok(rrt_status status, int line) {
    if (status == RRT_OK) return 1;
    fprintf(stderr, "line %d: %s: %s\n", line, rrt_status_name(status), err.text);
    return 0;
}
#define OK(call) do { if (!ok((call), __LINE__)) return 1; } while (0)

int main(int argc, char **argv) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load;
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    rrt_score_req score;
    rrt_update_opts update_opts = RRT_UPDATE_OPTS_INIT;
    rrt_model_info info;
    rrt_sequences_view sampled;
    rrt_scores_view scored;
    rrt_runtime *runtime = NULL;
    rrt_model *model = NULL;
    rrt_update *update = NULL;
    rrt_result *first = NULL, *second = NULL;
    rrt_event event;
    static const uint32_t prompt[4] = { 5, 17, 40, 9 };
    uint32_t whole[64];
    size_t offsets[2] = { 0, 4 }, prompt_len = 4, i, count = 0;
    uint64_t job = 0;

    if (argc != 2 || RRT_ABI_VERSION != 0x10000u) return 2;
    memset(&info, 0, sizeof info);
    memset(&sampled, 0, sizeof sampled);
    memset(&scored, 0, sizeof scored);
    OK(rrt_abi_check(RRT_ABI_VERSION));
    open.device = "cpu";
    open.device_len = 3;
    OK(rrt_open(&open, &runtime, &err));
    rrt_model_opts_init(&load);
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    OK(rrt_model_load(runtime, &load, &model, &err));
    info.struct_size = sizeof info;
    OK(rrt_get_model_info(model, &info, &err));
    if (info.vocab_size != 101) return 1;

    sample.flags = RRT_SAMPLE_IGNORE_EOS;
    sample.model = model;
    sample.prompts.ids = prompt;
    sample.prompts.offsets = offsets;
    sample.prompts.count = 1;
    sample.max_new_tokens = 12;
    sample.top_k = 20;
    sample.user_tag = 99;
    OK(rrt_submit_sample(runtime, &sample, &job, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    /* Whoever waits may hear of the end a moment before the queue of events does. */
    do OK(rrt_poll(runtime, &event, 1, sizeof event, &count, &err)); while (count == 0);
    if (count != 1 || event.kind != RRT_EVENT_DONE || event.user_tag != 99) return 1;
    OK(rrt_job_take(runtime, job, &first, &err));
    sampled.struct_size = sizeof sampled;
    OK(rrt_result_sequences(first, &sampled, &err));

    /* What sampling said of its tokens, scoring says too, to the bit. */
    rrt_score_req_init(&score);
    memcpy(whole, prompt, sizeof prompt);
    memcpy(whole + 4, sampled.ids, sampled.offsets[1] * sizeof *whole);
    offsets[1] = 4 + sampled.offsets[1];
    score.model = model;
    score.kind = RRT_SCORE_LOGPROBS;
    score.sequences.ids = whole;
    score.sequences.offsets = offsets;
    score.sequences.count = 1;
    score.prompt_lens = &prompt_len;
    OK(rrt_submit_score(runtime, &score, &job, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ANY, UINT64_MAX, &err));
    OK(rrt_job_take(runtime, job, &second, &err));
    scored.struct_size = sizeof scored;
    OK(rrt_result_scores(second, &scored, &err));
    for (i = 0; i < sampled.offsets[1]; i++) {
        if (scored.values[i] != sampled.logprob[i] || !isfinite(scored.values[i])) return 1;
    }

    update_opts.require = RRT_REQUIRE_SUBSET;
    OK(rrt_update_begin(model, &update_opts, &update, &err));
    OK(rrt_update_file(update, argv[1], strlen(argv[1]), &err));
    OK(rrt_update_commit(update, 1, &err));
    rrt_update_free(update);
    rrt_result_free(first);
    rrt_result_free(second);
    rrt_model_free(model);
    OK(rrt_close(runtime, UINT64_MAX, &err));
    puts("ok");
    return 0;
}
