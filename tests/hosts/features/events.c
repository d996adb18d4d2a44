/* Streams, events, the descriptor, sessions.
 *
 *   events MODEL CLASSIFIER */
#include <poll.h>

#include "features.h"

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

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    begin(argv[1], argv[2]);
    events();
    sessions();
    return end();
}
