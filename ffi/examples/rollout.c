/* One step's data for online RL: answers, KL to a reference, rewards from a judge, GRPO's advantages.
 *
 *   cc rollout.c $(pkg-config --cflags --libs rewardrt) && ./a.out POLICY_FOLDER JUDGE_FOLDER [DEVICE]
 *
 * The reference is the policy's own folder: the two share its mapped pages, and KL is zero to the bit until the policy
 * is updated.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

#define PROMPTS 2
#define SAMPLES 4
#define MAX_IDS 4096

static rrt_error err;

static void check(rrt_status status, const char *what) {
    if (status != RRT_OK) {
        fprintf(stderr, "%s: %s: %s\n", what, rrt_status_name(status), err.text);
        exit(1);
    }
}

static rrt_model *load(rrt_runtime *runtime, const char *folder) {
    rrt_model_opts opts = RRT_MODEL_OPTS_INIT;
    rrt_model *model = NULL;
    opts.path = folder;
    opts.path_len = strlen(folder);
    opts.kv_tokens = 4096;
    check(rrt_model_load(runtime, &opts, &model, &err), folder);
    return model;
}

int main(int argc, char **argv) {
    static const char *const questions[PROMPTS] = { "What is the capital of France?", "What is 2 + 3?" };
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_sample_req sample = RRT_SAMPLE_REQ_INIT;
    rrt_reward judge = RRT_REWARD_INIT;
    rrt_rollout_req req = RRT_ROLLOUT_REQ_INIT;
    rrt_message messages[PROMPTS];
    rrt_runtime *runtime = NULL;
    rrt_model *policy, *reference, *judge_model;
    rrt_tokenizer *tokenizer = NULL;
    rrt_result *result = NULL;
    rrt_sequences_view a;
    rrt_rollout_view r;
    static uint32_t ids[MAX_IDS];
    size_t offsets[PROMPTS + 1] = { 0 }, message_offsets[PROMPTS + 1] = { 0 }, i, t;
    uint64_t job = 0;

    if (argc < 3) {
        fprintf(stderr, "usage: %s POLICY_FOLDER JUDGE_FOLDER [DEVICE]\n", argv[0]);
        return 2;
    }
    memset(&a, 0, sizeof a);
    memset(&r, 0, sizeof r);
    if (argc > 3) {
        open.device = argv[3];
        open.device_len = strlen(argv[3]);
    }
    check(rrt_abi_check(RRT_ABI_VERSION), "this header and this library do not fit");
    check(rrt_open(&open, &runtime, &err), "open");
    policy = load(runtime, argv[1]);
    reference = load(runtime, argv[1]);
    judge_model = load(runtime, argv[2]);
    check(rrt_tokenizer_load(argv[1], strlen(argv[1]), &tokenizer, &err), "tokenizer");

    for (i = 0; i < PROMPTS; i++) {
        size_t need = 0;
        messages[i].role = "user";
        messages[i].role_len = 4;
        messages[i].content = questions[i];
        messages[i].content_len = strlen(questions[i]);
        check(rrt_chat_encode(tokenizer, &messages[i], 1, sizeof messages[i], RRT_ADD_GENERATION_PROMPT, ids + offsets[i],
                              MAX_IDS - offsets[i], &need, &err), "encode");
        offsets[i + 1] = offsets[i] + need;
        message_offsets[i + 1] = i + 1; /* each conversation is one message */
    }
    sample.model = policy;
    sample.prompts.ids = ids;
    sample.prompts.offsets = offsets;
    sample.prompts.count = PROMPTS;
    sample.n_samples = SAMPLES;
    sample.max_new_tokens = 16;

    judge.model = judge_model;
    judge.name = "judge";
    judge.name_len = 5;
    judge.rule = "judge:yes,no";
    judge.rule_len = strlen(judge.rule);
    judge.question = "Q: {prompt}\nA: {answer}\nIs that right? yes or no";
    judge.question_len = strlen(judge.question);

    req.sample = &sample;
    req.reference = reference;
    req.rewards = &judge;
    req.reward_count = 1;
    req.messages = messages;
    req.message_offsets = message_offsets;
    req.advantage = RRT_ADVANTAGE_GROUP;
    check(rrt_rollout(runtime, &req, &job, &err), "rollout");
    check(rrt_wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err), "wait");
    check(rrt_job_take(runtime, job, &result, &err), "take");

    a.struct_size = sizeof a;
    r.struct_size = sizeof r;
    check(rrt_result_sequences(result, &a, &err), "sequences");
    check(rrt_result_rollout(result, &r, &err), "rollout view");
    for (i = 0; i < a.count; i++) {
        double kl = 0;
        for (t = a.offsets[i]; t < a.offsets[i + 1]; t++) kl += r.kl3[t];
        printf("prompt %u  reward %.4f  advantage %7.3f  kl %g\n", a.prompt_index[i], r.reward[i], r.advantage[i], kl);
        if (kl != 0) return 1;
    }
    for (i = 0; i < r.group_count; i++) {
        printf("group %u  mean %.4f  std %.4f", (unsigned)i, r.group_mean[i], r.group_std[i]);
        if (r.group_zero_variance[i]) printf("  nothing to learn\n");
        else printf("  best %u  worst %u\n", r.group_best[i], r.group_worst[i]);
    }

    rrt_result_free(result);
    rrt_tokenizer_free(tokenizer);
    rrt_model_free(judge_model);
    rrt_model_free(reference);
    rrt_model_free(policy);
    check(rrt_close(runtime, UINT64_MAX, &err), "close");
    return 0;
}
