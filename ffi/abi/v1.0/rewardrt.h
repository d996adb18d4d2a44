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
 * Errors.   The last parameter is an rrt_error of the caller's, or NULL. It is written whenever the status is not RRT_OK, and
 *           only then: look at its text after such a status alone, where it is always NUL-terminated.
 * Structs.  Input and output structs begin with struct_size. Set it through RRT_X_INIT or rrt_x_init(); in an output
 *           struct set it by hand. Structs grow at their end, in later minor versions. A library fills in the defaults
 *           of what an older header does not know; of a newer header it accepts what it does not know if that is zero.
 *           A struct_size below that of ABI 1.0, or fields set that the library does not know, is RRT_E_ABI.
 *           `reserved` and unknown flags must be 0.
 * Strings.  Pointer and length in bytes, UTF-8, not NUL-terminated, unless said otherwise.
 * Lists of strings. One text and offsets into it: string i is text[offsets[i]] … text[offsets[i + 1] − 1]; count + 1
 *           offsets, of which the first need not be 0.
 * Arrays of structs. Their elements are `stride` bytes apart, sizeof of the caller's element.
 * Buffers.  Functions with (buffer, capacity, *need) write at most capacity elements and the number needed to *need.
 *           With too small a capacity they write no element and return RRT_E_SHORT_BUFFER; (NULL, 0) asks for the size.
 * Handles.  rrt_runtime, rrt_model, rrt_tokenizer, rrt_adapter, rrt_session, rrt_update, rrt_follower and rrt_result are
 *           freed by the caller, exactly once, by the function of their name; freeing NULL does nothing. Jobs are
 *           numbers, never used twice in a process. Adapters, sessions, updates and followers may outlive
 *           rrt_model_free, and keep the model's memory until they are freed. All are freed before rrt_close.
 * Threads.  Any thread may call any function with any handle at any time, with one exception: while one thread frees
 *           or closes a handle, no other may use it. Results are immutable. An update is used by one thread at a time,
 *           and so is the merging of an adapter: a second one gets RRT_E_BUSY.
 * Memory.   What is passed in is borrowed for the call and copied before it returns. Pointers in views are borrowed
 *           until rrt_result_free; those in rrt_model_info and rrt_tensor_info until rrt_model_free. An array that a
 *           result has no values for is NULL.
 * Time.     Durations are nanoseconds. UINT64_MAX waits for ever.
 * Promises. The library never exits, aborts, prints, installs a signal handler, or calls back except for the log; of the
 *           environment it reads REWARDRT_ISA alone (the CPU's instruction set, for tests), and what a GPU driver reads.
 *           A bug in it becomes RRT_E_PANIC, at the call that met it or at the rrt_job_take of the job that did. From then
 *           on what would start work (open, load, submit) gives RRT_E_POISONED in the whole process, on every runtime,
 *           while waiting, taking, closing and freeing still work.
 * Fork.     Only before rrt_open: a child that uses an inherited runtime or what belongs to one gets RRT_E_FORKED.
 */
#ifndef REWARDRT_H
#define REWARDRT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RRT_ABI_MAJOR 1
#define RRT_ABI_MINOR 0
#define RRT_ABI_VERSION (((uint32_t)RRT_ABI_MAJOR << 16) | RRT_ABI_MINOR)

/* ---- status ----------------------------------------------------------------------------------------------------- */

typedef int32_t rrt_status;

enum {
    RRT_OK = 0,
    RRT_PENDING = 1,             /* the job is not done */
    RRT_TIMEOUT = 2,             /* the time is over; nothing changed, but see rrt_close */
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
    RRT_E_PANIC = -60,           /* a bug in the library; the process is poisoned */
    RRT_E_POISONED = -61,        /* an earlier call had RRT_E_PANIC, or a bug has stopped the runtime's engine */
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
rrt_status rrt_abi_check(uint32_t header_abi);     /* RRT_OK: the same major, and the library's minor is not lower */
const char *rrt_version(void);                     /* static and NUL-terminated, "rewardrt 0.1.0" */
const char *rrt_status_name(rrt_status status);    /* static and NUL-terminated, "RRT_E_ARG"; never NULL */

/* What requests are held to. */
typedef struct rrt_limits {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t max_sequences;      /* sequences (prompts × samples) of a request */
    uint64_t max_tokens;         /* tokens of a request, what it may generate included */
    uint64_t max_alternatives;   /* top_logprobs and kept_ids of all tokens of a request */
    uint32_t max_stops;          /* stop strings, and stop ids */
    uint32_t max_biases;         /* tokens in bias_ids */
    uint32_t max_top_logprobs;
    uint32_t max_kept_ids;
    uint32_t max_speculate;
    uint32_t max_rank;           /* dimensions of a tensor */
    uint64_t max_guide_bytes;
    uint64_t max_messages;       /* in a conversation */
    uint64_t max_threads;        /* of the CPU backend */
} rrt_limits;

/* Set out->struct_size first. */
rrt_status rrt_get_limits(rrt_limits *out, rrt_error *err);

/* ---- log -------------------------------------------------------------------------------------------------------- */

enum { RRT_LOG_OFF = 0, RRT_LOG_ERROR = 1, RRT_LOG_WARN = 2, RRT_LOG_INFO = 3, RRT_LOG_DEBUG = 4, RRT_LOG_TRACE = 5 };

/* Called on any thread; text is borrowed for the call. It must not call rrt_ functions, and must not wait for a
 * thread that is in one: that one may wait for the callback. */
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
    uint64_t max_jobs;           /* that may wait or run at a time; 0: 65536. More are RRT_E_FULL */
    uint64_t max_queued_tokens;  /* that these jobs may come to; 0: 2^26. More are RRT_E_FULL */
    const char *shader_cache;    /* a folder that keeps compiled shaders; NULL: none */
    size_t shader_cache_len;
} rrt_open_opts;
#define RRT_OPEN_OPTS_INIT { sizeof(rrt_open_opts), 0, NULL, 0, 0, 0, 0, 0, NULL, 0 }
void rrt_open_opts_init(rrt_open_opts *opts);      /* NULL does nothing */

rrt_status rrt_open(const rrt_open_opts *opts, rrt_runtime **out, rrt_error *err);

/* Cancels all jobs, waits for them at most timeout_ns, and frees the runtime with its threads and its event fd.
 * RRT_E_BUSY while models, adapters, sessions, updates, followers or results live, and rollouts of other runtimes that use
 * models of this one and were neither taken nor dropped: nothing changed then. RRT_TIMEOUT if jobs do not end in time: the
 * runtime stays open, and all its jobs are cancelled. */
rrt_status rrt_close(rrt_runtime *runtime, uint64_t timeout_ns, rrt_error *err);

enum {
    RRT_STATE_RUNNING = 0,
    RRT_STATE_PAUSED = 1,        /* by rrt_pause */
    RRT_STATE_LOST = 2,          /* the device is lost: close the runtime and open another */
    RRT_STATE_POISONED = 3       /* a bug: see RRT_E_PANIC */
};

rrt_status rrt_runtime_state(const rrt_runtime *runtime, int32_t *state, rrt_error *err);
/* What it runs on, for people: "cpu (avx2, 2 threads)", or the adapter's name. No NUL is added. */
rrt_status rrt_runtime_device(const rrt_runtime *runtime, char *text, size_t capacity, size_t *need, rrt_error *err);

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
    uint32_t steps_at_once;      /* decode steps between two looks at streams, cancels and new jobs, at most 64;
                                    0: 8 on a GPU, 1 on the CPU. Results do not depend on it. */
} rrt_model_opts;
#define RRT_MODEL_OPTS_INIT { sizeof(rrt_model_opts), 0, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0 }
void rrt_model_opts_init(rrt_model_opts *opts);

