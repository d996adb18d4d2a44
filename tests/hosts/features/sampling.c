/* Controls of sampling, and guides.
 *
 *   sampling MODEL CLASSIFIER */
#include "features.h"

/* Every control of sampling, by what it must do. */
static void controls(void) {
    static const uint32_t nine[1] = { 9 }, two[2] = { 7, 8 };
    static const float much[1] = { 1000.0f }, never[1] = { -INFINITY };
    rrt_sample_req req = greedy(6);
    rrt_result *plain = sample(&req), *other;
    rrt_sequences_view p = sequences(plain), v;
    rrt_topk_view top;
    uint64_t job = 0;
    uint32_t first = p.ids[0];
    size_t i;

    THAT(p.count == 1 && p.offsets[1] == 6 && p.finish[0] == RRT_FINISH_LENGTH && p.kept_offsets == NULL);
    memset(&top, 0, sizeof top);
    top.struct_size = sizeof top;
    WANT(RRT_E_ARG, rrt_result_topk(plain, &top, &err));

    req.top_logprobs = 3;
    req.speculate = 4;
    other = sample(&req);
    v = sequences(other);
    OK(rrt_result_topk(other, &top, &err));
    THAT(top.count == 6 && top.offsets[6] == 18);
    for (i = 0; i < 6; i++) {
        THAT(v.ids[i] == p.ids[i] && v.logprob[i] == p.logprob[i]);
        THAT(top.ids[3 * i] == v.ids[i] && top.logprob[3 * i] == v.logprob[i] && top.logprob[3 * i + 1] <= v.logprob[i]);
    }
    rrt_result_free(other);

    req = greedy(6);
    req.temperature = 1.0f;
    req.top_k = 5;
    req.kept_ids = 8;
    other = sample(&req);
    v = sequences(other);
    for (i = 0; i < 6; i++) {
        size_t k, found = 0;
        THAT(v.kept[i] == 5 && v.kept_offsets[i + 1] - v.kept_offsets[i] == 5 && isinf(v.ceiling[i]));
        for (k = v.kept_offsets[i]; k < v.kept_offsets[i + 1]; k++) found += v.kept_ids[k] == v.ids[i];
        THAT(found == 1 && v.sample_logprob[i] >= v.logprob[i]);
    }
    rrt_result_free(other);

    req = greedy(1);
    req.banned_ids = &first;
    req.banned_count = 1;
    other = sample(&req);
    THAT(sequences(other).ids[0] != first);
    rrt_result_free(other);

    req = greedy(6);
    req.bias_ids = &first;
    req.bias = never;
    req.bias_count = 1;
    other = sample(&req);
    for (v = sequences(other), i = 0; i < 6; i++) THAT(v.ids[i] != first);
    rrt_result_free(other);

    req = greedy(6);
    req.temperature = 1.0f;
    req.allowed_ids = two;
    req.allowed_count = 2;
    other = sample(&req);
    for (v = sequences(other), i = 0; i < 6; i++) THAT(v.ids[i] == 7 || v.ids[i] == 8);
    rrt_result_free(other);
    req.allowed_count = 0; /* an empty set leaves nothing */
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));

    req = greedy(4);
    req.bias_ids = nine;
    req.bias = much;
    req.bias_count = 1;
    other = sample(&req);
    for (v = sequences(other), i = 0; i < 4; i++) THAT(v.ids[i] == 9);
    rrt_result_free(other);
    req.presence_penalty = 2000.0f;
    other = sample(&req);
    THAT(sequences(other).ids[0] == 9 && sequences(other).ids[1] != 9);
    rrt_result_free(other);
    req.presence_penalty = 0.0f;
    req.frequency_penalty = 600.0f; /* 9 twice, then no longer */
    other = sample(&req);
    THAT(sequences(other).ids[0] == 9 && sequences(other).ids[1] == 9 && sequences(other).ids[2] != 9);
    rrt_result_free(other);
    req.frequency_penalty = 0.0f;
    req.stop_ids = nine;
    req.stop_id_count = 1;
    req.min_new_tokens = 3;
    other = sample(&req);
    v = sequences(other);
    THAT(v.finish[0] == RRT_FINISH_STOP && v.offsets[1] == 4 && v.ids[3] == 9 && v.ids[2] != 9);
    rrt_result_free(other);

    req = greedy(4);
    req.temperature = 1.0f;
    req.typical_p = 0.2f;
    other = sample(&req);
    for (v = sequences(other), i = 0; i < 4; i++) THAT(v.kept[i] < 700 && isfinite(v.ceiling[i]));
    rrt_result_free(other);

    req = greedy(5);
    req.temperature = 1.0f;
    req.best_of = 6;
    req.n_samples = 2;
    other = sample(&req);
    v = sequences(other);
    THAT(v.count == 2 && v.sample_index[0] < 6 && v.sample_index[0] != v.sample_index[1]);
    {
        double means[2] = { 0, 0 };
        for (i = 0; i < 10; i++) means[i / 5] += v.logprob[i];
        THAT(means[0] >= means[1]);
    }
    rrt_result_free(other);
    req.best_of = 1;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));
    req = greedy(5);
    req.top_logprobs = 100000;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));
    rrt_result_free(plain);
}

static void guided(int32_t kind, const char *guide, const size_t *offsets, size_t choices, const char *one, const char *other) {
    rrt_sample_req req = greedy(40);
    rrt_result *result;
    rrt_sequences_view v;
    size_t i;
    req.flags = 0;
    req.n_samples = 4;
    req.temperature = 1.0f;
    req.guide_kind = kind;
    req.guide = guide;
    req.guide_len = strlen(guide);
    req.choice_offsets = offsets;
    req.choice_count = choices;
    result = sample(&req);
    for (v = sequences(result), i = 0; i < v.count; i++) {
        const char *text = v.text + v.text_offsets[i];
        size_t len = v.text_offsets[i + 1] - v.text_offsets[i];
        THAT((len == strlen(one) && memcmp(text, one, len) == 0) || (len == strlen(other) && memcmp(text, other, len) == 0));
        THAT(v.finish[i] == RRT_FINISH_STOP);
    }
    rrt_result_free(result);
}

static void guides(void) {
    static const size_t choices[3] = { 0, 3, 7 };
    rrt_sample_req req = greedy(4);
    uint64_t job = 0;
    guided(RRT_GUIDE_CHOICES, "a.bc(d)", choices, 2, "a.b", "c(d)");
    guided(RRT_GUIDE_REGEX, "(xyz){2}|q", NULL, 0, "xyzxyz", "q");
    guided(RRT_GUIDE_JSON_SCHEMA, "{\"enum\":[true,12]}", NULL, 0, "true", "12");
    guided(RRT_GUIDE_GRAMMAR, "start: A | \"b\"\nA: \"aa\"", NULL, 0, "aa", "b");
    req.guide = "x";
    req.guide_len = 1;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err)); /* of no kind */
    req.guide_kind = 9;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));
    req.guide_kind = RRT_GUIDE_REGEX;
    req.guide = "(";
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));
    req.choice_count = 1;
    WANT(RRT_E_ARG, rrt_submit_sample(runtime, &req, &job, &err));
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    begin(argv[1], argv[2]);
    controls();
    guides();
    return end();
}
