/* Streams answers as they are sampled, in one thread that sleeps until there is something to read.
 *
 *   cc stream.c $(pkg-config --cflags --libs rewardrt) && ./a.out MODEL_FOLDER [DEVICE]
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

#define ANSWERS 3
#define EVENTS 16

static rrt_error err;

static void check(rrt_status status, const char *what) {
    if (status != RRT_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rrt_status_name(status), err.text);
        exit(1);
    }
}

/* What has come of an answer so far. */
typedef struct answer {
    char text[4096];
    size_t text_len;
    size_t tokens;
} answer;

int main(int argc, char **argv) {
    const char *question = "Name three colours.";
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_sample_req req = RRT_SAMPLE_REQ_INIT;
    rrt_message ask;
    rrt_runtime *runtime = NULL;
    rrt_model *model = NULL;
    rrt_tokenizer *tokenizer = NULL;
    rrt_result *result = NULL;
    rrt_sequences_view view;
    static answer answers[ANSWERS];
    static uint32_t ids[4096];
    size_t offsets[2] = { 0, 0 }, i;
    uint64_t job = 0;
    struct pollfd waiting;
    int32_t fd = -1;
    int done = 0;

    if (argc < 2) {
        fprintf(stderr, "usage: %s MODEL_FOLDER [DEVICE]\n", argv[0]);
        return 2;
    }
    memset(&view, 0, sizeof view);
    if (argc > 2) {
        open.device = argv[2];
        open.device_len = strlen(argv[2]);
    }
    check(rrt_abi_check(RRT_ABI_VERSION), "this header and this library do not fit");
    check(rrt_open(&open, &runtime, &err), "open");
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    check(rrt_model_load(runtime, &load, &model, &err), "load");
    check(rrt_tokenizer_load(argv[1], strlen(argv[1]), &tokenizer, &err), "tokenizer");
    check(rrt_event_fd(runtime, &fd, &err), "event fd");

    ask.role = "user";
    ask.role_len = 4;
    ask.content = question;
    ask.content_len = strlen(question);
    check(rrt_chat_encode(tokenizer, &ask, 1, sizeof ask, RRT_ADD_GENERATION_PROMPT, ids, 4096, &offsets[1], &err), "encode");
    req.flags = RRT_SAMPLE_STREAM;
    req.model = model;
    req.prompts.ids = ids;
    req.prompts.offsets = offsets;
    req.prompts.count = 1;
    req.n_samples = ANSWERS;
    req.max_new_tokens = 24;
    req.temperature = 0.7f;
    req.user_tag = 42;
    check(rrt_submit_sample(runtime, &req, &job, &err), "submit");

    waiting.fd = fd;
    waiting.events = POLLIN;
    while (!done) {
        rrt_event events[EVENTS];
        size_t count = 0;
        poll(&waiting, 1, -1);
        check(rrt_poll(runtime, events, EVENTS, sizeof events[0], &count, &err), "poll");
        for (i = 0; i < count; i++) {
            const rrt_event *event = &events[i];
            answer *a = &answers[event->sequence];
            size_t more = 0;
            if (event->job != job || event->user_tag != 42) return 1;
            if (event->kind != RRT_EVENT_CHUNK) { /* the last one */
                done = 1;
                continue;
            }
            check(rrt_job_peek_text(runtime, job, event->sequence, a->text_len, a->text + a->text_len,
                                    sizeof a->text - a->text_len, &more, &err), "peek");
            printf("[%u] %.*s\n", event->sequence, (int)more, a->text + a->text_len);
            a->text_len += more;
            a->tokens += event->count;
        }
    }

    /* The result has the same, and the rest: log-probs, why each ended, which weights sampled it. */
    check(rrt_job_take(runtime, job, &result, &err), "take");
    view.struct_size = sizeof view;
    check(rrt_result_sequences(result, &view, &err), "sequences");
    for (i = 0; i < view.count; i++) {
        size_t len = view.text_offsets[i + 1] - view.text_offsets[i];
        if (answers[i].tokens != view.offsets[i + 1] - view.offsets[i] || answers[i].text_len != len ||
            memcmp(answers[i].text, view.text + view.text_offsets[i], len) != 0) {
            fprintf(stderr, "answer %u was streamed in another way than it was returned\n", (unsigned)i);
            return 1;
        }
        printf("answer %u: %u tokens, finish %d\n", (unsigned)i, (unsigned)answers[i].tokens, (int)view.finish[i]);
    }

    rrt_result_free(result);
    rrt_tokenizer_free(tokenizer);
    rrt_model_free(model);
    check(rrt_close(runtime, UINT64_MAX, &err), "close");
    return 0;
}