/* Loads a folder with config.json and safetensors, and its tokenizer.json if there is one. Blocks. */
rrt_status rrt_model_load(rrt_runtime *runtime, const rrt_model_opts *opts, rrt_model **out, rrt_error *err);
/* Each retain takes one more rrt_model_free: for hosts in which several own the model. */
rrt_status rrt_model_retain(rrt_model *model, rrt_error *err);
/* With the last of model, adapters, sessions, updates and followers the model goes: its jobs that are not done fail with
 * RRT_E_CANCELLED. */
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
    uint32_t asleep;             /* RRT_SLEEP_…: what it has given back */
    uint64_t max_context;
    uint64_t kv_tokens;
    uint64_t bytes_allocated;    /* weights that are not mapped, KV cache, activations */
    uint64_t bytes_mapped;       /* weights used in place */
    uint64_t weights_version;
    int64_t pad_id;              /* the padding token; -1: none */
    const uint32_t *eos_ids;     /* [eos_count] the tokens that end a sequence */
    size_t eos_count;
    const char *architecture;    /* "LlamaForCausalLM" */
    size_t architecture_len;
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
    uint64_t version;            /* comes back in results, where 0 also says that there was no adapter */
    const char *config;          /* instead of path: the text of a PEFT adapter_config.json, for instance {"peft_type": "LORA",
                                    "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}. All values are zero,
                                    so that it changes nothing, until rrt_adapter_update_begin brings others */
    size_t config_len;
} rrt_adapter_opts;
#define RRT_ADAPTER_OPTS_INIT { sizeof(rrt_adapter_opts), 0, NULL, 0, 0, NULL, 0 }
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

/* Fixed for ever. */
typedef struct rrt_message {
    const char *role;            /* "system", "user", "assistant", or what else the chat template knows */
    size_t role_len;
    const char *content;
    size_t content_len;
} rrt_message;

/* Renders messages, `stride` bytes apart, through the chat template and encodes them. The template writes BOS itself;
 * special tokens count in the template and not in the messages. */
rrt_status rrt_chat_encode(const rrt_tokenizer *tokenizer, const rrt_message *messages, size_t count, size_t stride,
                           uint32_t flags, uint32_t *ids, size_t capacity, size_t *need, rrt_error *err);
/* What the template writes, to look at: encoded by rrt_encode, control tokens in messages would count. No NUL is added. */
rrt_status rrt_chat_render(const rrt_tokenizer *tokenizer, const rrt_message *messages, size_t count, size_t stride,
                           uint32_t flags, char *text, size_t capacity, size_t *need, rrt_error *err);

/* ---- jobs ------------------------------------------------------------------------------------------------------- */

