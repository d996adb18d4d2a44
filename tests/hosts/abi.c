/* What a careless host does: NULL in structs, wrong sizes, stale jobs, wrong order, fork. Prints "ok" at the end.
 *
 *   abi MODEL_FOLDER [ROUNDS] a small checkpoint without a tokenizer (tests/golden/llama-gqa-9-3)
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "checks.h"

#define CANARY ((void *)0x5a5a)

static int logged;
static void count_log(void *user_data, int32_t level, const char *text, size_t len) {
    (void)level;
    if (user_data == &logged && text != NULL && len > 0) logged++;
}

static void sizes(rrt_runtime *runtime, rrt_model *model) {
    struct { rrt_sample_req req; unsigned char beyond[16]; } big;
    uint64_t job = 77;
    uint32_t ids[3] = { 5, 6, 7 };
    size_t offsets[2] = { 0, 3 };
    memset(&big, 0, sizeof big);
    rrt_sample_req_init(&big.req);
    big.req.model = model;
    big.req.prompts.ids = ids;
    big.req.prompts.offsets = offsets;
    big.req.prompts.count = 1;
    big.req.max_new_tokens = 2;

    big.req.struct_size = 0;
    WANT(RRT_E_ABI, rrt_submit_sample(runtime, &big.req, &job, &err));
    big.req.struct_size = 3;
    WANT(RRT_E_ABI, rrt_submit_sample(runtime, &big.req, &job, &err));
    big.req.struct_size = UINT32_MAX;
    WANT(RRT_E_ABI, rrt_submit_sample(runtime, &big.req, &job, &err));
    big.req.struct_size = sizeof big;
    big.beyond[7] = 1;
    WANT(RRT_E_ABI, rrt_submit_sample(runtime, &big.req, &job, &err));
    THAT(job == 77);
    big.beyond[7] = 0;
    WANT(RRT_OK, rrt_submit_sample(runtime, &big.req, &job, &err));
    WANT(RRT_OK, rrt_wait(runtime, &job, 1, RRT_WAIT_ANY, UINT64_MAX, &err));

    big.req.flags = 0x80;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &big.req, &job, &err));
    big.req.flags = 0;
    big.req.temperature = -1.0f;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &big.req, &job, &err));
    big.req.temperature = 1.0f;
    ids[1] = 1000000;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &big.req, &job, &err));
    THAT(strstr(err.text, "1000000") != NULL);
    ids[1] = 6;
    offsets[0] = 4;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &big.req, &job, &err));
}

/* Pointers inside of structs; the others are swept by a program that is made from the header. */
static void nulls(rrt_runtime *runtime, rrt_model *model) {
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    rrt_score_req score = RRT_SCORE_REQ_INIT;
    uint64_t job = 1;
    WANT(RRT_E_NULL, rrt_submit_sample(runtime, &sample, &job, &err)); /* no model */
    sample.model = model;
    sample.prompts.count = 1;
    WANT(RRT_E_NULL, rrt_submit_sample(runtime, &sample, &job, &err)); /* no offsets */
    sample.stop_id_count = 1;
    WANT(RRT_E_NULL, rrt_submit_sample(runtime, &sample, &job, &err));
    score.model = model;
    score.sequences.count = 1;
    WANT(RRT_E_NULL, rrt_submit_score(runtime, &score, &job, &err)); /* no offsets */
    THAT(job == 1);
}

