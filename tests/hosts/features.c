/* What every function and every field does, against what the header says of it. Prints "ok".
 *
 *   features MODEL CLASSIFIER NEXT FOLLOWED
 *
 * MODEL: a small language model with a tokenizer of bytes; CLASSIFIER: one with three labels; NEXT: another checkpoint of MODEL;
 * FOLLOWED: an empty folder.
 */
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

static rrt_error err;
static int failures;
static rrt_runtime *runtime;
static rrt_model *model, *classifier;
static const uint32_t PROMPT[4] = { 5, 17, 40, 9 };
static const size_t OFFSETS[2] = { 0, 4 };

static void want(rrt_status got, rrt_status expected, int line) {
    if (got == expected) return;
    fprintf(stderr, "line %d: %s, expected %s (%s)\n", line, rrt_status_name(got), rrt_status_name(expected), err.text);
    failures++;
}
#define WANT(expected, call) want((call), (expected), __LINE__)
#define OK(call) WANT(RRT_OK, call)

static void that(int good, int line) {
    if (good) return;
    fprintf(stderr, "line %d: not so\n", line);
    failures++;
}
#define THAT(condition) that((condition), __LINE__)

/* A greedy request for one answer to PROMPT. */
static rrt_sample_req greedy(uint32_t tokens) {
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

static rrt_result *take(uint64_t job) {
    rrt_result *result = NULL;
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    OK(rrt_job_take(runtime, job, &result, &err));
    if (result == NULL) exit(1);
    return result;
}

static rrt_sequences_view sequences(const rrt_result *result) {
    rrt_sequences_view view;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    OK(rrt_result_sequences(result, &view, &err));
    return view;
}

static rrt_scores_view scores(const rrt_result *result) {
    rrt_scores_view view;
    memset(&view, 0, sizeof view);
    view.struct_size = sizeof view;
    OK(rrt_result_scores(result, &view, &err));
    return view;
}

static rrt_result *sample(const rrt_sample_req *req) {
    uint64_t job = 0;
    OK(rrt_submit_sample(runtime, req, &job, &err));
    return take(job);
}

static rrt_result *score(const rrt_score_req *req) {
    uint64_t job = 0;
    OK(rrt_submit_score(runtime, req, &job, &err));
    return take(job);
}

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

static int readable(int32_t fd) {
    struct pollfd p;
    p.fd = fd;
    p.events = POLLIN;
    p.revents = 0;
    return poll(&p, 1, 0) == 1 && (p.revents & POLLIN) != 0;
}

/* Nothing to tell: it may be readable all the same, for a moment. */
static int quiet(int32_t fd) {
    rrt_event event;
    size_t count = 0;
    int i;
    for (i = 0; i < 1000 && readable(fd); i++) {
        OK(rrt_poll(runtime, &event, 1, sizeof event, &count, &err));
        if (count > 0) return 0;
    }
    return !readable(fd);
}

/* Streams, events and the descriptor. */
static void events(void) {
    rrt_sample_req req = greedy(30);
    rrt_event list[64];
    rrt_result *result;
    rrt_sequences_view v;
    uint64_t job = 0, second = 0;
    size_t count = 9, i, told[3] = { 0, 0, 0 }, ended[3] = { 0, 0, 0 }, n;
    uint32_t ids[40];
    float logprob[40], sampled[40];
    char text[256];
    int32_t fd = -1, again = -1;
    int last = 0;

    OK(rrt_event_fd(runtime, &fd, &err));
    OK(rrt_event_fd(runtime, &again, &err));
    THAT(fd >= 0 && fd == again);
    OK(rrt_poll(runtime, list, 64, sizeof list[0], &count, &err));
    OK(rrt_poll(runtime, list, 64, sizeof list[0], &count, &err));
    THAT(count == 0 && quiet(fd));
    WANT(RRT_E_ABI, rrt_poll(runtime, list, 64, sizeof list[0] - 1, &count, &err));
    WANT(RRT_E_NULL, rrt_poll(runtime, NULL, 1, sizeof list[0], &count, &err));

    req.flags |= RRT_SAMPLE_STREAM;
    req.n_samples = 3;
    req.temperature = 1.0f;
    req.user_tag = 0x123456789abcdefu;
    OK(rrt_submit_sample(runtime, &req, &job, &err));
    while (!last) {
        struct pollfd p;
        p.fd = fd;
        p.events = POLLIN;
        THAT(poll(&p, 1, 60000) == 1);
        OK(rrt_poll(runtime, list, told[0] > 5 ? 64 : 1, sizeof list[0], &count, &err)); /* one at a time, then all */
        for (i = 0; i < count; i++) {
            const rrt_event *e = &list[i];
            THAT(e->job == job && e->user_tag == req.user_tag && !last);
            if (e->kind == RRT_EVENT_CHUNK) {
                THAT(e->status == RRT_PENDING && e->sequence < 3 && e->first == told[e->sequence] && !ended[e->sequence]);
                told[e->sequence] += e->count;
                ended[e->sequence] = e->finish >= 0;
                OK(rrt_job_peek(runtime, job, e->sequence, e->first, ids, NULL, NULL, e->count, &n, &err));
                THAT(n == e->count);
            } else {
                THAT(e->kind == RRT_EVENT_DONE && e->status == RRT_OK);
                last = 1;
            }
        }
    }
    THAT(told[0] == 30 && told[1] == 30 && told[2] == 30 && ended[0] && ended[1] && ended[2]);
    OK(rrt_poll(runtime, list, 64, sizeof list[0], &count, &err));
    THAT(count == 0 && quiet(fd));
    OK(rrt_job_peek(runtime, job, 2, 0, ids, logprob, sampled, 40, &n, &err));
    THAT(n == 30);
    WANT(RRT_E_RANGE, rrt_job_peek(runtime, job, 3, 0, ids, logprob, sampled, 40, &n, &err));
    OK(rrt_job_peek(runtime, job, 2, 31, ids, logprob, sampled, 40, &count, &err));
    THAT(count == 0);
    OK(rrt_job_peek_text(runtime, job, 2, 0, text, sizeof text, &count, &err));
    OK(rrt_job_progress(runtime, job, &i, &n, &err));
    THAT(i == 3 && n == 3);
    result = take(job);
    v = sequences(result);
    THAT(memcmp(ids, v.ids + 60, sizeof *ids * 30) == 0 && memcmp(logprob, v.logprob + 60, sizeof *logprob * 30) == 0);
    THAT(memcmp(sampled, v.sample_logprob + 60, sizeof *sampled * 30) == 0);
    THAT(count == v.text_offsets[3] - v.text_offsets[2] && memcmp(text, v.text + v.text_offsets[2], count) == 0);
    rrt_result_free(result);
    WANT(RRT_E_NOT_FOUND, rrt_job_peek(runtime, job, 0, 0, ids, logprob, sampled, 1, &n, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_peek_text(runtime, job, 0, 0, text, 1, &n, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_progress(runtime, job, &i, &n, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_drop(runtime, job, &err));

    /* A cancelled job, one that was late, one that fails, one that is dropped. */
    req.max_new_tokens = 200;
    OK(rrt_pause(runtime, RRT_IN_FLIGHT_WAIT, UINT64_MAX, &err));
    OK(rrt_runtime_state(runtime, &again, &err));
    THAT(again == RRT_STATE_PAUSED);
    OK(rrt_submit_sample(runtime, &req, &job, &err));
    OK(rrt_job_cancel(runtime, job, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    do OK(rrt_poll(runtime, list, 64, sizeof list[0], &count, &err)); while (count == 0);
    THAT(list[count - 1].kind == RRT_EVENT_CANCELLED && list[count - 1].status == RRT_OK && list[count - 1].job == job);
    result = take(job);
    v = sequences(result);
    THAT(v.finish[1] == RRT_FINISH_CANCELLED);
    /* Before its first token: arrays without elements are NULL, offsets always have one. */
    THAT(v.count == 3 && v.offsets != NULL && v.offsets[3] == 0 && v.text_offsets[3] == 0 && v.span_offsets[3] == 0);
    THAT(v.ids == NULL && v.logprob == NULL && v.sample_logprob == NULL && v.entropy == NULL && v.kept == NULL);
    THAT(v.threshold == NULL && v.ceiling == NULL && v.text == NULL && v.span_end == NULL && v.span_version == NULL);
    rrt_result_free(result);
    req.flags = RRT_SAMPLE_IGNORE_EOS;
    req.deadline_ns = 1000;
    OK(rrt_submit_sample(runtime, &req, &job, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    do OK(rrt_poll(runtime, list, 64, sizeof list[0], &count, &err)); while (count == 0);
    THAT(count == 1 && list[0].kind == RRT_EVENT_CANCELLED);
    OK(rrt_job_drop(runtime, job, &err));
    req.deadline_ns = 0;
    OK(rrt_submit_sample(runtime, &req, &job, &err));
    OK(rrt_submit_sample(runtime, &req, &second, &err));
    OK(rrt_job_drop(runtime, job, &err));
    WANT(RRT_E_NOT_FOUND, rrt_job_take(runtime, job, &result, &err));
    WANT(RRT_E_ARG, rrt_job_peek(runtime, second, 0, 0, ids, logprob, sampled, 1, &n, &err)); /* does not stream */
    OK(rrt_resume(runtime, &err));
    {
        uint64_t both[2];
        both[0] = second;
        req.max_new_tokens = 1;
        OK(rrt_submit_sample(runtime, &req, &both[1], &err));
        OK(rrt_wait(runtime, both, 2, RRT_WAIT_ANY, UINT64_MAX, &err));
        OK(rrt_job_cancel(runtime, both[0], &err));
        OK(rrt_wait(runtime, both, 2, RRT_WAIT_ALL, UINT64_MAX, &err));
        OK(rrt_job_drop(runtime, both[0], &err));
        OK(rrt_job_drop(runtime, both[1], &err));
    }
    OK(rrt_runtime_state(runtime, &again, &err));
    THAT(again == RRT_STATE_RUNNING);
    THAT(quiet(fd)); /* their events are gone with them */
}

/* A session returns what its tokens return as one prompt. */
static void sessions(void) {
    static const uint32_t more[3] = { 20, 21, 22 };
    rrt_sample_req req = greedy(5), whole = greedy(5);
    rrt_session *session = NULL, *fork = NULL;
    rrt_result *result, *again;
    rrt_sequences_view v, w;
    uint32_t tokens[32];
    size_t need = 0, offsets[2] = { 0, 12 };
    uint64_t job = 0, other = 0;

    req.prompts.count = 0;
    req.temperature = whole.temperature = 1.0f;
    req.seed = whole.seed = 3;
    OK(rrt_session_new(model, PROMPT, 4, &session, &err));
    OK(rrt_session_sample(session, &req, &job, &err));
    WANT(RRT_E_BUSY, rrt_session_append(session, more, 3, &err));
    WANT(RRT_E_BUSY, rrt_session_sample(session, &req, &other, &err));
    WANT(RRT_E_BUSY, rrt_session_fork(session, &fork, &err));
    result = take(job);
    v = sequences(result);
    again = sample(&whole);
    w = sequences(again);
    THAT(memcmp(v.ids, w.ids, 5 * sizeof *v.ids) == 0 && memcmp(v.logprob, w.logprob, 5 * sizeof *v.logprob) == 0);
    rrt_result_free(again);
    OK(rrt_session_append(session, more, 3, &err));
    WANT(RRT_E_SHORT_BUFFER, rrt_session_tokens(session, tokens, 11, &need, &err));
    THAT(need == 12);
    OK(rrt_session_tokens(session, tokens, 32, &need, &err));
    THAT(memcmp(tokens, PROMPT, sizeof PROMPT) == 0 && memcmp(tokens + 4, v.ids, 5 * sizeof *v.ids) == 0 && tokens[11] == 22);
    rrt_result_free(result);
    OK(rrt_session_fork(session, &fork, &err));
    req.model = NULL;
    OK(rrt_session_sample(session, &req, &job, &err));
    OK(rrt_session_sample(fork, &req, &other, &err));
    result = take(job);
    again = take(other);
    v = sequences(result);
    w = sequences(again);
    THAT(memcmp(v.ids, w.ids, 5 * sizeof *v.ids) == 0);
    rrt_result_free(again);
    whole.prompts.ids = tokens;
    whole.prompts.offsets = offsets;
    again = sample(&whole);
    w = sequences(again);
    THAT(memcmp(v.ids, w.ids, 5 * sizeof *v.ids) == 0 && memcmp(v.logprob, w.logprob, 5 * sizeof *v.logprob) == 0);
    rrt_result_free(again);
    rrt_result_free(result);

    req.model = classifier;
    WANT(RRT_E_ARG, rrt_session_sample(session, &req, &job, &err));
    req.model = model;
    req.prompts = whole.prompts;
    WANT(RRT_E_ARG, rrt_session_sample(session, &req, &job, &err));
    req.prompts.count = 0;
    req.n_samples = 2;
    WANT(RRT_E_ARG, rrt_session_sample(session, &req, &job, &err));
    tokens[0] = 100000;
    WANT(RRT_E_ARG, rrt_session_append(session, tokens, 1, &err));
    rrt_session_free(fork);
    rrt_session_free(session);
}

/* Scores at steps are scores of the text up to there. */
static void steps(void) {
    static const uint32_t ids[12] = { 9, 8, 7, 6, 10, 11, 8, 13, 30, 8, 32, 33 };
    static const size_t offsets[3] = { 0, 7, 12 }, positions[3] = { 1, 6, 4 }, position_offsets[3] = { 0, 2, 3 };
    static const size_t prefixes[4] = { 0, 2, 9, 14 }, lens[2] = { 2, 0 }, beyond[3] = { 1, 7, 4 };
    uint32_t texts[14];
    rrt_score_req req = RRT_SCORE_REQ_INIT;
    rrt_result *at, *whole;
    rrt_scores_view a, w;
    rrt_topk_view top;
    uint64_t job = 0;
    size_t i;

    req.model = classifier;
    req.kind = RRT_SCORE_STEP_REWARDS;
    req.sequences.ids = ids;
    req.sequences.offsets = offsets;
    req.sequences.count = 2;
    req.positions = positions;
    req.position_offsets = position_offsets;
    req.label = 2;
    at = score(&req);
    a = scores(at);
    memcpy(texts, ids, 2 * sizeof *ids);
    memcpy(texts + 2, ids, 7 * sizeof *ids);
    memcpy(texts + 9, ids + 7, 5 * sizeof *ids);
    req.kind = RRT_SCORE_REWARD;
    req.positions = NULL;
    req.position_offsets = NULL;
    req.sequences.ids = texts;
    req.sequences.offsets = prefixes;
    req.sequences.count = 3;
    whole = score(&req);
    w = scores(whole);
    THAT(a.count == 2 && a.label_count == 3 && a.offsets[1] == 6 && a.offsets[2] == 9 && w.offsets[3] == 9);
    THAT(memcmp(a.values, w.values, 9 * sizeof *a.values) == 0);
    THAT(a.position[0] == 1 && a.position[1] == 6 && a.position[2] == 4 && w.position == NULL && a.entropy == NULL);
    THAT(a.score[0] == a.values[5] && a.score[1] == a.values[8] && w.score[0] == w.values[2]);
    THAT(a.label_offsets[3] == 21 && memcmp(a.label_text, "label-0label-1label-2", 21) == 0);
    rrt_result_free(whole);
    rrt_result_free(at);

    /* Wherever a token stands, but not in the prompt. */
    req.kind = RRT_SCORE_STEP_REWARDS;
    req.sequences.ids = ids;
    req.sequences.offsets = offsets;
    req.sequences.count = 2;
    req.prompt_lens = lens;
    req.step_id = 8;
    at = score(&req);
    a = scores(at);
    THAT(a.offsets[1] == 3 && a.offsets[2] == 6 && a.position[0] == 6 && a.position[1] == 2);
    rrt_result_free(at);
    req.step_id = 99;
    at = score(&req);
    a = scores(at);
    THAT(a.offsets[2] == 0 && isnan(a.score[0]) && isnan(a.score[1]));
    THAT(a.values == NULL && a.position == NULL && a.label_offsets != NULL);
    rrt_result_free(at);

    req.label = 3;
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &req, &job, &err));
    req.label = 0;
    req.kind = RRT_SCORE_REWARD;
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &req, &job, &err)); /* it has no prompts */
    req.kind = RRT_SCORE_STEP_REWARDS;
    req.prompt_lens = NULL;
    req.positions = beyond;
    req.position_offsets = position_offsets;
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &req, &job, &err)); /* beyond the end */

    /* A judge's two tokens: probabilities, which sum to one. */
    memset(&req, 0, sizeof req);
    rrt_score_req_init(&req);
    req.model = model;
    req.kind = RRT_SCORE_STEP_REWARDS;
    req.rule = "judge:yes,no";
    req.rule_len = 12;
    req.sequences.ids = ids;
    req.sequences.offsets = offsets;
    req.sequences.count = 2;
    req.positions = positions;
    req.position_offsets = position_offsets;
    at = score(&req);
    a = scores(at);
    for (i = 0; i < 3; i++) THAT(fabsf(a.values[2 * i] + a.values[2 * i + 1] - 1.0f) < 1e-6f && a.values[2 * i] > 0);
    rrt_result_free(at);

    rrt_score_req_init(&req);
    req.model = model;
    req.kind = RRT_SCORE_LOGPROBS;
    req.sequences.ids = ids;
    req.sequences.offsets = offsets;
    req.sequences.count = 2;
    req.top_logprobs = 2;
    at = score(&req);
    a = scores(at);
    memset(&top, 0, sizeof top);
    top.struct_size = sizeof top;
    OK(rrt_result_topk(at, &top, &err));
    THAT(a.offsets[1] == 7 && isnan(a.values[0]) && isnan(a.entropy[0]) && a.entropy[1] > 0 && a.label_count == 0);
    THAT(top.count == 12 && top.offsets[1] == 0 && top.offsets[2] == 2 && top.logprob[0] >= a.values[1]);
    {
        double sum = 0;
        for (i = 1; i < 7; i++) sum += a.values[i];
        THAT(fabs(sum - a.score[0]) < 1e-4);
    }
    rrt_result_free(at);
    req.rule = "sequence";
    WANT(RRT_E_ARG, rrt_submit_score(runtime, &req, &job, &err));
}

static void rollouts(const char *folder) {
    rrt_runtime *elsewhere = NULL;
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_model *reference = NULL;
    rrt_sample_req policy = greedy(6);
    rrt_reward judges[2] = { RRT_REWARD_INIT, RRT_REWARD_INIT };
    rrt_rollout_req req = RRT_ROLLOUT_REQ_INIT;
    rrt_rollout_view r;
    rrt_job_timing timing;
    rrt_event event;
    rrt_result *result = NULL;
    rrt_sequences_view v;
    uint64_t job = 0;
    size_t i, count = 0;
    double total = 0;

    memset(&r, 0, sizeof r);
    memset(&timing, 0, sizeof timing);
    r.struct_size = sizeof r;
    timing.struct_size = sizeof timing;
    open.device = "cpu";
    open.device_len = 3;
    OK(rrt_open(&open, &elsewhere, &err));
    load.path = folder;
    load.path_len = strlen(folder);
    OK(rrt_model_load(elsewhere, &load, &reference, &err));
    policy.temperature = 1.0f;
    policy.n_samples = 4;
    policy.user_tag = 5;
    for (i = 0; i < 2; i++) {
        judges[i].model = model;
        judges[i].rule = "judge:yes,no";
        judges[i].rule_len = 12;
        judges[i].question = i == 0 ? "{prompt} {answer}?" : "{answer}!";
        judges[i].question_len = strlen(judges[i].question);
    }
    judges[1].weight = -0.5f;
    judges[1].label = 1;
    req.sample = &policy;
    req.reference = reference;
    req.rewards = judges;
    req.reward_count = 2;
    req.advantage = RRT_ADVANTAGE_LEAVE_ONE_OUT;
    WANT(RRT_E_ARG, rrt_submit_sample(elsewhere, &policy, &job, &err)); /* another runtime's model */
    OK(rrt_rollout(runtime, &req, &job, &err));
    WANT(RRT_E_BUSY, rrt_close(elsewhere, 0, &err));
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    do OK(rrt_poll(runtime, &event, 1, sizeof event, &count, &err)); while (count == 0);
    THAT(event.kind == RRT_EVENT_DONE && event.job == job && event.user_tag == 5);
    rrt_model_free(reference);
    WANT(RRT_E_BUSY, rrt_close(elsewhere, 0, &err)); /* the job has it */
    OK(rrt_job_take(runtime, job, &result, &err));
    OK(rrt_close(elsewhere, UINT64_MAX, &err));
    v = sequences(result);
    OK(rrt_result_rollout(result, &r, &err));
    OK(rrt_result_timing(result, &timing, &err));
    THAT(timing.sampled_tokens == 24 && timing.count == 4 && timing.elapsed_ns > 0);
    THAT(r.count == 4 && r.reward_count == 2 && r.group_count == 1);
    for (i = 0; i < 24; i++) THAT(r.ref_logprob[i] == v.logprob[i] && r.kl1[i] == 0 && r.kl2[i] == 0 && r.kl3[i] == 0);
    for (i = 0; i < 4; i++) {
        THAT(fabs(r.reward[i] - (r.rewards[i] - 0.5 * r.rewards[4 + i])) < 1e-6);
        total += r.reward[i];
    }
    for (i = 0; i < 4; i++) THAT(fabs(r.advantage[i] - (r.reward[i] - (total - r.reward[i]) / 3)) < 1e-5);
    THAT(r.reward[r.group_best[0]] > r.reward[r.group_worst[0]] && r.group_zero_variance[0] == 0);
    THAT(fabs(r.group_mean[0] - total / 4) < 1e-6);
    rrt_result_free(result);

    req.reference = NULL;
    req.flags = RRT_ROLLOUT_CLIP_REWARD;
    req.clip_low = req.clip_high = 0.25f;
    OK(rrt_rollout(runtime, &req, &job, &err));
    result = take(job);
    OK(rrt_result_rollout(result, &r, &err));
    THAT(r.reward[3] == 0.25f && r.group_zero_variance[0] == 1 && r.group_best[0] == UINT32_MAX);
    THAT(r.ref_logprob == NULL && r.kl3 == NULL);
    WANT(RRT_E_ARG, rrt_result_topk(result, (rrt_topk_view *)&r, &err));
    rrt_result_free(result);

    req.flags = 4;
    WANT(RRT_E_ARG, rrt_rollout(runtime, &req, &job, &err));
    req.flags = 0;
    req.advantage = 5;
    WANT(RRT_E_ARG, rrt_rollout(runtime, &req, &job, &err));
    req.advantage = 0;
    policy.flags |= RRT_SAMPLE_STREAM;
    WANT(RRT_E_ARG, rrt_rollout(runtime, &req, &job, &err));
    policy.flags = 0;
    judges[1].struct_size = 3;
    WANT(RRT_E_ABI, rrt_rollout(runtime, &req, &job, &err));
    judges[1].struct_size = sizeof judges[1];
    policy.struct_size = 3;
    WANT(RRT_E_ABI, rrt_rollout(runtime, &req, &job, &err));
    policy.struct_size = sizeof policy;
    req.sample = NULL;
    WANT(RRT_E_NULL, rrt_rollout(runtime, &req, &job, &err));
    req.sample = &policy;

    /* A reward model of another vocabulary and without a tokenizer, which could not read the answers. */
    judges[1] = judges[0];
    judges[1].model = classifier;
    judges[1].rule = judges[1].question = NULL;
    WANT(RRT_E_ARG, rrt_rollout(runtime, &req, &job, &err));
    THAT(strstr(err.text, "reward 1") != NULL);
    req.reward_count = 1;
    OK(rrt_rollout(runtime, &req, &job, &err));
    OK(rrt_job_cancel(runtime, job, &err));
    OK(rrt_job_drop(runtime, job, &err));
}

/* A job that fails: the weights are gone before its turn comes. */
static void failing(const char *folder) {
    rrt_update_opts opts = RRT_UPDATE_OPTS_INIT;
    rrt_sample_req req = greedy(4);
    rrt_update *update = NULL;
    rrt_result *result = NULL;
    rrt_event event;
    uint64_t job = 0;
    size_t count = 0;

    opts.storage = RRT_STORAGE_IN_PLACE;
    OK(rrt_update_begin(model, &opts, &update, &err));
    OK(rrt_update_file(update, folder, strlen(folder), &err));
    OK(rrt_submit_sample(runtime, &req, &job, &err));
    OK(rrt_update_abort(update, &err));
    rrt_update_free(update);
    OK(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err));
    do OK(rrt_poll(runtime, &event, 1, sizeof event, &count, &err)); while (count == 0 || event.job != job);
    THAT(event.kind == RRT_EVENT_FAILED && event.status == RRT_E_CONFLICT);
    WANT(RRT_E_CONFLICT, rrt_job_take(runtime, job, &result, &err));
    THAT(err.len > 0);
    WANT(RRT_E_NOT_FOUND, rrt_job_take(runtime, job, &result, &err));
    OK(rrt_update_begin(model, &opts, &update, &err));
    OK(rrt_update_file(update, folder, strlen(folder), &err));
    OK(rrt_update_commit(update, 1, &err));
    rrt_update_free(update);
}

/* Numbers, memory, text, and a folder that is followed. */
static void the_rest(const char *folder, const char *next, const char *followed) {
    rrt_memory memory, of_model;
    rrt_timing timing;
    rrt_limits limits;
    rrt_model_info info;
    rrt_tokenizer *tokenizer = NULL;
    rrt_follower *follower = NULL;
    rrt_follow_opts follow = RRT_FOLLOW_OPTS_INIT;
    rrt_update_opts how = RRT_UPDATE_OPTS_INIT;
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_sample_req req = greedy(8);
    rrt_runtime *small = NULL;
    rrt_model *alone = NULL;
    rrt_message message = { "user", 4, "hi", 2 };
    rrt_result *before, *after;
    char text[128], path[4096];
    uint64_t job = 0, second = 0, updates = 0;
    size_t need = 0;

    memset(&memory, 0, sizeof memory);
    memset(&of_model, 0, sizeof of_model);
    memset(&timing, 0, sizeof timing);
    memset(&limits, 0, sizeof limits);
    memset(&info, 0, sizeof info);
    memory.struct_size = of_model.struct_size = sizeof memory;
    timing.struct_size = sizeof timing;
    limits.struct_size = sizeof limits;
    info.struct_size = sizeof info;
    OK(rrt_get_limits(&limits, &err));
    THAT(limits.max_sequences == 65536 && limits.max_top_logprobs == 128 && limits.max_rank == 8);
    OK(rrt_get_model_info(model, &info, &err));
    THAT(info.eos_count == 1 && info.eos_ids[0] == 2 && info.pad_id == 0 && info.asleep == 0);
    THAT(info.architecture_len == 16 && memcmp(info.architecture, "LlamaForCausalLM", 16) == 0);
    OK(rrt_runtime_device(runtime, text, sizeof text, &need, &err));
    THAT(need > 5 && memcmp(text, "cpu (", 5) == 0);
    WANT(RRT_E_SHORT_BUFFER, rrt_runtime_device(runtime, text, 1, &need, &err));

    OK(rrt_tokenizer_load(folder, strlen(folder), &tokenizer, &err));
    OK(rrt_chat_render(tokenizer, &message, 1, sizeof message, RRT_ADD_GENERATION_PROMPT, text, sizeof text, &need, &err));
    THAT(need == 20 && memcmp(text, "user: hi\nassistant: ", 20) == 0);
    OK(rrt_chat_render(tokenizer, &message, 1, sizeof message, 0, text, sizeof text, &need, &err));
    THAT(need == 9);
    WANT(RRT_E_ABI, rrt_chat_render(tokenizer, &message, 1, 8, 0, text, sizeof text, &need, &err));
    rrt_tokenizer_free(tokenizer);

    before = sample(&req);
    OK(rrt_timing_stats(runtime, &timing, &err));
    THAT(timing.steps > 0 && timing.sampled_tokens > 8 && timing.submitted > 10 && timing.step_ns > 0 && timing.kv_blocks > 0);
    THAT(timing.jobs == 0 && timing.queued_tokens == 0 && timing.kv_cached > 0);
    OK(rrt_stats_reset(runtime, &err));
    OK(rrt_timing_stats(runtime, &timing, &err));
    THAT(timing.steps == 0 && timing.sampled_tokens == 0 && timing.submitted == 0 && timing.kv_cached > 0);
    OK(rrt_trim(runtime, &err));
    OK(rrt_timing_stats(runtime, &timing, &err));
    after = sample(&req);
    THAT(memcmp(sequences(before).ids, sequences(after).ids, 8 * sizeof(uint32_t)) == 0);
    THAT(memcmp(sequences(before).logprob, sequences(after).logprob, 8 * sizeof(float)) == 0);
    rrt_result_free(after);
    OK(rrt_model_timing(model, &timing, &err));
    THAT(timing.sampled_tokens == 8 && timing.prefill_rows == 4 && timing.decode_rows == 7 && timing.submitted == 0);

    OK(rrt_memory_stats(runtime, &memory, &err));
    OK(rrt_model_memory(model, &of_model, &err));
    THAT(memory.models == 2 && of_model.models == 1 && memory.allocated > of_model.allocated && memory.budget == UINT64_MAX);
    THAT(of_model.allocated == of_model.weights + of_model.kv_cache + of_model.scratch + of_model.host + of_model.adapters);

    /* Retained, it outlives one free. */
    OK(rrt_model_retain(model, &err));
    rrt_model_free(model);
    OK(rrt_get_model_info(model, &info, &err));

    /* A queue of one. */
    open.device = "cpu";
    open.device_len = 3;
    open.max_jobs = 1;
    OK(rrt_open(&open, &small, &err));
    load.path = folder;
    load.path_len = strlen(folder);
    load.steps_at_once = 65;
    WANT(RRT_E_ARG, rrt_model_load(small, &load, &alone, &err));
    load.steps_at_once = 2;
    OK(rrt_model_load(small, &load, &alone, &err));
    req.model = alone;
    OK(rrt_pause(small, RRT_IN_FLIGHT_WAIT, UINT64_MAX, &err));
    OK(rrt_submit_sample(small, &req, &job, &err));
    WANT(RRT_E_FULL, rrt_submit_sample(small, &req, &second, &err));
    OK(rrt_timing_stats(small, &timing, &err));
    THAT(timing.jobs == 1 && timing.refused == 1 && timing.queued_tokens > 0 && second == 0);
    rrt_model_free(alone);
    OK(rrt_close(small, UINT64_MAX, &err)); /* with a job that nobody took */

    follow.interval_ns = 0; /* the usual one */
    OK(rrt_follow(model, followed, strlen(followed), &follow, &follower, &err));
    OK(rrt_follower_wait(follower, 0, 0, &err)); /* what it has */
    WANT(RRT_TIMEOUT, rrt_follower_wait(follower, 3, 1000000, &err));
    snprintf(path, sizeof path, "%s/step_3", followed);
    THAT(rename(next, path) == 0);
    OK(rrt_follower_wait(follower, 3, UINT64_MAX, &err));
    OK(rrt_follower_state(follower, &updates, &err));
    THAT(updates == 1);
    rrt_follower_free(follower);
    follow.update = &how;
    how.struct_size = 3;
    WANT(RRT_E_ABI, rrt_follow(model, followed, strlen(followed), &follow, &follower, &err));
    req.model = model;
    after = sample(&req);
    THAT(sequences(after).version[0] == 3 && memcmp(sequences(before).logprob, sequences(after).logprob, 8 * sizeof(float)) != 0);
    rrt_result_free(after);
    rrt_result_free(before);
}

int main(int argc, char **argv) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    if (argc != 5) return 2;
    open.device = "cpu";
    open.device_len = 3;
    OK(rrt_open(&open, &runtime, &err));
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    load.kv_tokens = 4096;
    OK(rrt_model_load(runtime, &load, &model, &err));
    load.path = argv[2];
    load.path_len = strlen(argv[2]);
    OK(rrt_model_load(runtime, &load, &classifier, &err));
    controls();
    guides();
    events();
    sessions();
    steps();
    rollouts(argv[1]);
    failing(argv[1]);
    the_rest(argv[1], argv[3], argv[4]);
    rrt_model_free(model);
    rrt_model_free(classifier);
    OK(rrt_close(runtime, UINT64_MAX, &err));
    if (failures > 0) return 1;
    puts("ok");
    return 0;
}