/* Sequences side by side: sequence i is ids[offsets[i]] … ids[offsets[i + 1] − 1]; offsets has count + 1 elements. */
typedef struct rrt_sequences {
    const uint32_t *ids;
    const size_t *offsets;
    size_t count;
} rrt_sequences;

enum {
    RRT_SAMPLE_IGNORE_EOS = 1u,  /* do not stop at the model's end-of-sequence tokens */
    RRT_SAMPLE_STREAM = 2u       /* hand out tokens as they are sampled: RRT_EVENT_CHUNK, rrt_job_peek */
};

/* What a sampled text must be: see rrt_sample_req.guide. Needs the model's tokenizer.json. */
enum {
    RRT_GUIDE_NONE = 0,
    RRT_GUIDE_JSON_SCHEMA = 1,   /* JSON that satisfies this schema */
    RRT_GUIDE_REGEX = 2,         /* text that matches this regular expression as a whole */
    RRT_GUIDE_GRAMMAR = 3,       /* text of this grammar, in llguidance's Lark dialect, from its rule `start` */
    RRT_GUIDE_CHOICES = 4        /* one of a list of strings */
};

typedef struct rrt_sample_req {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_SAMPLE_… */
    const rrt_model *model;
    rrt_sequences prompts;       /* at least one token each */
    const uint64_t *streams;     /* [prompts.count] random stream of each prompt; NULL: its index */
    uint64_t seed;               /* (seed, stream, sample, position) names a draw, whatever the batch */
    uint32_t n_samples;          /* of each prompt */
    uint32_t max_new_tokens;     /* fewer if the model's context ends first */
    float temperature;           /* ≥ 0; 0 is greedy */
    uint32_t top_k;              /* keep the k most likely tokens; 0: all */
    float top_p;                 /* keep the most likely tokens that hold this much of the probability; [0, 1], 1: all */
    float min_p;                 /* keep tokens at least this fraction as likely as the most likely one; [0, 1], 0: all */
    float repetition_penalty;    /* > 0; divides or multiplies the logits of tokens in the sequence; 1: off */
    uint32_t reserved;           /* 0 */
    const uint32_t *stop_ids;    /* besides the model's own end-of-sequence tokens */
    size_t stop_id_count;
    const char *stop_text;       /* stop strings, a list of strings; needs the model's tokenizer.json */
    const size_t *stop_offsets;  /* [stop_count + 1] */
    size_t stop_count;
    const rrt_adapter *adapter;  /* of the same model; NULL: the model as it is */
    float typical_p;             /* of what is left keep what is about as surprising as expected; [0, 1], 1: off */
    float presence_penalty;      /* subtracted from logits of tokens that this request generated; 0: off */
    float frequency_penalty;     /* subtracted once for each time it generated the token; 0: off */
    uint32_t min_new_tokens;     /* until then, tokens that end a sequence cannot be drawn */
    uint32_t best_of;            /* draw so many a prompt, return the n_samples with the highest mean logprob, best
                                    first; 0: n_samples */
    uint32_t top_logprobs;       /* report so many of the most likely tokens at each place: rrt_result_topk */
    uint32_t kept_ids;           /* report which tokens could have been drawn, where they are not more than so many */
    uint32_t speculate;          /* guess so many tokens ahead from what followed the same words before; the result is the
                                    same, sooner where text repeats itself; 0: off */
    const uint32_t *bias_ids;    /* [bias_count] tokens, none twice, whose logits get … */
    const float *bias;           /* … this added, before the penalties; -INFINITY bans the token */
    size_t bias_count;
    const uint32_t *banned_ids;  /* tokens that are never drawn */
    size_t banned_count;
    const uint32_t *allowed_ids; /* the only tokens that may be drawn; NULL: all */
    size_t allowed_count;
    int32_t guide_kind;          /* RRT_GUIDE_… */
    int32_t priority;            /* jobs of higher priority go first; results do not depend on it */
    const char *guide;           /* what the text must be */
    size_t guide_len;
    const size_t *choice_offsets; /* [choice_count + 1] CHOICES: `guide` is a list of strings */
    size_t choice_count;
    uint64_t deadline_ns;        /* from now; then the job ends as if it were cancelled; 0: none */
    uint64_t user_tag;           /* comes back in events */
} rrt_sample_req;
#define RRT_SAMPLE_REQ_INIT { sizeof(rrt_sample_req), 0, NULL, { NULL, NULL, 0 }, NULL, 0, 1, 128, 1.0f, 0, 1.0f, \
                              0.0f, 1.0f, 0, NULL, 0, NULL, NULL, 0, NULL, 1.0f, 0.0f, 0.0f, 0, 0, 0, 0, 0, NULL, NULL, \
                              0, NULL, 0, NULL, 0, RRT_GUIDE_NONE, 0, NULL, 0, NULL, 0, 0, 0 }
void rrt_sample_req_init(rrt_sample_req *req);

/* Queues n_samples answers to each prompt. Nothing is queued on an error. */
rrt_status rrt_submit_sample(rrt_runtime *runtime, const rrt_sample_req *req, uint64_t *job, rrt_error *err);

