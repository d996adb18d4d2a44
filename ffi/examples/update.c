/* Samples, takes new weights, and samples on: what a trainer's loop does between two steps.
 *
 *   cc update.c -lrewardrt && ./a.out MODEL_FOLDER NEW_CHECKPOINT [DEVICE]
 *
 * NEW_CHECKPOINT is a folder (or file) with the same tensors, as the trainer saved it.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

static rrt_error err;

static void check(rrt_status status, const char *what) {
    if (status != RRT_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rrt_status_name(status), err.text);
        exit(1);
    }
}

/* Samples 8 tokens after a fixed prompt; prints them with the version that sampled them. */
static uint64_t sample(rrt_runtime *runtime, const rrt_model *model) {
    static const uint32_t ids[4] = { 5, 17, 40, 9 };
    static const size_t offsets[2] = { 0, 4 };
    rrt_sample_req req = RRT_SAMPLE_REQ_INIT;
    rrt_sequences_view view;
    rrt_result *result;
    uint64_t job, version;
    size_t i;

    req.model = model;
    req.prompts.ids = ids;
    req.prompts.offsets = offsets;
    req.prompts.count = 1;
    req.max_new_tokens = 8;
    req.temperature = 0.0f;
    req.flags = RRT_SAMPLE_IGNORE_EOS;
    check(rrt_submit_sample(runtime, &req, &job, &err), "submit");
    check(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
    check(rrt_job_take(runtime, job, &result, &err), "take");
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    check(rrt_result_sequences(result, &view, &err), "view");
    version = view.version[0];
    printf("version %llu:", (unsigned long long)version);
    for (i = 0; i < view.offsets[1]; i++) printf(" %u", view.ids[i]);
    printf("\n");
    rrt_result_free(result);
    return version;
}

int main(int argc, char **argv) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_tensor_info info;
    rrt_tensor_desc desc = RRT_TENSOR_DESC_INIT;
    rrt_runtime *runtime;
    rrt_model *model;
    rrt_update *update;
    size_t index, elements;
    float *weight;

    if (argc < 3) {
        fprintf(stderr, "usage: %s MODEL_FOLDER NEW_CHECKPOINT [DEVICE]\n", argv[0]);
        return 2;
    }
    if (argc > 3) {
        open.device = argv[3];
        open.device_len = strlen(argv[3]);
    }
    check(rrt_abi_check(RRT_ABI_VERSION), "abi");
    check(rrt_open(&open, &runtime, &err), "open");
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    check(rrt_model_load(runtime, &load, &model, &err), "load");
    if (sample(runtime, model) != 0) return 1;

    /* 1. A whole checkpoint from the disk, in shadow: the old weights serve until the commit. */
    opts.flags = RRT_UPDATE_EXPECT_VERSION | RRT_UPDATE_CHECK_FINITE;
    opts.expect_version = 0;
    opts.in_flight = RRT_IN_FLIGHT_KEEP;
    check(rrt_update_begin(model, &opts, &update, &err), "begin");
    check(rrt_update_file(update, argv[2], strlen(argv[2]), &err), "file");
    check(rrt_update_commit(update, 1, &err), "commit");
    rrt_update_free(update);
    if (sample(runtime, model) != 1) return 1;

    /* 2. One tensor from memory: the last norm's weight, given as f32 and rounded to what the model holds. */
    memset(&info, 0, sizeof info);
    for (index = 0;; index++) {
        info.struct_size = sizeof info;
        check(rrt_model_tensor(model, index, &info, &err), "tensor");
        if (info.name_len == 17 && memcmp(info.name, "model.norm.weight", 17) == 0) break;
    }
    elements = (size_t)info.shape[0];
    weight = malloc(elements * sizeof *weight);
    if (weight == NULL) return 1;
    for (index = 0; index < elements; index++) weight[index] = (float)(index % 5);
    opts.expect_version = 1;
    opts.require = RRT_REQUIRE_SUBSET;
    opts.flags |= RRT_UPDATE_CONVERT;
    check(rrt_update_begin(model, &opts, &update, &err), "begin");
    desc.name = info.name;
    desc.name_len = info.name_len;
    desc.dtype = RRT_DTYPE_F32;
    desc.rank = info.rank;
    desc.shape = info.shape;
    desc.data = weight;
    desc.bytes = elements * sizeof *weight;
    check(rrt_update_tensor(update, &desc, &err), "tensor");
    free(weight); /* it was copied */
    check(rrt_update_commit(update, 2, &err), "commit");
    rrt_update_free(update);
    if (sample(runtime, model) != 2) return 1;

    rrt_model_free(model);
    check(rrt_close(runtime, 1000000000u, &err), "close");
    return 0;
}
