/* rewardrt.h: the C interface of rewardrt. This header is the manual.
 *
 * SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * CONVENTIONS
 *
 * Status.   Every call that can fail returns an rrt_status: 0 is RRT_OK, positive is "no error, not done"
 *           (RRT_PENDING, RRT_TIMEOUT), negative is an error. Outputs are written only on RRT_OK, except that *need is
 *           also written with RRT_E_SHORT_BUFFER. After an error the objects are as they were before the call, unless
 *           the function says otherwise.
 * Errors.   The last parameter is an rrt_error of the caller's, or NULL. Its text is always NUL-terminated.
 * Structs.  Input and output structs begin with struct_size. Set it through RRT_X_INIT or rrt_x_init(). A library
 *           accepts a larger input struct if what it does not know is zero; a smaller one, or a wrong size, is RRT_E_ABI
 *           (before ABI 1.0 header and library have the same minor: rrt_abi_check).
 * Strings.  Pointer and length in bytes, UTF-8, not NUL-terminated, unless said otherwise.
 * Buffers.  Functions with (buffer, capacity, *need) write at most capacity elements and the number needed to *need.
 *           With too small a capacity they write no element and return RRT_E_SHORT_BUFFER; (NULL, 0) asks for the size.
 * Handles.  rrt_runtime, rrt_model, rrt_tokenizer, rrt_adapter, rrt_update and rrt_result are freed by the caller, exactly once, by the function
 *           of their name; freeing NULL does nothing. Jobs are numbers, never used twice in a process. An
 *           adapter or an update may outlive rrt_model_free, and keeps the model's memory until it is freed. All are freed
 *           before rrt_close.
 * Threads.  Any thread may call any function with any handle at any time, with one exception: while one thread frees
 *           or closes a handle, no other may use it. Results are immutable. An update is used by one thread at a time, and so
 *           is the merging of an adapter: a second one gets RRT_E_BUSY.
 * Memory.   What is passed in is borrowed for the call and copied before it returns. Pointers in views are borrowed
 *           until rrt_result_free.
 * Promises. The library never exits, aborts, prints, installs a signal handler, or calls back except for the log. A bug
 *           in it becomes RRT_E_PANIC; from then on what would start work (open, load, submit) gives
 *           RRT_E_POISONED, while waiting, taking, closing and freeing still work.
 * Fork.     Only before rrt_open: a child that uses an inherited runtime, model, adapter or update gets RRT_E_FORKED.
 */
#ifndef REWARDRT_H
#define REWARDRT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RRT_ABI_MAJOR 0
#define RRT_ABI_MINOR 2
#define RRT_ABI_VERSION (((uint32_t)RRT_ABI_MAJOR << 16) | RRT_ABI_MINOR)

/* ---- status ----------------------------------------------------------------------------------------------------- */

typedef int32_t rrt_status;

enum {
    RRT_OK = 0,
    RRT_PENDING = 1,             /* the job is not done */
    RRT_TIMEOUT = 2,             /* the time is over, nothing changed */
    RRT_E_ARG = -1,              /* a field has a value outside its range */
    RRT_E_NULL = -2,             /* a pointer that must not be NULL is */
    RRT_E_ABI = -3,              /* struct_size or version do not fit */
    RRT_E_SHORT_BUFFER = -4,     /* *need says how much is needed */
    RRT_E_RANGE = -5,            /* an index is past the end */
    RRT_E_NOT_FOUND = -6,        /* no such file, job or tensor */
    RRT_E_BUSY = -7,             /* it is in use: handles are alive, another thread is at it, sequences are under way */
    RRT_E_FULL = -8,             /* the queue is full: retry later, nothing was queued */
    RRT_E_CANCELLED = -9,        /* the job was cancelled */
    RRT_E_CONFLICT = -10,        /* another version or state than the call expects: ended updates, invalid weights */
    RRT_E_DUPLICATE = -11,       /* the tensor was put before */
    RRT_E_IO = -20,              /* the system refused a read */
    RRT_E_FORMAT = -21,          /* a file breaks its format */
    RRT_E_UNSUPPORTED = -22,     /* this version does not do that */
    RRT_E_SHAPE = -23,           /* tensors are missing, superfluous or mis-shaped; the text lists them */
    RRT_E_LIMIT = -24,           /* a stated limit or the memory budget would be exceeded */
    RRT_E_TEMPLATE = -25,        /* the chat template failed */
    RRT_E_NO_DEVICE = -40,       /* nothing matches the selection; the text lists what there is */
    RRT_E_OOM_DEVICE = -41,      /* the device has no memory left */
    RRT_E_OOM_HOST = -42,        /* the host has no memory left */
    RRT_E_DEVICE_LOST = -43,     /* close the runtime and open another */
    RRT_E_GPU = -44,             /* the graphics API reported an error */
    RRT_E_NONFINITE = -45,       /* a result is NaN or infinite: the job failed */
    RRT_E_PANIC = -60,           /* a bug in the library; the runtime is poisoned */
    RRT_E_POISONED = -61,        /* an earlier call had RRT_E_PANIC */
    RRT_E_FORKED = -62           /* the handle is from before fork() */
};

