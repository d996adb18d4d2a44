/* Forgets a session that the library made, so that a leak has to be found; with a second argument it does not.
 *
 *   leak MODEL_FOLDER [CLEAN]
 */
#include <stdio.h>
#include <string.h>

#include "rewardrt.h"

/* In a function of its own, so that no register keeps the pointer. */
static __attribute__((noinline)) rrt_status forget(rrt_model *model, int clean) {
    static const uint32_t ids[3] = { 5, 6, 7 };
    rrt_session *session = NULL;
    rrt_status status = rrt_session_new(model, ids, 3, &session, NULL);
    if (clean) rrt_session_free(session);
    return status;
}

int main(int argc, char **argv) {
    rrt_open_opts open = RRT_OPEN_OPTS_INIT;
    rrt_model_opts load = RRT_MODEL_OPTS_INIT;
    rrt_runtime *runtime = NULL;
    rrt_model *model = NULL;
    rrt_error err;
    if (argc < 2) return 2;
    open.device = "cpu";
    open.device_len = 3;
    load.path = argv[1];
    load.path_len = strlen(argv[1]);
    if (rrt_open(&open, &runtime, &err) != RRT_OK || rrt_model_load(runtime, &load, &model, &err) != RRT_OK) return 1;
    if (forget(model, argc > 2) != RRT_OK) return 1;
    rrt_model_free(model);
    /* What was forgotten is still alive. */
    if (rrt_close(runtime, UINT64_MAX, &err) != (argc > 2 ? RRT_OK : RRT_E_BUSY)) return 1;
    puts("ok");
    fflush(stdout); /* the sanitizer ends the process before the buffer is written */
    return 0;
}