enum {
    RRT_SCORE_REWARD = 1,        /* the label values of `rule`, once a sequence */
    RRT_SCORE_LOGPROBS = 2,      /* ln p of each token after the sequence's prompt */
    RRT_SCORE_STEP_REWARDS = 3   /* the label values of `rule` at chosen positions: process rewards */
};

typedef struct rrt_score_req {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    const rrt_model *model;
    int32_t kind;                /* RRT_SCORE_… */
    uint32_t label;              /* rewards: which of the rule's labels is the sequence's `score`, from 0 */
    rrt_sequences sequences;     /* at least one token each */
    const size_t *prompt_lens;   /* [sequences.count] leading tokens that are not scored; NULL: 0 for all. Not for REWARD */
    const char *rule;            /* rewards: "sequence": the classifier's logits; "judge:yes,no": the probabilities of
                                    two or more tokens, one against the other, as the next one (blanks count: " yes" is
                                    another token); NULL: what the checkpoint's head implies. Not for LOGPROBS */
    size_t rule_len;
    const rrt_adapter *adapter;  /* of the same model; NULL: the model as it is */
    const size_t *positions;     /* STEP_REWARDS: tokens of sequence i after which the rule is read, counted from its first
                                    and rising, are positions[position_offsets[i]] …; NULL: wherever step_id stands */
    const size_t *position_offsets; /* [sequences.count + 1] */
    uint32_t step_id;            /* STEP_REWARDS without positions: the token that ends a step */
    uint32_t top_logprobs;       /* LOGPROBS: report so many of the most likely tokens at each place: rrt_result_topk */
    int32_t priority;            /* jobs of higher priority go first; results do not depend on it */
    uint32_t reserved;           /* 0 */
    uint64_t deadline_ns;        /* from now; then the job fails with RRT_E_CANCELLED; 0: none */
    uint64_t user_tag;           /* comes back in events */
} rrt_score_req;
#define RRT_SCORE_REQ_INIT { sizeof(rrt_score_req), 0, NULL, RRT_SCORE_REWARD, 0, { NULL, NULL, 0 }, NULL, NULL, 0, \
                             NULL, NULL, NULL, 0, 0, 0, 0, 0, 0 }
void rrt_score_req_init(rrt_score_req *req);

/* Queues the sequences. Nothing is queued on an error. */
rrt_status rrt_submit_score(rrt_runtime *runtime, const rrt_score_req *req, uint64_t *job, rrt_error *err);

/* One reward model of a rollout. */
typedef struct rrt_reward {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    const rrt_model *model;      /* of this runtime or of another one */
    const char *name;            /* for messages, no two the same; NULL: "reward" and its number */
    size_t name_len;
    const char *rule;            /* as in rrt_score_req */
    size_t rule_len;
    const rrt_adapter *adapter;  /* of that model; NULL: the model as it is */
    float weight;                /* in the sum that is a sequence's reward; finite */
    uint32_t label;              /* which of the rule's labels is the reward, from 0 */
    const char *question;        /* what a judge is asked: a user message in which {prompt} and {answer} stand for the texts:
                                    the last message's content, and where there are no `messages` the decoded prompt, of
                                    which the chat template's words are a part.
                                    NULL: the model reads prompt and answer, as ids if it has the policy's vocabulary, else
                                    as text: `messages` through its own chat template, or the texts one after the other */
    size_t question_len;
} rrt_reward;
#define RRT_REWARD_INIT { sizeof(rrt_reward), 0, NULL, NULL, 0, NULL, 0, NULL, 1.0f, 0, NULL, 0 }
void rrt_reward_init(rrt_reward *reward);

/* How rewards r become advantages. Standard deviations are with n − 1; a sequence without a reward gets 0. */
enum {
    RRT_ADVANTAGE_GROUP = 0,     /* (r − mean) / (std + 1e-4) over the samples of the prompt, as TRL's GRPO does */
    RRT_ADVANTAGE_LEAVE_ONE_OUT = 1, /* r − mean of the prompt's other samples: RLOO; at least two */
    RRT_ADVANTAGE_BATCH = 2,     /* (r − mean) / (std + 1e-4) over all samples */
    RRT_ADVANTAGE_NONE = 3,      /* r */
    RRT_ADVANTAGE_CENTRED = 4    /* r − mean over the samples of the prompt: Dr. GRPO */
};

enum {
    RRT_ROLLOUT_BASE_REFERENCE = 1u, /* the reference is the policy without its adapter; not with `reference` */
    RRT_ROLLOUT_CLIP_REWARD = 2u     /* the weighted sum is brought into [clip_low, clip_high] */
};