/* Caller-owned, 512 bytes for ever. */
typedef struct rrt_error {
    int32_t code;                /* the rrt_status that was returned */
    uint32_t len;                /* bytes of text, without the NUL */
    char text[504];              /* cut at a character if it is longer */
} rrt_error;

/* ---- version ---------------------------------------------------------------------------------------------------- */

uint32_t rrt_abi_version(void);                    /* RRT_ABI_VERSION of the library */
rrt_status rrt_abi_check(uint32_t header_abi);     /* RRT_OK if the library serves this header, else RRT_E_ABI */
const char *rrt_version(void);                     /* static and NUL-terminated, "rewardrt 0.1.0" */
const char *rrt_status_name(rrt_status status);    /* static and NUL-terminated, never NULL */

/* ---- log -------------------------------------------------------------------------------------------------------- */

enum { RRT_LOG_OFF = 0, RRT_LOG_ERROR = 1, RRT_LOG_WARN = 2, RRT_LOG_INFO = 3, RRT_LOG_DEBUG = 4, RRT_LOG_TRACE = 5 };

/* Called on any thread; text is borrowed for the call. It must not call rrt_ functions. */
typedef void (*rrt_log_fn)(void *user_data, int32_t level, const char *text, size_t len);

/* Process-wide. NULL switches it off and returns when no callback is running any more. */
rrt_status rrt_set_log(rrt_log_fn fn, void *user_data, int32_t max_level, rrt_error *err);

/* ---- devices ---------------------------------------------------------------------------------------------------- */

enum { RRT_DEVICE_CPU = 0, RRT_DEVICE_DISCRETE = 1, RRT_DEVICE_INTEGRATED = 2, RRT_DEVICE_VIRTUAL = 3,
       RRT_DEVICE_SOFTWARE = 4, RRT_DEVICE_OTHER = 5 };

typedef struct rrt_device_info {
    uint32_t struct_size;        /* set by the caller in every element */
    int32_t type;                /* RRT_DEVICE_… */
    uint64_t max_binding_bytes;  /* 0 for the CPU */
    uint32_t has_f16;
    uint32_t has_subgroups;
    char name[128];              /* NUL-terminated */
    char driver[128];            /* NUL-terminated; the instruction set for the CPU */
} rrt_device_info;

/* The CPU first, then the adapters. Elements are `stride` bytes apart. */
rrt_status rrt_list_devices(rrt_device_info *out, size_t capacity, size_t stride, size_t *need, rrt_error *err);

/* ---- runtime ---------------------------------------------------------------------------------------------------- */

typedef struct rrt_runtime rrt_runtime;

typedef struct rrt_open_opts {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    const char *device;          /* "auto", "cpu", "gpu", "gpu:PART"; NULL: auto */
    size_t device_len;
    uint32_t threads;            /* of the CPU backend; 0: one a core */
    uint32_t reserved;           /* 0 */
} rrt_open_opts;
#define RRT_OPEN_OPTS_INIT { sizeof(rrt_open_opts), 0, NULL, 0, 0, 0 }
void rrt_open_opts_init(rrt_open_opts *opts);      /* NULL does nothing */

rrt_status rrt_open(const rrt_open_opts *opts, rrt_runtime **out, rrt_error *err);

/* Cancels all jobs, waits for them at most timeout_ns, and frees the runtime.
 * RRT_E_BUSY while models, adapters, updates or results live, RRT_TIMEOUT if jobs do not end in time: the runtime stays open. */
