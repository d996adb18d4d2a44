/* Weights that fail and change, numbers, memory, text.
 *
 *   upkeep MODEL CLASSIFIER NEXT FOLLOWED
 *
 * NEXT: another checkpoint of MODEL; FOLLOWED: an empty folder. */
#include "features.h"

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
    THAT(timing.steps > 0 && timing.sampled_tokens == 8 && timing.submitted == 2 && timing.step_ns > 0 && timing.kv_blocks > 0);
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
    if (argc != 5) return 2;
    begin(argv[1], argv[2]);
    failing(argv[1]);
    the_rest(argv[1], argv[3], argv[4]);
    return end();
}