static void jobs(rrt_runtime *runtime, rrt_model *model) {
    rrt_score_req score = RRT_SCORE_REQ_INIT;
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    uint32_t ids[8] = { 9, 8, 7, 6, 10, 11, 12, 13 };
    size_t offsets[3] = { 0, 3, 8 }, prompts[2] = { 1, 0 };
    rrt_result *result = NULL;
    rrt_scores_view view;
    rrt_sequences_view wrong;
    uint64_t job = 0, both[2];
    memset(&view, 0, sizeof view);
    memset(&wrong, 0, sizeof wrong);

    score.model = model;
    score.kind = RRT_SCORE_LOGPROBS;
    score.sequences.ids = ids;
    score.sequences.offsets = offsets;
    score.sequences.count = 2;
    score.prompt_lens = prompts;
    WANT(RRT_OK, rrt_submit_score(runtime, &score, &job, &err));
    memset(ids, 0, sizeof ids); /* copied before it returned */
    WANT(RRT_OK, rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    WANT(RRT_OK, rrt_job_take(runtime, job, &result, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_take(runtime, job, &result, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_cancel(runtime, job, &err));
    WANT(RRT_E_NOT_FOUND, rrt_wait(runtime, &job, 1, 0, 0, &err));
    WANT(RRT_E_ABI, rrt_result_scores(result, &view, &err));
    view.struct_size = sizeof view;
    WANT(RRT_OK, rrt_result_scores(result, &view, &err));
    wrong.struct_size = sizeof wrong;
    WANT(RRT_E_ARG, rrt_result_sequences(result, &wrong, &err));
    THAT(view.count == 2 && view.offsets[1] == 2 && view.offsets[2] == 7);
    THAT(view.values[2] != view.values[2] && view.values[0] < 0); /* NaN first, where nothing precedes */
    WANT(RRT_E_BUSY, rrt_close(runtime, 0, &err));
    rrt_result_free(result);

    /* The rules and kinds that do not fit. */
    score.kind = 9;
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &score, &job, &err));
    score.kind = RRT_SCORE_REWARD;
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &score, &job, &err)); /* a language model has no rule of its own */

    /* Cancel: partial results. */
    sample.model = model;
    sample.flags = RRT_SAMPLE_IGNORE_EOS;
    sample.prompts = score.sequences;
    sample.n_samples = 8;
    sample.max_new_tokens = 400;
    WANT(RRT_OK, rrt_submit_sample(runtime, &sample, &both[0], &err));
    WANT(RRT_OK, rrt_submit_sample(runtime, &sample, &both[1], &err));
    WANT(RRT_PENDING, rrt_job_take(runtime, both[1], &result, &err));
    WANT(RRT_TIMEOUT, rrt_wait(runtime, both, 2, RRT_WAIT_ALL, 1000, &err));
    WANT(RRT_OK, rrt_job_cancel(runtime, both[0], &err));
    WANT(RRT_OK, rrt_job_cancel(runtime, both[0], &err));
    WANT(RRT_OK, rrt_job_cancel(runtime, both[1], &err));
    WANT(RRT_OK, rrt_wait(runtime, both, 2, RRT_WAIT_ALL, UINT64_MAX, &err));
    WANT(RRT_OK, rrt_job_take(runtime, both[1], &result, &err));
    WANT(RRT_OK, rrt_result_sequences(result, &wrong, &err));
    THAT(wrong.count == 16 && wrong.finish[15] == RRT_FINISH_CANCELLED);
    rrt_result_free(result);
    /* both[0] is left to rrt_close. */
}