rrt_status rrt_close(rrt_runtime *runtime, uint64_t timeout_ns, rrt_error *err);

/* ---- models ----------------------------------------------------------------------------------------------------- */

typedef struct rrt_model rrt_model;

enum { RRT_PRECISION_AUTO = 0, RRT_PRECISION_F32 = 1 };
enum { RRT_WEIGHTS_STORED = 0, RRT_WEIGHTS_INT8 = 1, RRT_WEIGHTS_INT4 = 2 };
enum { RRT_MODEL_NO_MMAP = 1u };                   /* read the files instead of mapping them */

typedef struct rrt_model_opts {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_MODEL_… */
    const char *path;            /* the model folder */
    size_t path_len;
    int32_t precision;           /* RRT_PRECISION_… */
    uint32_t max_batch_tokens;   /* rows of a step; 0: 1024. Results do not depend on it. */
    uint64_t kv_tokens;          /* positions in the KV cache; 0: up to 32768, as memory allows */
    uint64_t memory;             /* bytes the model may allocate; 0: no bound */
    uint64_t max_context;        /* longest sequence; 0: what config.json says */
    uint64_t weights_version;    /* what results carry */
    int32_t weights;             /* RRT_WEIGHTS_…: INT8 and INT4 quantise the weights of products on load */
    uint32_t reserved;           /* 0 */
} rrt_model_opts;
#define RRT_MODEL_OPTS_INIT { sizeof(rrt_model_opts), 0, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
void rrt_model_opts_init(rrt_model_opts *opts);

/* Loads a folder with config.json and safetensors, and its tokenizer.json if there is one. Blocks. */
rrt_status rrt_model_load(rrt_runtime *runtime, const rrt_model_opts *opts, rrt_model **out, rrt_error *err);
/* With the last of model, adapters and updates the model goes: its jobs that are not done fail with RRT_E_CANCELLED. */
void rrt_model_free(rrt_model *model);

enum { RRT_HEAD_LANGUAGE_MODEL = 0, RRT_HEAD_SEQUENCE_CLASSIFICATION = 1 };

typedef struct rrt_model_info {
    uint32_t struct_size;
    int32_t head;                /* RRT_HEAD_… */
    uint32_t vocab_size;
    uint32_t hidden_size;
    uint32_t layers;
    uint32_t heads;
    uint32_t kv_heads;
    uint32_t head_dim;
    uint32_t labels;             /* 0 for a language model */
    uint32_t has_tokenizer;
    uint32_t has_chat_template;
    uint32_t reserved;
    uint64_t max_context;
    uint64_t kv_tokens;
    uint64_t bytes_allocated;    /* weights that are not mapped, KV cache, activations */
    uint64_t bytes_mapped;       /* weights used in place */
    uint64_t weights_version;
} rrt_model_info;

/* Set out->struct_size first. */
rrt_status rrt_get_model_info(const rrt_model *model, rrt_model_info *out, rrt_error *err);

/* ---- adapters --------------------------------------------------------------------------------------------------- */

typedef struct rrt_adapter rrt_adapter;

enum { RRT_ADAPTER_NO_MMAP = 1u };                 /* read the files instead of mapping them */

typedef struct rrt_adapter_opts {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_ADAPTER_… */
    const char *path;            /* a folder that PEFT's save_pretrained wrote: LoRA factors, a score head */
    size_t path_len;
    uint64_t version;
} rrt_adapter_opts;
#define RRT_ADAPTER_OPTS_INIT { sizeof(rrt_adapter_opts), 0, NULL, 0, 0 }
void rrt_adapter_opts_init(rrt_adapter_opts *opts);

/* Loads an adapter beside the model's weights, which it neither copies nor changes. Requests choose it, or another, or none;
 * all of them share steps. */
rrt_status rrt_adapter_load(rrt_model *model, const rrt_adapter_opts *opts, rrt_adapter **out, rrt_error *err);
/* Puts other values in its place: requests from now on use them, those before end with what they began with. */
rrt_status rrt_adapter_replace(rrt_adapter *adapter, const char *path, size_t path_len, uint64_t version, rrt_error *err);
/* Jobs that use it keep what they need. A merged one stays merged. */
void rrt_adapter_free(rrt_adapter *adapter);