typedef struct rrt_rollout_req {
    uint32_t struct_size;
    uint32_t flags;              /* RRT_ROLLOUT_… */
    const rrt_sample_req *sample; /* the policy, its adapter, the prompts and how they are sampled; without
                                    RRT_SAMPLE_STREAM and best_of */
    const rrt_model *reference;  /* whose log-probs the KL is against, with the policy's vocabulary; of this runtime or of
                                    another one; NULL: none, or see flags */
    const rrt_reward *rewards;
    size_t reward_count;
    size_t reward_stride;        /* sizeof(rrt_reward) */
    const rrt_message *messages; /* the prompts as conversations, for reward models of another tokenizer and for questions;
                                    NULL: they are plain texts */
    const size_t *message_offsets; /* [prompts + 1], with messages: those of prompt i are messages[message_offsets[i]] …; one
                                    without messages is a plain text */
    size_t message_stride;       /* sizeof(rrt_message) */
    int32_t advantage;           /* RRT_ADVANTAGE_… */
    float clip_low;
    float clip_high;
    uint32_t reserved;           /* 0 */
} rrt_rollout_req;
#define RRT_ROLLOUT_REQ_INIT { sizeof(rrt_rollout_req), 0, NULL, NULL, NULL, 0, sizeof(rrt_reward), NULL, NULL, \
                               sizeof(rrt_message), RRT_ADVANTAGE_GROUP, 0.0f, 0.0f, 0 }
void rrt_rollout_req_init(rrt_rollout_req *req);

/* The data of one step of RL as one job: samples, log-probs of the reference and the KL to it, rewards, advantages. The
 * models' work overlaps. Read by rrt_result_sequences, rrt_result_rollout, rrt_result_topk and, for the sampling,
 * rrt_result_timing. A deadline ends the sampling; cancelling fails the job with RRT_E_CANCELLED, and so does a pause or an
 * update with RRT_IN_FLIGHT_CANCEL. RRT_E_FULL if 64 are under way on the runtime. */
rrt_status rrt_rollout(rrt_runtime *runtime, const rrt_rollout_req *req, uint64_t *job, rrt_error *err);

/* ---- following jobs ----------------------------------------------------------------------------------------------
 * Three ways, which can be mixed: rrt_wait blocks; rrt_poll never does and says what has happened; rrt_event_fd lets an event
 * loop sleep until there is something to poll. */

enum { RRT_WAIT_ALL = 0u, RRT_WAIT_ANY = 1u };

/* Waits until all (or any) of the jobs are done, failed or cancelled, at most timeout_ns; UINT64_MAX: for ever. Their results can
 * be taken then; rrt_poll may tell of them a moment later. RRT_TIMEOUT if not; RRT_E_NOT_FOUND for a number that is no job. */
rrt_status rrt_wait(rrt_runtime *runtime, const uint64_t *jobs, size_t count, uint32_t flags, uint64_t timeout_ns,
                    rrt_error *err);

enum {
    RRT_EVENT_CHUNK = 1,         /* a sequence of a job with RRT_SAMPLE_STREAM has new tokens or has ended */
    RRT_EVENT_DONE = 2,          /* rrt_job_take has the result */
    RRT_EVENT_FAILED = 3,        /* rrt_job_take returns `status` and says why */
    RRT_EVENT_CANCELLED = 4      /* cancelled or late: rrt_job_take has what a sampling job got (status RRT_OK), or returns
                                    `status` */
};

/* Grows at its end; the stride says how large the caller's is. */
typedef struct rrt_event {
    int32_t kind;                /* RRT_EVENT_… */
    int32_t status;              /* what rrt_job_take will return; RRT_PENDING in a CHUNK */
    uint64_t job;
    uint64_t user_tag;           /* of the request */
    uint32_t sequence;           /* CHUNK: the answer: prompt × samples drawn a prompt (best_of, or n_samples) + sample */
    uint32_t first;              /* CHUNK: place of the first new token in the answer */
    uint32_t count;              /* CHUNK: new tokens since the event before */
    int32_t finish;              /* CHUNK: RRT_FINISH_… with the last one, else -1 */
    uint64_t text_len;           /* CHUNK: bytes of the answer's text that are certain by now: whole characters, nothing that
                                    may turn out to belong to a stop string */
} rrt_event;

/* Takes what has happened since the last call, at most `capacity` events; *count: how many. Never blocks.
 * Each job has one last event that is no CHUNK; after it the job waits for rrt_job_take or rrt_job_drop. */
rrt_status rrt_poll(rrt_runtime *runtime, rrt_event *out, size_t capacity, size_t stride, size_t *count, rrt_error *err);

/* A descriptor that is readable for poll, select, epoll and kqueue as long as events wait. It may be readable with nothing to
 * tell: *count is 0 then. With edge triggering poll until *count is 0. One thread should do the polling: of two, neither knows
 * whose events came first. It belongs to the runtime: do not read, write or close it. RRT_E_UNSUPPORTED on systems that have none. */
rrt_status rrt_event_fd(rrt_runtime *runtime, int32_t *fd, rrt_error *err);

/* What a sequence of a job with RRT_SAMPLE_STREAM has so far, from token `from` on: at most `capacity` tokens; *count: how many
 * were written. NULL for an array that is not wanted. RRT_E_ARG for a job that does not stream, RRT_E_RANGE for a sequence that
 * it does not have. */
rrt_status rrt_job_peek(rrt_runtime *runtime, uint64_t job, uint32_t sequence, size_t from, uint32_t *ids, float *logprob,
                        float *sample_logprob, size_t capacity, size_t *count, rrt_error *err);
/* The same for its text, from byte `from` on; `capacity` may cut a character. */
rrt_status rrt_job_peek_text(rrt_runtime *runtime, uint64_t job, uint32_t sequence, size_t from, char *text,
                             size_t capacity, size_t *count, rrt_error *err);