/* Updates, adapters, pause and sleep: every pointer, every state. */
static void updates(rrt_runtime *runtime, rrt_model *model, const char *folder) {
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_adapter_opts adapter_opts = RRT_ADAPTER_OPTS_INIT;
    rrt_tensor_desc desc = RRT_TENSOR_DESC_INIT;
    rrt_tensor_info info;
    rrt_model_info model_info;
    rrt_update *update = NULL, *second = NULL;
    void *canary = CANARY;
    uint64_t version = 5, start[2] = { 0, 0 }, shape[2];
    size_t count = 0, bytes;
    float *data;
    memset(&info, 0, sizeof info);
    info.struct_size = sizeof info;
    model_info.struct_size = sizeof model_info;

    adapter_opts.path = "/nowhere";
    adapter_opts.path_len = 8;
    WANT(RRT_E_NOT_FOUND, rrt_adapter_load(model, &adapter_opts, (rrt_adapter **)&canary, &err));
    adapter_opts.flags = 8;
    WANT(RRT_E_ARG, rrt_adapter_load(model, &adapter_opts, (rrt_adapter **)&canary, &err));
    THAT(canary == CANARY);

    WANT(RRT_E_ARG, rrt_pause(runtime, 3, 0, &err));
    WANT(RRT_OK, rrt_pause(runtime, RRT_IN_FLIGHT_CANCEL, UINT64_MAX, &err));
    WANT(RRT_OK, rrt_resume(runtime, &err));
    WANT(RRT_E_ARG, rrt_model_sleep(model, 4, RRT_IN_FLIGHT_WAIT, UINT64_MAX, &err));
    WANT(RRT_E_ARG, rrt_model_wake(model, 0, &err));
    WANT(RRT_OK, rrt_model_sleep(model, RRT_SLEEP_WEIGHTS | RRT_SLEEP_KV_CACHE, RRT_IN_FLIGHT_WAIT, UINT64_MAX, &err));
    WANT(RRT_E_CONFLICT, rrt_update_begin(model, &opts, &update, &err));
    WANT(RRT_OK, rrt_model_wake(model, RRT_SLEEP_WEIGHTS | RRT_SLEEP_KV_CACHE, &err));

    while (rrt_model_tensor(model, count, &info, &err) == RRT_OK) count++;
    WANT(RRT_E_RANGE, rrt_model_tensor(model, count, &info, &err));
    WANT(RRT_OK, rrt_model_tensor(model, 0, &info, &err));
    THAT(count >= 10 && info.rank == 2 && memcmp(info.name, "lm_head.weight", info.name_len) == 0);

    opts.flags = 0x80;
    WANT(RRT_E_ARG, rrt_update_begin(model, &opts, &update, &err));
    opts.flags = RRT_UPDATE_EXPECT_VERSION | RRT_UPDATE_CHECK_FINITE | RRT_UPDATE_CONVERT;
    opts.expect_version = 39;
    WANT(RRT_E_CONFLICT, rrt_update_begin(model, &opts, &update, &err));
    opts.expect_version = 40;
    opts.storage = 2;
    WANT(RRT_E_ARG, rrt_update_begin(model, &opts, &update, &err));
    opts.storage = RRT_STORAGE_SHADOW;
    opts.require = RRT_REQUIRE_SUBSET;
    WANT(RRT_OK, rrt_update_begin(model, &opts, &update, &err));
    WANT(RRT_E_NULL, rrt_update_tensor(update, NULL, &err));
    WANT(RRT_E_NULL, rrt_update_delta(update, "x", 1, NULL, &err));
    WANT(RRT_E_NOT_FOUND, rrt_update_file(update, "/nowhere", 8, &err));
    WANT(RRT_E_NOT_FOUND, rrt_update_delta(update, "/nowhere", 8, &version, &err));
    bytes = (size_t)(info.shape[0] * info.shape[1]) * sizeof(float);
    data = malloc(bytes);
    if (data == NULL) exit(1);
    memset(data, 0, bytes);
    desc.name = "lm_hat.weight";
    desc.name_len = 13;
    desc.rank = 2;
    desc.shape = info.shape;
    desc.data = data;
    desc.bytes = bytes;
    WANT(RRT_E_NOT_FOUND, rrt_update_tensor(update, &desc, &err));
    THAT(strstr(err.text, "lm_hat.weight") != NULL);
    desc.name = info.name;
    desc.name_len = info.name_len;
    desc.rank = 9;
    WANT(RRT_E_ARG, rrt_update_tensor(update, &desc, &err));
    desc.rank = 1;
    WANT(RRT_E_SHAPE, rrt_update_tensor(update, &desc, &err));
    desc.rank = 2;
    desc.bytes = bytes - 1;
    WANT(RRT_E_ARG, rrt_update_tensor(update, &desc, &err));
    desc.bytes = bytes;
    desc.dtype = 3;
    WANT(RRT_E_ARG, rrt_update_tensor(update, &desc, &err));
    desc.dtype = RRT_DTYPE_F32;
    desc.checksum = (const uint8_t *)"0123456789abcdef";
    WANT(RRT_E_FORMAT, rrt_update_tensor(update, &desc, &err));
    desc.checksum = NULL;
    data[7] = INFINITY;
    WANT(RRT_E_NONFINITE, rrt_update_tensor(update, &desc, &err));
    data[7] = 0.0f;
    shape[0] = info.shape[0];
    shape[1] = info.shape[1] - 1;
    desc.shape = shape;
    desc.bytes = bytes - (size_t)shape[0] * sizeof(float);
    WANT(RRT_E_NULL, rrt_update_slice(update, &desc, NULL, &err));
    start[1] = 2;
    WANT(RRT_E_SHAPE, rrt_update_slice(update, &desc, start, &err));
    start[1] = 1;
    WANT(RRT_OK, rrt_update_slice(update, &desc, start, &err));
    WANT(RRT_E_SHAPE, rrt_update_commit(update, 41, &err)); /* a column is missing */
    shape[1] = 1;
    start[1] = 0;
    desc.bytes = (size_t)shape[0] * sizeof(float);
    WANT(RRT_OK, rrt_update_slice(update, &desc, start, &err));
    desc.shape = info.shape;
    desc.bytes = bytes;
    WANT(RRT_E_DUPLICATE, rrt_update_tensor(update, &desc, &err));
    WANT(RRT_E_ARG, rrt_update_commit(update, 40, &err));
    WANT(RRT_OK, rrt_update_begin(model, &opts, &second, &err));
    WANT(RRT_OK, rrt_update_commit(update, 41, &err));
    WANT(RRT_E_CONFLICT, rrt_update_commit(update, 42, &err));
    WANT(RRT_E_CONFLICT, rrt_update_tensor(update, &desc, &err));
    WANT(RRT_OK, rrt_update_file(second, folder, strlen(folder), &err));
    WANT(RRT_E_CONFLICT, rrt_update_commit(second, 42, &err)); /* 41 came first */
    WANT(RRT_OK, rrt_update_abort(second, &err));
    WANT(RRT_E_CONFLICT, rrt_update_abort(second, &err));
    WANT(RRT_E_CONFLICT, rrt_update_file(second, folder, strlen(folder), &err));
    WANT(RRT_E_BUSY, rrt_close(runtime, 0, &err));
    rrt_update_free(update);
    rrt_update_free(second);
    WANT(RRT_OK, rrt_get_model_info(model, &model_info, &err));
    THAT(model_info.weights_version == 41);
    free(data);
    /* In place, and back to what the folder holds. */
    opts.expect_version = 41;
    opts.storage = RRT_STORAGE_IN_PLACE;
    opts.require = RRT_REQUIRE_ALL;
    WANT(RRT_OK, rrt_update_begin(model, &opts, &update, &err));
    WANT(RRT_E_CONFLICT, rrt_update_begin(model, &opts, &second, &err));
    WANT(RRT_E_SHAPE, rrt_update_commit(update, 40, &err));
    WANT(RRT_OK, rrt_update_file(update, folder, strlen(folder), &err));
    WANT(RRT_OK, rrt_update_commit(update, 40, &err));
    rrt_update_free(update);
}