/* ---- text ------------------------------------------------------------------------------------------------------- */

typedef struct rrt_tokenizer rrt_tokenizer;

/* Reads tokenizer.json of a model folder, and its chat template. No device is needed. */
rrt_status rrt_tokenizer_load(const char *path, size_t path_len, rrt_tokenizer **out, rrt_error *err);
void rrt_tokenizer_free(rrt_tokenizer *tokenizer);

enum {
    RRT_ADD_SPECIAL = 1u,             /* encode: add what the tokenizer adds by itself, BOS for instance */
    RRT_PARSE_SPECIAL = 2u,           /* encode: special tokens in the text count; off, user text cannot forge them */
    RRT_SKIP_SPECIAL = 4u,            /* decode: leave special tokens out */
    RRT_ADD_GENERATION_PROMPT = 8u    /* chat: open the assistant's answer */
};

rrt_status rrt_encode(const rrt_tokenizer *tokenizer, const char *text, size_t text_len, uint32_t flags, uint32_t *ids,
                      size_t capacity, size_t *need, rrt_error *err);
/* Incomplete UTF-8 becomes U+FFFD. No NUL is added. */
rrt_status rrt_decode(const rrt_tokenizer *tokenizer, const uint32_t *ids, size_t count, uint32_t flags, char *text,
                      size_t capacity, size_t *need, rrt_error *err);

typedef struct rrt_message {
    const char *role;
    size_t role_len;
    const char *content;
    size_t content_len;
} rrt_message;

/* Renders messages, `stride` bytes apart, through the chat template and encodes them. The template writes BOS itself;
 * special tokens count in the template and not in the messages. */
rrt_status rrt_chat_encode(const rrt_tokenizer *tokenizer, const rrt_message *messages, size_t count, size_t stride,
                           uint32_t flags, uint32_t *ids, size_t capacity, size_t *need, rrt_error *err);

/* ---- jobs ------------------------------------------------------------------------------------------------------- */

/* Sequences side by side: sequence i is ids[offsets[i]] … ids[offsets[i + 1] − 1]; offsets has count + 1 elements. */
typedef struct rrt_sequences {
    const uint32_t *ids;
    const size_t *offsets;
    size_t count;
} rrt_sequences;

enum { RRT_SAMPLE_IGNORE_EOS = 1u };

typedef struct rrt_sample_req {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_SAMPLE_… */
    const rrt_model *model;
    rrt_sequences prompts;
    const uint64_t *streams;     /* random stream of each prompt; NULL: its index */
    uint64_t seed;               /* (seed, stream, sample, position) names a draw, whatever the batch */
    uint32_t n_samples;
    uint32_t max_new_tokens;
    float temperature;           /* 0 is greedy */
    uint32_t top_k;              /* 0: off */
    float top_p;                 /* 1: off */
    float min_p;                 /* 0: off */
    float repetition_penalty;    /* 1: off */
    uint32_t reserved;           /* 0 */
    const uint32_t *stop_ids;    /* besides the model's own end-of-sequence tokens */
    size_t stop_id_count;
    const char *stop_text;       /* stop string i is stop_text[stop_offsets[i]] … ; needs the model's tokenizer.json */
    const size_t *stop_offsets;  /* stop_count + 1 elements */
    size_t stop_count;
    const rrt_adapter *adapter;  /* of the same model; NULL: the model as it is */
} rrt_sample_req;
#define RRT_SAMPLE_REQ_INIT { sizeof(rrt_sample_req), 0, NULL, { NULL, NULL, 0 }, NULL, 0, 1, 128, 1.0f, 0, 1.0f, \
                              0.0f, 1.0f, 0, NULL, 0, NULL, NULL, 0, NULL }
void rrt_sample_req_init(rrt_sample_req *req);

/* Queues n_samples answers to each prompt. Nothing is queued on an error. */
rrt_status rrt_submit_sample(rrt_runtime *runtime, const rrt_sample_req *req, uint64_t *job, rrt_error *err);

enum {
    RRT_SCORE_REWARD = 1,        /* the label values of `rule`: one or more a sequence */
    RRT_SCORE_LOGPROBS = 2       /* ln p of each token after the sequence's prompt */
};

