/* Scores at steps, and rollouts.
 *
 *   scoring MODEL CLASSIFIER */
#include "features.h"

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

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    begin(argv[1], argv[2]);
    steps();
    rollouts(argv[1]);
    return end();
}