static void forked(rrt_runtime *runtime, rrt_model *model) {
    int status = 0;
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_update *update = NULL;
    pid_t child;
    opts.storage = RRT_STORAGE_IN_PLACE;
    WANT(RRT_OK, rrt_update_begin(model, &opts, &update, &err));
    child = fork();
    if (child == 0) {
        rrt_model_info info;
        info.struct_size = sizeof info;
        if (rrt_update_abort(update, NULL) != RRT_E_FORKED || rrt_resume(runtime, NULL) != RRT_E_FORKED) _exit(1);
        rrt_update_free(update); /* does not wait for an engine that is not here */
        _exit(rrt_get_model_info(model, &info, NULL) == RRT_E_FORKED && rrt_close(runtime, 0, NULL) == RRT_E_FORKED ? 0 : 1);
    }
    waitpid(child, &status, 0);
    rrt_update_free(update);
    THAT(child > 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv) {
    rrt_open_opts open_opts = RRT_OPEN_OPTS_INIT;
    rrt_model_opts model_opts = RRT_MODEL_OPTS_INIT;
    rrt_runtime *runtime = NULL;
    rrt_model *model = NULL;
    rrt_model_info info;
    rrt_device_info devices[16];
    size_t need = 0, i;
    int round, rounds = argc > 2 ? atoi(argv[2]) : 3;
    if (argc < 2) return 2;
    memset(&err, 0, sizeof err);
    THAT(strncmp(rrt_version(), "rewardrt ", 9) == 0 && strcmp(rrt_status_name(12345), "RRT_?") == 0);
    WANT(RRT_OK, rrt_abi_check(RRT_ABI_VERSION));
    THAT(rrt_abi_version() == RRT_ABI_VERSION);
    WANT(RRT_E_ABI, rrt_abi_check(0x70000u));
    WANT(RRT_E_ARG, rrt_set_log(count_log, NULL, 9, &err));
    WANT(RRT_OK, rrt_set_log(count_log, &logged, RRT_LOG_INFO, &err));
    for (i = 0; i < 16; i++) devices[i].struct_size = sizeof devices[i];
    WANT(RRT_OK, rrt_list_devices(devices, 16, sizeof devices[0], &need, &err));
    THAT(need >= 1 && devices[0].type == RRT_DEVICE_CPU);
    WANT(RRT_E_SHORT_BUFFER, rrt_list_devices(devices, 0, sizeof devices[0], &need, &err));

    open_opts.device = "gpu:no such thing";
    open_opts.device_len = strlen(open_opts.device);
    WANT(RRT_E_NO_DEVICE, rrt_open(&open_opts, &runtime, &err));
    open_opts.device = "tpu";
    open_opts.device_len = 3;
    WANT(RRT_E_ARG, rrt_open(&open_opts, &runtime, &err));
    open_opts.device = "cpu";
    for (round = 0; round < rounds; round++) {
        WANT(RRT_OK, rrt_open(&open_opts, &runtime, &err));
        model_opts.path = "/nowhere";
        model_opts.path_len = 8;
        WANT(RRT_E_NOT_FOUND, rrt_model_load(runtime, &model_opts, &model, &err));
        THAT(model == NULL);
        model_opts.path = argv[1];
        model_opts.path_len = strlen(argv[1]);
        model_opts.kv_tokens = 8192;
        model_opts.max_context = 512;
        model_opts.memory = 1000;
        WANT(RRT_E_LIMIT, rrt_model_load(runtime, &model_opts, &model, &err));
        model_opts.memory = 0;
        model_opts.precision = 7;
        WANT(RRT_E_ARG, rrt_model_load(runtime, &model_opts, &model, &err));
        model_opts.precision = RRT_PRECISION_F32;
        model_opts.steps_at_once = 65;
        WANT(RRT_E_ARG, rrt_model_load(runtime, &model_opts, &model, &err));
        model_opts.steps_at_once = 0;
        model_opts.weights = 3;
        WANT(RRT_E_ARG, rrt_model_load(runtime, &model_opts, &model, &err));
        model_opts.weights = RRT_WEIGHTS_INT4;
        WANT(RRT_OK, rrt_model_load(runtime, &model_opts, &model, &err));
        rrt_model_free(model);
        model_opts.weights = RRT_WEIGHTS_INT8;
        WANT(RRT_OK, rrt_model_load(runtime, &model_opts, &model, &err));
        rrt_model_free(model);
        model_opts.precision = RRT_PRECISION_AUTO;
        model_opts.weights = RRT_WEIGHTS_STORED;
        model_opts.weights_version = 40;
        WANT(RRT_OK, rrt_model_load(runtime, &model_opts, &model, &err));
        info.struct_size = sizeof info;
        WANT(RRT_OK, rrt_get_model_info(model, &info, &err));
        THAT(info.heads == 9 && info.weights_version == 40 && info.has_tokenizer == 0);
        nulls(runtime, model);
        sizes(runtime, model);
        jobs(runtime, model);
        updates(runtime, model, argv[1]);
        /* In a child, valgrind counts what the parent's other threads hold as lost. */
        if (getenv("ABI_NO_FORK") == NULL) forked(runtime, model);
        WANT(RRT_E_BUSY, rrt_close(runtime, 0, &err));
        rrt_model_free(model);
        model = NULL;
        WANT(RRT_OK, rrt_close(runtime, UINT64_MAX, &err));
        runtime = NULL;
    }
    WANT(RRT_OK, rrt_set_log(NULL, NULL, RRT_LOG_OFF, &err));
    THAT(logged >= rounds);
    if (failures > 0) return 1;
    puts("ok");
    return 0;
}