typedef struct rrt_score_req {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    const rrt_model *model;
    int32_t kind;                /* RRT_SCORE_… */
    uint32_t reserved;           /* 0 */
    rrt_sequences sequences;
    const size_t *prompt_lens;   /* LOGPROBS: leading tokens that are not scored; NULL: 0 for all */
    const char *rule;            /* REWARD: "sequence", "judge:yes,no"; NULL: what the checkpoint's head implies */
    size_t rule_len;
    const rrt_adapter *adapter;  /* of the same model; NULL: the model as it is */
} rrt_score_req;
#define RRT_SCORE_REQ_INIT { sizeof(rrt_score_req), 0, NULL, RRT_SCORE_REWARD, 0, { NULL, NULL, 0 }, NULL, NULL, 0, \
                             NULL }
void rrt_score_req_init(rrt_score_req *req);

rrt_status rrt_submit_score(rrt_runtime *runtime, const rrt_score_req *req, uint64_t *job, rrt_error *err);

enum { RRT_WAIT_ALL = 0u, RRT_WAIT_ANY = 1u };

/* Waits until all (or any) of the jobs are done, failed or cancelled, at most timeout_ns; UINT64_MAX: for ever.
 * RRT_TIMEOUT if not; RRT_E_NOT_FOUND for a number that is no job. */
rrt_status rrt_wait(rrt_runtime *runtime, const uint64_t *jobs, size_t count, uint32_t flags, uint64_t timeout_ns,
                    rrt_error *err);

typedef struct rrt_result rrt_result;

/* Takes the result of a job, whose number is gone then. RRT_PENDING while it is not done. A failed job returns its own
 * status and text, and is gone too. A cancelled sampling job has the tokens it got. */
rrt_status rrt_job_take(rrt_runtime *runtime, uint64_t job, rrt_result **out, rrt_error *err);
/* Asks a job to stop; it ends within one step. May be called again. */
rrt_status rrt_job_cancel(rrt_runtime *runtime, uint64_t job, rrt_error *err);

/* ---- results ---------------------------------------------------------------------------------------------------- */

enum { RRT_FINISH_STOP = 0, RRT_FINISH_LENGTH = 1, RRT_FINISH_CANCELLED = 2, RRT_FINISH_BLOCKED = 3 };

/* What a sampling job returned, in the order (prompt, sample). */
typedef struct rrt_sequences_view {
    uint32_t struct_size;
    uint32_t reserved;
    size_t count;
    const size_t *offsets;          /* [count + 1] into the arrays of tokens */
    const uint32_t *ids;            /* stop tokens included */
    const float *logprob;           /* temperature 1, whole vocabulary */
    const float *sample_logprob;    /* in the distribution that was really sampled from */
    const float *entropy;           /* of the model's distribution, in nats */
    const uint32_t *kept;           /* tokens that could have been drawn */
    const float *threshold;         /* smallest penalised logit / temperature among them */
    const int32_t *finish;          /* [count] RRT_FINISH_… */
    const uint32_t *prompt_index;   /* [count] */
    const uint32_t *sample_index;   /* [count] */
    const uint64_t *version;        /* [count] of the last token */
    const size_t *text_offsets;     /* [count + 1] into text */
    const char *text;               /* decoded without special tokens, cut at a stop string; empty without a tokenizer */
    const size_t *span_offsets;     /* [count + 1] into the spans: which weights sampled which tokens */
    const uint32_t *span_end;       /* one past the span's last token, counted from the sequence's first; begins at the
                                       end of the span before, or at 0 */
    const uint64_t *span_version;
    const uint64_t *adapter_version; /* [count]; 0 without an adapter */
} rrt_sequences_view;

/* What a scoring job returned, in the order of the sequences. */
typedef struct rrt_scores_view {
    uint32_t struct_size;
    uint32_t reserved;
    size_t count;
    const size_t *offsets;          /* [count + 1] into values */
    const float *values;            /* REWARD: the labels' values; LOGPROBS: one a token, NaN where nothing precedes it */
    const uint64_t *version;        /* [count] */
    const uint64_t *adapter_version; /* [count]; 0 without an adapter */
} rrt_scores_view;

