/* Samples answers to a question and lets the same model judge them.
 *
 *   cc -std=c99 -I ffi/include ffi/examples/sample_and_score.c -L target/release -lrewardrt -o sample_and_score
 *   LD_LIBRARY_PATH=target/release ./sample_and_score MODEL_FOLDER [DEVICE]
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

#define SAMPLES 4
#define MAX_IDS 4096

static rrt_error err;

static void check(rrt_status status, const char *what) {
    if (status != RRT_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rrt_status_name(status), err.text);
        exit(1);
    }
}

static rrt_message message(const char *role, const char *content) {
    rrt_message m = { role, strlen(role), content, strlen(content) };
    return m;
}

static rrt_result *wait_and_take(rrt_runtime *runtime, uint64_t job) {
    rrt_result *result = NULL;
    check(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
    check(rrt_job_take(runtime, job, &result, &err), "take");
    return result;
}

int main(int argc, char **argv) {
    const char *question = "What is the capital of France? Answer in one sentence.";
    rrt_runtime *runtime = NULL;
    rrt_model *model = NULL;
    rrt_tokenizer *tokenizer = NULL;
    rrt_open_opts open_opts = RRT_OPEN_OPTS_INIT;
    rrt_model_opts model_opts = RRT_MODEL_OPTS_INIT;
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    rrt_score_req score = RRT_SCORE_REQ_INIT;
    rrt_message ask;
    rrt_result *answers, *scores;
    rrt_sequences_view a;
    rrt_scores_view s;
    static uint32_t ids[MAX_IDS];
    size_t offsets[SAMPLES + 1] = { 0 }, need = 0, i;
    uint64_t job = 0;

    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER [DEVICE]\n", argv[0]);
        return 2;
    }
    memset(&err, 0, sizeof err);
    memset(&a, 0, sizeof a);
    memset(&s, 0, sizeof s);
    check(rrt_abi_check(RRT_ABI_VERSION), "this header and this library do not fit");

    open_opts.device = argc > 2 ? argv[2] : "auto";
    open_opts.device_len = strlen(open_opts.device);
    check(rrt_open(&open_opts, &runtime, &err), "open");
    model_opts.path = argv[1];
    model_opts.path_len = strlen(argv[1]);
    model_opts.kv_tokens = 4096;
    check(rrt_model_load(runtime, &model_opts, &model, &err), "load");
    check(rrt_tokenizer_load(argv[1], strlen(argv[1]), &tokenizer, &err), "tokenizer");

    /* 1. Sample. */
    ask = message("user", question);
    check(rrt_chat_encode(tokenizer, &ask, 1, sizeof ask, RRT_ADD_GENERATION_PROMPT, ids, MAX_IDS, &need, &err), "encode");
    offsets[1] = need;
    sample.model = model;
    sample.prompts.ids = ids;
    sample.prompts.offsets = offsets;
    sample.prompts.count = 1;
    sample.n_samples = SAMPLES;
    sample.max_new_tokens = 24;
    sample.temperature = 0.8f;
    check(rrt_submit_sample(runtime, &sample, &job, &err), "sample");
    answers = wait_and_take(runtime, job);
    a.struct_size = sizeof a;
    check(rrt_result_sequences(answers, &a, &err), "sequences");

    /* 2. Ask the model about each answer: the probability of "yes" against "no". */
    for (i = 0; i < a.count; i++) {
        char text[4096];
        snprintf(text, sizeof text, "Question: %s\nAnswer: %.*s\nIs the answer correct? Reply yes or no.", question,
                 (int)(a.text_offsets[i + 1] - a.text_offsets[i]), a.text + a.text_offsets[i]);
        ask = message("user", text);
        check(rrt_chat_encode(tokenizer, &ask, 1, sizeof ask, RRT_ADD_GENERATION_PROMPT, ids + offsets[i],
                              MAX_IDS - offsets[i], &need, &err), "encode");
        offsets[i + 1] = offsets[i] + need;
    }
    score.model = model;
    score.rule = "judge:yes,no";
    score.rule_len = strlen(score.rule);
    score.sequences.ids = ids;
    score.sequences.offsets = offsets;
    score.sequences.count = a.count;
    check(rrt_submit_score(runtime, &score, &job, &err), "score");
    scores = wait_and_take(runtime, job);
    s.struct_size = sizeof s;
    check(rrt_result_scores(scores, &s, &err), "scores");

    printf("%s\n\n", question);
    for (i = 0; i < a.count; i++) {
        double logprob = 0;
        size_t t;
        for (t = a.offsets[i]; t < a.offsets[i + 1]; t++) logprob += a.logprob[t];
        printf("yes %.3f  log p %8.2f  %.*s\n", s.values[s.offsets[i]], logprob,
               (int)(a.text_offsets[i + 1] - a.text_offsets[i]), a.text + a.text_offsets[i]);
    }

    rrt_result_free(scores);
    rrt_result_free(answers);
    rrt_tokenizer_free(tokenizer);
    rrt_model_free(model);
    check(rrt_close(runtime, UINT64_MAX, &err), "close");
    return 0;
}
