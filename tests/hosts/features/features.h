/* What the programs of this folder share: what every function and every field does, against what the header says of it. Each
 * is called with MODEL, a small language model with a tokenizer of bytes, and CLASSIFIER, one with three labels, and prints "ok". */
#ifndef FEATURES_H
#define FEATURES_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../checks.h"

static rrt_runtime *runtime;
static rrt_model *model, *classifier;
static const uint32_t PROMPT[4] = { 5, 17, 40, 9 };
static const size_t OFFSETS[2] = { 0, 4 };

/* A greedy request for one answer to PROMPT. */
static inline rrt_sample_req greedy(uint32_t tokens) {
    rrt_sample_req req = RRT_SAMPLE_REQ_INIT;
    req.flags = RRT_SAMPLE_IGNORE_EOS;
    req.model = model;
    req.prompts.ids = PROMPT;
    req.prompts.offsets = OFFSETS;
    req.prompts.count = 1;
    req.max_new_tokens = tokens;
    req.temperature = 0.0f;
    return req;
}

static inline rrt_result *take(uint64_t job) {
    rrt_result *result = NULL;
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    OK(rrt_job_take(runtime, job, &result, &err));
    if (result == NULL) exit(1);
    return result;
}

static inline rrt_sequences_view sequences(const rrt_result *result) {
    rrt_sequences_view view;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    OK(rrt_result_sequences(result, &view, &err));
    return view;
}

static inline rrt_scores_view scores(const rrt_result *result) {
    rrt_scores_view view;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    OK(rrt_result_scores(result, &view, &err));
    return view;
}

static inline rrt_result *sample(const rrt_sample_req *req) {
    uint64_t job = 0;
    OK(rrt_submit_sample(runtime, req, &job, &err));
    return take(job);
}

static inline rrt_result *score(const rrt_score_req *req) {
    uint64_t job = 0;
    OK(rrt_submit_score(runtime, req, &job, &err));
    return take(job);
}

/* Opens a runtime on the CPU with both models. */
static void begin(const char *folder, const char *labels) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    open.device = "cpu";
    open.device_len = 3;
    OK(rrt_open(&open, &runtime, &err));
    load.path = folder;
    load.path_len = strlen(folder);
    load.kv_tokens = 4096;
    OK(rrt_model_load(runtime, &load, &model, &err));
    load.path = labels;
    load.path_len = strlen(labels);
    OK(rrt_model_load(runtime, &load, &classifier, &err));
    if (failures > 0) exit(1);
}

/* Closes everything; the program's exit status. */
static int end(void) {
    rrt_model_free(model);
    rrt_model_free(classifier);
    OK(rrt_close(runtime, UINT64_MAX, &err));
    if (failures > 0) return 1;
    puts("ok");
    return 0;
}

#endif