/* Sequences that have ended, and sequences in all. */
rrt_status rrt_job_progress(rrt_runtime *runtime, uint64_t job, size_t *finished, size_t *total, rrt_error *err);

typedef struct rrt_result rrt_result;

/* Takes the result of a job, whose number is gone then, with the events that were not polled. RRT_PENDING while it is not done. A failed job returns its own
 * status and text, and is gone too. A cancelled sampling job has the tokens it got. */
rrt_status rrt_job_take(rrt_runtime *runtime, uint64_t job, rrt_result **out, rrt_error *err);
/* Asks a job to stop; it ends within one step. May be called again. */
rrt_status rrt_job_cancel(rrt_runtime *runtime, uint64_t job, rrt_error *err);
/* Cancels a job and forgets it: its number and its events are gone. Does not block, except that a rollout's threads are waited
 * for: a step. */
rrt_status rrt_job_drop(rrt_runtime *runtime, uint64_t job, rrt_error *err);

/* ---- sessions ----------------------------------------------------------------------------------------------------
 * A rollout of several turns: a sequence that grows by what is appended (a prompt, a tool's answer) and by what is sampled.
 * Ids stay as they are, nothing is encoded again, and the KV cache keeps the turns as long as there is room. Sampling in a
 * session returns what sampling its tokens as one prompt returns, to the bit. */

typedef struct rrt_session rrt_session;

/* Begins with these tokens; there may be none. */
rrt_status rrt_session_new(rrt_model *model, const uint32_t *ids, size_t count, rrt_session **out, rrt_error *err);
/* RRT_E_BUSY while a job samples, RRT_E_LIMIT beyond the model's context: nothing is appended then. */
rrt_status rrt_session_append(rrt_session *session, const uint32_t *ids, size_t count, rrt_error *err);
/* Samples the next turn. The request's model is NULL or the session's, its prompts are empty, and n_samples is 1. The turn is
 * part of the session once rrt_job_take has returned it; a job that is dropped leaves the session as it was. RRT_E_BUSY while
 * another job samples. */
rrt_status rrt_session_sample(rrt_session *session, const rrt_sample_req *req, uint64_t *job, rrt_error *err);
/* All its tokens. */
rrt_status rrt_session_tokens(const rrt_session *session, uint32_t *ids, size_t capacity, size_t *need, rrt_error *err);
/* Another session with the same tokens, which goes its own way. */
rrt_status rrt_session_fork(const rrt_session *session, rrt_session **out, rrt_error *err);
/* A job that samples for it goes on. */
void rrt_session_free(rrt_session *session);

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
    const float *ceiling;           /* largest logit / temperature that could have been drawn; infinity unless typical_p
                                       cuts from above */
    const size_t *kept_offsets;     /* [tokens + 1] into kept_ids; NULL if the request did not ask for them */
    const uint32_t *kept_ids;       /* the tokens that could have been drawn; none where they were too many */
} rrt_sequences_view;

/* What a scoring job returned, in the order of the sequences. */
typedef struct rrt_scores_view {
    uint32_t struct_size;
    uint32_t reserved;
    size_t count;
    const size_t *offsets;          /* [count + 1] into values */
    const float *values;            /* REWARD: the labels' values; STEP_REWARDS: those of one position after the other;
                                       LOGPROBS: one a token, NaN where nothing precedes it */
    const uint64_t *version;        /* [count] */
    const uint64_t *adapter_version; /* [count]; 0 without an adapter */
    const float *score;             /* [count] rewards: the value of the request's label, at the last position (NaN if
                                       there is none); LOGPROBS: the sum */
    size_t label_count;             /* rewards: values a position; 0 for LOGPROBS */
    const size_t *label_offsets;    /* [label_count + 1] names of the labels, a list of strings */
    const char *label_text;
    const uint32_t *position;       /* STEP_REWARDS: [offsets[count] / label_count] the token after which they were read */
    const float *entropy;           /* LOGPROBS: of the distribution that each token is from, in nats; as values */
} rrt_scores_view;

/* The most likely tokens of each place, for requests with top_logprobs: places are the tokens of rrt_sequences_view or the
 * values of rrt_scores_view. */
typedef struct rrt_topk_view {
    uint32_t struct_size;
    uint32_t reserved;
    size_t count;                   /* places */
    const size_t *offsets;          /* [count + 1] into ids and logprob */
    const uint32_t *ids;            /* best first */
    const float *logprob;           /* temperature 1, whole vocabulary */
} rrt_topk_view;

