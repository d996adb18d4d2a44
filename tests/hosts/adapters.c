/* An adapter made from its config and updated from memory. Prints "ok".
 *
 *   adapters CLASSIFIER
 *
 * CLASSIFIER: two layers, hidden size 48, values of 2 · 8, three labels, no adapter of its own.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "checks.h"

enum { HIDDEN = 48, VALUES = 16, LABELS = 3, LAYERS = 2 };

static rrt_runtime *runtime;
static rrt_model *model;

/* The three rewards of one text. */
static uint64_t score(const rrt_adapter *adapter, float rewards[LABELS]) {
    static const uint32_t ids[6] = { 5, 17, 40, 9, 33, 70 };
    static const size_t offsets[2] = { 0, 6 };
    rrt_score_req req = RRT_SCORE_REQ_INIT;
    rrt_scores_view view;
    rrt_result *result = NULL;
    uint64_t job = 0, version;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    req.model = model;
    req.kind = RRT_SCORE_REWARD;
    req.sequences.ids = ids;
    req.sequences.offsets = offsets;
    req.sequences.count = 1;
    req.adapter = adapter;
    OK(rrt_submit_score(runtime, &req, &job, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    OK(rrt_job_take(runtime, job, &result, &err));
    OK(rrt_result_scores(result, &view, &err));
    if (failures > 0 || view.offsets[1] != LABELS) exit(1);
    memcpy(rewards, view.values, LABELS * sizeof(float));
    version = view.adapter_version[0];
    rrt_result_free(result);
    return version;
}

static rrt_status put(rrt_update *update, const char *name, uint64_t rows, uint64_t columns, const float *values) {
    rrt_tensor_desc desc = RRT_TENSOR_DESC_INIT;
    uint64_t shape[2];
    shape[0] = rows;
    shape[1] = columns;
    desc.name = name;
    desc.name_len = strlen(name);
    desc.rank = 2;
    desc.shape = shape;
    desc.data = values;
    desc.bytes = (size_t)(rows * columns) * sizeof(float);
    return rrt_update_tensor(update, &desc, &err);
}

int main(int argc, char **argv) {
    static const char config[] =
        "{\"peft_type\": \"LORA\", \"task_type\": \"SEQ_CLS\", \"r\": 1, \"lora_alpha\": 2,"
        " \"target_modules\": [\"v_proj\"], \"modules_to_save\": [\"score\"]}";
    static const char head[] = "base_model.model.score.weight";
    static float values[LABELS * HIDDEN];
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_adapter_opts with = RRT_ADAPTER_OPTS_INIT;
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_adapter *adapter = NULL;
    rrt_update *update = NULL;
    char name[128];
    float base[LABELS], before[LABELS], after[LABELS];
    uint64_t version = 0;
    int i, layer;
    if (argc != 2) return 2;

    open.device = "cpu";
    open.device_len = 3;
    OK(rrt_open(&open, &runtime, &err));
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    load.kv_tokens = 512;
    OK(rrt_model_load(runtime, &load, &model, &err));
    score(NULL, base);

    /* Not both, and not nonsense. */
    with.path = argv[1];
    with.path_len = strlen(argv[1]);
    with.config = config;
    with.config_len = sizeof config - 1;
    WANT(RRT_E_ARG, rrt_adapter_load(model, &with, &adapter, &err));
    with.path = NULL;
    with.path_len = with.config_len = 0;
    WANT(RRT_E_ARG, rrt_adapter_load(model, &with, &adapter, &err));
    with.config_len = 5;
    WANT(RRT_E_FORMAT, rrt_adapter_load(model, &with, &adapter, &err));
    with.config_len = sizeof config - 1;
    with.version = 3;
    OK(rrt_adapter_load(model, &with, &adapter, &err));
    THAT(score(adapter, before) == 3 && memcmp(before, base, sizeof base) == 0);

    opts.storage = RRT_STORAGE_IN_PLACE;
    WANT(RRT_E_UNSUPPORTED, rrt_adapter_update_begin(adapter, &opts, &update, &err));
    opts.storage = RRT_STORAGE_SHADOW;
    opts.in_flight = RRT_IN_FLIGHT_KEEP;
    WANT(RRT_E_UNSUPPORTED, rrt_adapter_update_begin(adapter, &opts, &update, &err));
    opts.in_flight = RRT_IN_FLIGHT_WAIT;
    opts.flags = RRT_UPDATE_EXPECT_VERSION;
    opts.expect_version = 2;
    WANT(RRT_E_CONFLICT, rrt_adapter_update_begin(adapter, &opts, &update, &err));
    THAT(update == NULL);

    /* Factors of zero and a head of ones: three rewards that are equal. */
    opts.expect_version = 3;
    OK(rrt_adapter_update_begin(adapter, &opts, &update, &err));
    WANT(RRT_E_UNSUPPORTED, rrt_update_delta(update, "x", 1, &version, &err));
    WANT(RRT_E_NOT_FOUND, put(update, "model.layers.0.self_attn.v_proj.weight", VALUES, HIDDEN, values));
    for (layer = 0; layer < LAYERS; layer++) {
        sprintf(name, "base_model.model.model.layers.%d.self_attn.v_proj.lora_A.weight", layer);
        OK(put(update, name, 1, HIDDEN, values));
        sprintf(name, "base_model.model.model.layers.%d.self_attn.v_proj.lora_B.weight", layer);
        OK(put(update, name, VALUES, 1, values));
    }
    WANT(RRT_E_SHAPE, rrt_update_commit(update, 4, &err));
    THAT(strstr(err.text, head) != NULL);
    WANT(RRT_E_SHAPE, put(update, head, HIDDEN, LABELS, values));
    for (i = 0; i < LABELS * HIDDEN; i++) values[i] = 1.0f;
    OK(put(update, head, LABELS, HIDDEN, values));
    OK(rrt_update_commit(update, 4, &err));
    WANT(RRT_E_CONFLICT, rrt_update_commit(update, 5, &err));
    WANT(RRT_E_CONFLICT, rrt_update_abort(update, &err));
    rrt_update_free(update);
    THAT(score(adapter, after) == 4);
    THAT(after[0] == after[1] && after[1] == after[2] && memcmp(after, base, sizeof base) != 0);
    score(NULL, before);
    THAT(memcmp(before, base, sizeof base) == 0);

    /* An update may outlive the handle of its adapter, and be given up. */
    opts.flags = 0;
    opts.require = RRT_REQUIRE_SUBSET;
    OK(rrt_adapter_update_begin(adapter, &opts, &update, &err));
    OK(put(update, head, LABELS, HIDDEN, values));
    rrt_adapter_free(adapter);
    OK(rrt_update_commit(update, 6, &err));
    rrt_update_free(update);

    rrt_model_free(model);
    OK(rrt_close(runtime, UINT64_MAX, &err));
    if (failures > 0) return 1;
    puts("ok");
    return 0;
}
