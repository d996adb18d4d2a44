/* Loads the library by name, works with it and unloads it, twice. Prints "ok".
 *
 *   unload LIBRARY MODEL_FOLDER
 */
#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rewardrt.h"

/* Threads of this process. */
static int threads(void) {
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;
    struct dirent *entry;
    if (tasks == NULL) return -1;
    while ((entry = readdir(tasks)) != NULL) count += entry->d_name[0] != '.';
    closedir(tasks);
    return count;
}

static void *find(void *library, const char *name) {
    void *function = dlsym(library, name);
    if (function == NULL) {
        fprintf(stderr, "%s: %s\n", name, dlerror());
        exit(1);
    }
    return function;
}

/* POSIX's way from a pointer to an object to one to a function. */
#define FIND(name) (*(void **)&name = find(library, "rrt_" #name))

int main(int argc, char **argv) {
    rrt_status (*abi_check)(uint32_t);
    rrt_status (*open)(const rrt_open_opts *, rrt_runtime **, rrt_error *);
    rrt_status (*close)(rrt_runtime *, uint64_t, rrt_error *);
    rrt_status (*model_load)(rrt_runtime *, const rrt_model_opts *, rrt_model **, rrt_error *);
    void (*model_free)(rrt_model *);
    rrt_status (*submit_sample)(rrt_runtime *, const rrt_sample_req *, uint64_t *, rrt_error *);
    rrt_status (*wait)(rrt_runtime *, const uint64_t *, size_t, uint32_t, uint64_t, rrt_error *);
    rrt_status (*event_fd)(rrt_runtime *, int32_t *, rrt_error *);
    int round;
    if (argc != 3) return 2;
    for (round = 0; round < 2; round++) {
        static const uint32_t ids[2] = { 5, 17 };
        static const size_t offsets[2] = { 0, 2 };
        rrt_open_opts opts = RRT_OPEN_OPTS_INIT;
        rrt_model_opts load = RRT_MODEL_OPTS_INIT;
        rrt_sample_req req = RRT_SAMPLE_REQ_INIT;
        rrt_runtime *runtime = NULL;
        rrt_model *model = NULL;
        rrt_error err;
        uint64_t job = 0;
        int32_t fd = -1;
        void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        FIND(abi_check); FIND(open); FIND(close); FIND(model_load); FIND(model_free);
        FIND(submit_sample); FIND(wait); FIND(event_fd);
        opts.device = "cpu";
        opts.device_len = 3;
        load.path = argv[2];
        load.path_len = strlen(argv[2]);
        req.prompts.ids = ids;
        req.prompts.offsets = offsets;
        req.prompts.count = 1;
        req.max_new_tokens = 4;
        if (abi_check(RRT_ABI_VERSION) != RRT_OK || open(&opts, &runtime, &err) != RRT_OK) return 1;
        if (event_fd(runtime, &fd, &err) != RRT_OK || model_load(runtime, &load, &model, &err) != RRT_OK) return 1;
        req.model = model;
        if (submit_sample(runtime, &req, &job, &err) != RRT_OK) return 1;
        if (wait(runtime, &job, 1, RRT_WAIT_ALL, UINT64_MAX, &err) != RRT_OK) return 1;
        if (threads() < 2) return 1; /* the engine's */
        model_free(model);
        if (close(runtime, UINT64_MAX, &err) != RRT_OK) return 1;
        if (threads() != 1) {
            fprintf(stderr, "%d threads after rrt_close\n", threads());
            return 1;
        }
        if (dlclose(library) != 0) return 1;
    }
    puts("ok");
    return 0;
}