/* What a rollout adds to rrt_sequences_view, whose sequences and tokens are meant. */
typedef struct rrt_rollout_view {
    uint32_t struct_size;
    uint32_t reserved;
    size_t count;                   /* sequences */
    const float *ref_logprob;       /* [tokens] of the reference; NULL without one, and so the next three */
    const float *kl1;               /* [tokens] k1 = logprob − ref_logprob: unbiased */
    const float *kl2;               /* [tokens] k2 = k1² / 2 */
    const float *kl3;               /* [tokens] k3 = exp(−k1) − 1 + k1: unbiased, never negative */
    size_t reward_count;            /* reward models */
    const float *rewards;           /* [reward_count × count], all sequences of one reward model after the other; NaN where
                                       there is none: the answer was cut off (RRT_FINISH_CANCELLED), is longer than the model
                                       takes, or its text cannot be encoded for it */
    const float *reward;            /* [count] the weighted sum of those that are not NaN; NaN if there is none */
    const float *advantage;         /* [count] */
    size_t group_count;             /* prompts */
    const float *group_mean;        /* [group_count] of the rewards that are not NaN */
    const float *group_std;         /* [group_count] */
    const uint32_t *group_zero_variance; /* [group_count] 1: no two rewards differ, there is nothing to learn */
    const uint32_t *group_best;     /* [group_count] the sequence with the largest reward … */
    const uint32_t *group_worst;    /* … and the one with the smallest: the pair for DPO; UINT32_MAX with zero_variance */
    const uint64_t *reward_version; /* as rewards: the weights that gave them; 0 where nothing did */
    const uint64_t *ref_version;    /* [count] the weights of the reference; NULL without one */
} rrt_rollout_view;

/* What a job has cost. A row is one position of one sequence going through the model once. */
typedef struct rrt_job_timing {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t queued_ns;             /* until its first sequence began */
    uint64_t elapsed_ns;            /* from submission until it was done */
    uint64_t prefill_rows;          /* of prompts and of texts that are scored */
    uint64_t decode_rows;           /* of sampled tokens */
    uint64_t drafted_rows;          /* of guessed tokens */
    uint64_t accepted_rows;         /* … which were right */
    uint64_t recomputed_rows;       /* computed before, and again after making room */
    uint64_t cached_rows;           /* not computed, the cache had them */
    uint64_t sampled_tokens;
    uint64_t preemptions;           /* times a sequence had to make room */
    size_t count;                   /* sequences that were sampled; 0 for scores */
    const uint64_t *sequence_queued_ns;  /* [count] from submission to its first step */
    const uint64_t *sequence_prefill_ns; /* [count] from there to its first token */
    const uint64_t *sequence_decode_ns;  /* [count] from there to its end */
} rrt_job_timing;

/* Set out->struct_size first. RRT_E_ARG for a result of another kind, and for one without top_logprobs. */
rrt_status rrt_result_sequences(const rrt_result *result, rrt_sequences_view *out, rrt_error *err);
rrt_status rrt_result_scores(const rrt_result *result, rrt_scores_view *out, rrt_error *err);
rrt_status rrt_result_topk(const rrt_result *result, rrt_topk_view *out, rrt_error *err);
rrt_status rrt_result_rollout(const rrt_result *result, rrt_rollout_view *out, rrt_error *err);
rrt_status rrt_result_timing(const rrt_result *result, rrt_job_timing *out, rrt_error *err);
void rrt_result_free(rrt_result *result);

/* ---- weights that change ---------------------------------------------------------------------------------------- */

/* What becomes of the sequences that are under way when weights change or work pauses. */
enum {
    RRT_IN_FLIGHT_WAIT = 0,      /* they finish as they began; what has not begun waits */
    RRT_IN_FLIGHT_CANCEL = 1,    /* every job submitted before ends, as by rrt_job_cancel */
    RRT_IN_FLIGHT_KEEP = 2       /* they go on later, with the weights of then: see span_version */
};

/* Stops every model between two steps, until rrt_resume. Jobs may be submitted, and wait. UINT64_MAX: no time limit.
 * RRT_TIMEOUT if sequences do not finish in time, RRT_E_BUSY if they cannot: everything goes on then, unless another pause is in
 * force or on its way. */
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
/* A safetensors file or a checkpoint folder; mapped if the model's own files are, and then not to be changed. */
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

/* Begins an update of an adapter: rrt_update_* as above, with PEFT's names ("base_model.model.model.layers.0.self_attn.q_proj.
 * lora_A.weight" of shape [R, K], "…lora_B.weight" [N, R], "base_model.model.score.weight"; R: the rank, K: inputs, N: outputs), in any dtype, which is taken
 * exactly; NaN and infinities are RRT_E_NONFINITE. rrt_update_file reads a safetensors file, or PEFT's folder with the same
 * config (RRT_E_SHAPE otherwise). A commit waits for nobody: jobs submitted after it use the new values, those before end with
 * what they began with; RRT_E_UNSUPPORTED: too large for a device that computes in f16. Of opts expect_version
 * (RRT_E_CONFLICT: another version) and require count, other flags do not; of two updates the second to be committed gets
 * RRT_E_CONFLICT; storage and in_flight must be 0, or RRT_E_UNSUPPORTED, as
 * rrt_update_delta is. RRT_E_LIMIT: the memory budget has no room for the new values beside the old ones. */
rrt_status rrt_adapter_update_begin(rrt_adapter *adapter, const rrt_update_opts *opts, rrt_update **out, rrt_error *err);

/* Adds an adapter into the model's weights (rounded to their dtype) as an update in shadow, under new_version; of opts what
 * is said about tensors does not count, and RRT_STORAGE_IN_PLACE is RRT_E_ARG. Unmerging puts the weights back to the bit; RRT_E_CONFLICT if they have changed
 * since, if it is merged already, or is not. */