/* Set out->struct_size first. RRT_E_ARG for a result of the other kind. */
rrt_status rrt_result_sequences(const rrt_result *result, rrt_sequences_view *out, rrt_error *err);
rrt_status rrt_result_scores(const rrt_result *result, rrt_scores_view *out, rrt_error *err);
void rrt_result_free(rrt_result *result);

/* ---- weights that change ---------------------------------------------------------------------------------------- */

/* What becomes of the sequences that are under way when weights change or work pauses. */
enum {
    RRT_IN_FLIGHT_WAIT = 0,      /* they finish as they began; what has not begun waits */
    RRT_IN_FLIGHT_CANCEL = 1,    /* every job submitted before ends, as by rrt_job_cancel */
    RRT_IN_FLIGHT_KEEP = 2       /* they go on later, with the weights of then: see span_version */
};

/* Stops every model between two steps, until rrt_resume. Jobs may be submitted, and wait. UINT64_MAX: no time limit.
 * RRT_TIMEOUT if sequences do not finish in time, RRT_E_BUSY if they cannot: everything goes on then. */
rrt_status rrt_pause(rrt_runtime *runtime, int32_t in_flight, uint64_t timeout_ns, rrt_error *err);
rrt_status rrt_resume(rrt_runtime *runtime, rrt_error *err);

enum { RRT_SLEEP_WEIGHTS = 1u, RRT_SLEEP_KV_CACHE = 2u };

/* Gives memory back until rrt_model_wake: the device's weights (the checkpoint's bytes stay, mapped or in host memory), the
 * KV cache, or both. Jobs may be submitted, and wait. Statuses as for rrt_pause; RRT_E_CONFLICT during an update in place. */
rrt_status rrt_model_sleep(rrt_model *model, uint32_t tags, int32_t in_flight, uint64_t timeout_ns, rrt_error *err);
/* On an error the model sleeps on. */
rrt_status rrt_model_wake(rrt_model *model, uint32_t tags, rrt_error *err);

enum { RRT_DTYPE_F32 = 0, RRT_DTYPE_F16 = 1, RRT_DTYPE_BF16 = 2 };

typedef struct rrt_tensor_info {
    uint32_t struct_size;
    int32_t dtype;               /* RRT_DTYPE_… */
    const char *name;            /* borrowed until rrt_model_free */
    size_t name_len;
    uint64_t shape[8];           /* the first `rank` count, outermost dimension first */
    uint32_t rank;
    uint32_t reserved;
} rrt_tensor_info;

/* The model's tensors in name order: what an update has to bring. Set out->struct_size first. RRT_E_RANGE past the
 * end. */
rrt_status rrt_model_tensor(const rrt_model *model, size_t index, rrt_tensor_info *out, rrt_error *err);

enum { RRT_STORAGE_SHADOW = 0, RRT_STORAGE_IN_PLACE = 1 };
enum { RRT_REQUIRE_ALL = 0, RRT_REQUIRE_SUBSET = 1 };
enum {
    RRT_UPDATE_EXPECT_VERSION = 1u, /* compare expect_version with the model's */
    RRT_UPDATE_CHECK_FINITE = 2u,   /* refuse NaN and infinities */
    RRT_UPDATE_CONVERT = 4u         /* round tensors of another dtype to the model's, ties to even */
};

typedef struct rrt_update_opts {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_UPDATE_… */
    uint64_t expect_version;
    int32_t storage;             /* SHADOW: the old weights serve until the commit, and after a failed one.
                                    IN_PLACE: no room for a second copy; the model computes nothing until the end, and
                                    an update that was not committed once something was put leaves no valid weights:
                                    RRT_E_CONFLICT for all jobs until an update with all tensors is committed */
    int32_t in_flight;           /* RRT_IN_FLIGHT_…, at the commit; IN_PLACE: at the beginning */
    int32_t require;             /* ALL: every tensor must come; SUBSET: the others stay */
    uint32_t reserved;           /* 0 */
    uint64_t timeout_ns;         /* for sequences under way; UINT64_MAX: no limit */
} rrt_update_opts;
#define RRT_UPDATE_OPTS_INIT { sizeof(rrt_update_opts), 0, 0, RRT_STORAGE_SHADOW, RRT_IN_FLIGHT_WAIT, RRT_REQUIRE_ALL, 0, \
                               UINT64_MAX }
