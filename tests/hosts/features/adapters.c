/* An adapter made from its config and updated from memory.
 *
 *   adapters MODEL CLASSIFIER
 *
 * CLASSIFIER has two layers, hidden size 48 and values of 2 · 8. */
#include "features.h"

enum { HIDDEN = 48, VALUES = 16, LABELS = 3, LAYERS = 2 };

/* The three rewards of one text. */
static uint64_t rewards_of(const rrt_adapter *adapter, float rewards[LABELS]) {
    rrt_score_req req = RRT_SCORE_REQ_INIT;
    rrt_scores_view view;
    rrt_result *result;
    uint64_t version;
    req.model = classifier;
    req.kind = RRT_SCORE_REWARD;
    req.sequences.ids = PROMPT;
    req.sequences.offsets = OFFSETS;
    req.sequences.count = 1;
    req.adapter = adapter;
    result = score(&req);
    view = scores(result);
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
    rrt_adapter_opts with = RRT_ADAPTER_OPTS_INIT;
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_adapter *adapter = NULL;
    rrt_update *update = NULL;
    char name[128];
    float base[LABELS], before[LABELS], after[LABELS];
    uint64_t version = 0;
    int i, layer;
    if (argc != 3) return 2;
    begin(argv[1], argv[2]);
    rewards_of(NULL, base);

    /* Not both, and not nonsense. */
    with.path = argv[1];
    with.path_len = strlen(argv[1]);
    with.config = config;
    with.config_len = sizeof config - 1;
    WANT(RRT_E_ARG, rrt_adapter_load(classifier, &with, &adapter, &err));
    with.path = NULL;
    with.path_len = with.config_len = 0;
    WANT(RRT_E_ARG, rrt_adapter_load(classifier, &with, &adapter, &err));
    with.config_len = 5;
    WANT(RRT_E_FORMAT, rrt_adapter_load(classifier, &with, &adapter, &err));
    with.config_len = sizeof config - 1;
    with.version = 3;
    OK(rrt_adapter_load(classifier, &with, &adapter, &err));
    THAT(rewards_of(adapter, before) == 3 && memcmp(before, base, sizeof base) == 0);

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
    THAT(rewards_of(adapter, after) == 4);
    THAT(after[0] == after[1] && after[1] == after[2] && memcmp(after, base, sizeof base) != 0);
    rewards_of(NULL, before);
    THAT(memcmp(before, base, sizeof base) == 0);

    /* An update may outlive the handle of its adapter. */
    opts.flags = 0;
    opts.require = RRT_REQUIRE_SUBSET;
    OK(rrt_adapter_update_begin(adapter, &opts, &update, &err));
    OK(put(update, head, LABELS, HIDDEN, values));
    rrt_adapter_free(adapter);
    OK(rrt_update_commit(update, 6, &err));
    rrt_update_free(update);

    return end();
}