rrt_status rrt_adapter_merge(rrt_adapter *adapter, const rrt_update_opts *opts, uint64_t new_version, rrt_error *err);
rrt_status rrt_adapter_unmerge(rrt_adapter *adapter, const rrt_update_opts *opts, uint64_t new_version, rrt_error *err);

/* ---- following a folder ------------------------------------------------------------------------------------------ */

typedef struct rrt_follow_opts {
    uint32_t struct_size;
    uint32_t flags;              /* 0 */
    uint64_t interval_ns;        /* how often the folder is looked at; 0: every 200 ms */
    const rrt_update_opts *update; /* how each update is made (what it must bring and expects does not count); NULL:
                                    RRT_UPDATE_OPTS_INIT */
} rrt_follow_opts;
#define RRT_FOLLOW_OPTS_INIT { sizeof(rrt_follow_opts), 0, 200000000u, NULL }
void rrt_follow_opts_init(rrt_follow_opts *opts);

typedef struct rrt_follower rrt_follower;

/* Keeps the model at the newest weights of a folder: of its subfolders step_N, checkpoints or deltas, the one with the largest
 * N above the model's version becomes the model's weights, with version N. They must appear whole, by a rename. */
rrt_status rrt_follow(rrt_model *model, const char *path, size_t path_len, const rrt_follow_opts *opts,
                      rrt_follower **out, rrt_error *err);
/* Waits until the model has this version or a later one, whoever brought it there; RRT_TIMEOUT if it does not in time. A
 * follower that a lost device or a bug has stopped returns that status. */
rrt_status rrt_follower_wait(rrt_follower *follower, uint64_t version, uint64_t timeout_ns, rrt_error *err);
/* *updates: those made so far. Returns what went wrong when the folder was last looked at; *updates is written then, too. */
rrt_status rrt_follower_state(const rrt_follower *follower, uint64_t *updates, rrt_error *err);
/* Stops looking; waits for an update that is under way. */
void rrt_follower_free(rrt_follower *follower);

/* ---- numbers ----------------------------------------------------------------------------------------------------- */

/* Bytes that are held now. */
typedef struct rrt_memory {
    uint32_t struct_size;
    uint32_t models;
    uint64_t allocated;          /* the sum of weights, kv_cache, scratch, host and adapters */
    uint64_t mapped;             /* weights used in place in mapped files */
    uint64_t weights;            /* in allocated memory of the device */
    uint64_t kv_cache;
    uint64_t scratch;            /* activations and logits */
    uint64_t host;               /* weights in host memory beside those of a GPU */
    uint64_t adapters;
    uint64_t budget;             /* what may be allocated; UINT64_MAX: no bound */
} rrt_memory;

/* Set out->struct_size first. Of one model, or the sum over all that live. */
rrt_status rrt_model_memory(const rrt_model *model, rrt_memory *out, rrt_error *err);
rrt_status rrt_memory_stats(const rrt_runtime *runtime, rrt_memory *out, rrt_error *err);

/* What was done since the model was loaded (the runtime opened) or rrt_stats_reset, and what is going on. */
typedef struct rrt_timing {
    uint32_t struct_size;
    uint32_t reserved;
    uint64_t steps;
    uint64_t step_ns;            /* time spent in steps, scheduling included */
    uint64_t prefill_rows;       /* rows as in rrt_job_timing */
    uint64_t decode_rows;
    uint64_t drafted_rows;
    uint64_t accepted_rows;
    uint64_t recomputed_rows;
    uint64_t cached_rows;
    uint64_t sampled_tokens;
    uint64_t preemptions;
    uint64_t longest_wait_ns;    /* of a sequence, between submission and its first step */
    uint64_t kv_evictions;       /* blocks of 16 positions whose content was given up for another one's */
    uint64_t kv_copies;
    uint64_t submitted;          /* jobs; of the runtime alone, as the next one */
    uint64_t refused;            /* jobs, because the queue was full */
    uint64_t jobs;               /* now: not done */
    uint64_t running;            /* now: sequences that take part in steps */
    uint64_t waiting;            /* now: sequences that wait for their turn */
    uint64_t queued_tokens;      /* now: positions that the jobs can come to; of the runtime alone */
    uint64_t kv_blocks;          /* now: blocks of 16 positions in all */
    uint64_t kv_used;            /* now: of sequences */
    uint64_t kv_cached;          /* now: kept for whoever begins with the same tokens */
} rrt_timing;

/* Set out->struct_size first. Of one model, or the sum over all that live. */
rrt_status rrt_model_timing(const rrt_model *model, rrt_timing *out, rrt_error *err);
rrt_status rrt_timing_stats(const rrt_runtime *runtime, rrt_timing *out, rrt_error *err);
/* Counts from here, in all models. */
rrt_status rrt_stats_reset(rrt_runtime *runtime, rrt_error *err);

/* Gives memory of caches back to the system: forgets all prefixes and takes the KV cache anew, in models that have nothing
 * to do and are awake. Results do not depend on it. If a cache cannot be had again (RRT_E_OOM_DEVICE, RRT_E_OOM_HOST) its
 * model is asleep: rrt_model_wake. The other models are trimmed all the same; the first error is returned. */
rrt_status rrt_trim(rrt_runtime *runtime, rrt_error *err);

#ifdef __cplusplus
}
#endif
#endif