void rrt_update_opts_init(rrt_update_opts *opts);

typedef struct rrt_update rrt_update;

/* RRT_E_CONFLICT if the model has another version than expected, is asleep, is being written in place, or has no valid weights
 * and the update does not require all tensors. In place also RRT_TIMEOUT and RRT_E_BUSY, as for rrt_pause. */
rrt_status rrt_update_begin(rrt_model *model, const rrt_update_opts *opts, rrt_update **out, rrt_error *err);

typedef struct rrt_tensor_desc {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    const char *name;            /* the checkpoint's own, also where the library fuses tensors */
    size_t name_len;
    int32_t dtype;               /* RRT_DTYPE_… */
    uint32_t reserved;           /* 0 */
    size_t rank;                 /* at most 8 */
    const uint64_t *shape;       /* [rank] */
    const void *data;            /* row major, without gaps, of any alignment; copied before the call returns */
    size_t bytes;
    const uint8_t *checksum;     /* 16 bytes, XXH3-128 of the data in canonical (big-endian) form; NULL: none */
} rrt_tensor_desc;
#define RRT_TENSOR_DESC_INIT { sizeof(rrt_tensor_desc), 0, NULL, 0, RRT_DTYPE_F32, 0, 0, NULL, NULL, 0, NULL }
void rrt_tensor_desc_init(rrt_tensor_desc *desc);

/* After an error of these four nothing of the tensor (file, delta) was taken and the update can go on; in place a file or
 * delta may have been taken in part. RRT_E_NOT_FOUND: no such tensor; RRT_E_SHAPE: another shape or dtype;
 * RRT_E_DUPLICATE: put before, or parts overlap; RRT_E_FORMAT: the checksum differs; RRT_E_NONFINITE; RRT_E_LIMIT: the
 * memory budget; RRT_E_CONFLICT: the update has ended; RRT_E_ARG: bytes do not fit shape and dtype; RRT_E_OOM_HOST; for files
 * and deltas also those of loading. */
rrt_status rrt_update_tensor(rrt_update *update, const rrt_tensor_desc *desc, rrt_error *err);
/* A part: desc->shape is the part's, start[rank] its first index in each dimension. */
rrt_status rrt_update_slice(rrt_update *update, const rrt_tensor_desc *desc, const uint64_t *start, rrt_error *err);
/* A safetensors file or a checkpoint folder; mapped if the model's own files are. */
rrt_status rrt_update_file(rrt_update *update, const char *path, size_t path_len, rrt_error *err);
/* A delta folder made for the model's version (RRT_E_CONFLICT otherwise); *version: the one that it leads to. */
rrt_status rrt_update_delta(rrt_update *update, const char *path, size_t path_len, uint64_t *version, rrt_error *err);

/* Changes all weights between two steps; caches of the old ones are gone. RRT_OK ends the update. RRT_E_SHAPE: tensors are
 * missing, the text lists them. RRT_E_CONFLICT: another update was committed since this one began. RRT_TIMEOUT:
 * sequences under way did not finish; RRT_E_BUSY: they cannot, since the model is paused or asleep. RRT_E_ARG: new_version is
 * the present one. RRT_E_LIMIT: no room on a GPU for both weights. After an error in shadow the old weights serve on and the update can go on. */
rrt_status rrt_update_commit(rrt_update *update, uint64_t new_version, rrt_error *err);
/* Ends the update without a change (in place: see storage). */
rrt_status rrt_update_abort(rrt_update *update, rrt_error *err);
/* Aborts it if it has not ended. */
void rrt_update_free(rrt_update *update);

/* Adds an adapter into the model's weights (rounded to their dtype) as an update in shadow, under new_version; of opts what
 * is said about tensors does not count, and RRT_STORAGE_IN_PLACE is RRT_E_ARG. Unmerging puts the weights back to the bit; RRT_E_CONFLICT if they have changed
 * since, if it is merged already, or is not. */
rrt_status rrt_adapter_merge(rrt_adapter *adapter, const rrt_update_opts *opts, uint64_t new_version, rrt_error *err);
rrt_status rrt_adapter_unmerge(rrt_adapter *adapter, const rrt_update_opts *opts, uint64_t new_version, rrt_error *err);

#ifdef __cplusplus
}
#endif
#endif
