/* moec.h: the C interface of the moec runtime (libmoec.so.1, libmoec.a). C99 and C++17.

   A compiled model is a folder: one generated library (pure code) and packed weights, one file per
   layer. The runtime opens it, checks it, allocates, and launches; this header is all of it.

       moec_model *model;      moec_open("mixtral.moec", NULL, &model, &err);
       moec_context *context;  moec_context_create(model, NULL, &context, &err);
       moec_call call;         MOEC_INIT(call); call.x = &x; call.y = &y;
       moec_run(context, 3, &call, &err);

   Promises
   - No call throws, aborts, prints, parses text (but for the kernel's own CPU quota, when a pool
     is created with threads = 0) or installs a signal handler. Of the environment only MOEC_CPU is
     read (moec_open), a cap on the CPU level such as MOEC_CPU=x86-64-v3.
   - A function that can fail returns 0 or the number of an error; moec_error_name() names it. If
     the caller passes a moec_error, its message says what was expected and what was got:
     "E-SHAPE: moec_run: x: expected [T, 2048], but got [4, 1024]". A failed call changes nothing,
     except that a failed moec_run may leave its outputs partly written.
   - The results of one layer are equal bits, within one library and one level, for any number
     of lanes, any executor, any max_tokens, any batch a token is in, and any repetition.
   - Every struct starts with its own size and only ever grows at its end: fill it with MOEC_INIT,
     then set what is wanted. Zero means default or not wanted. Flag bits that the library does not
     know are refused (E-ARGUMENT), and so are non-zero fields beyond those it knows.

   Letters: T tokens, H hidden width, F width of one expert, E experts, K experts a token is routed
   to by its layer, k expert slots a token has in one call (k = K unless `experts` is given). */
#ifndef MOEC_H
#define MOEC_H

#include <stdint.h>
#include <string.h>

#include "moec/dlpack.h"

#ifndef MOEC_API
#define MOEC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Version of this interface, major << 16 | minor. The library's file name carries the major number
   (libmoec.so.<major>). The runtime opens generated code of its own major number whose minor number
   is not above its own (else E-ABI). */
#define MOEC_ABI 0x00010003u

/* Clears the struct variable `v` and sets its struct_size. */
#define MOEC_INIT(v) (memset(&(v), 0, sizeof(v)), (void)((v).struct_size = sizeof(v)))

/* Code and weights of one model on one device. Any number of threads may use it at once. */
typedef struct moec_model moec_model;

/* Workspace and lanes of a caller. Serves every layer of its model, one call at a time. */
typedef struct moec_context moec_context;

/* Generated code. lib<name>.so exports exactly one symbol, `<name>_moec_module`, of this type. */
typedef struct moec_module moec_module;

/* An error, in memory of the caller (so every thread has its own; 512 bytes for ever). Wherever a
   function takes a moec_error*, NULL means that the message is not wanted. Written by every call it
   is passed to: code 0 and an empty message on success. */
typedef struct {
  int32_t code;      /* 0, or the number of the error (the function's return value) */
  char message[508]; /* "E-NAME: where: expected ..., but got ...", NUL-terminated UTF-8 */
} moec_error;

/* Error numbers, MOEC_E_SHAPE = 101 and so on. Numbers are never reused or changed. */
enum {
  MOEC_OK = 0,
#define MOEC_ERROR(number, name, text, sentence) MOEC_E_##name = number,
#include "moec/errors.def"
#undef MOEC_ERROR
};

/* The name of an error number, as "E-SHAPE"; "OK" for 0, "E-UNKNOWN" for a number that is none.
   Never NULL; lives for ever. */
MOEC_API const char *moec_error_name(int code);

/* The MOEC_ABI of the runtime that was loaded (the macro is that of the header compiled against).
 */
MOEC_API uint32_t moec_abi_version(void);

/* -------------------------------------------------------------------------------- threads ----- */

/* Where parallel work runs: the pool below, or an object of the host's (OpenMP, torch's pool). */
typedef struct {
  size_t struct_size;
  void *self;    /* passed to run() */
  int32_t lanes; /* >= 1: the most tasks that run at once; no result depends on it */
  int32_t gang;  /* 1: the n <= lanes tasks of one run() all run at the same time and may wait for
                    each other in a spin loop (one run() per call of moec_run);
                    0: no such promise, so every fence is the return of a run() */
  /* Calls task(arg, i) once for each i in 0 ... n-1 and returns after all have returned. n >= 1.
     Must be callable from several threads at once. A task never throws and never calls run(). */
  void (*run)(void *self, int32_t n, void (*task)(void *arg, int32_t i), void *arg);
} moec_executor;

typedef struct {
  size_t struct_size;
  int32_t threads; /* tasks at once, the calling thread included; 0: the smaller of the CPUs this
                      thread may run on (affinity) and the CPU quota of its control group */
  int32_t spin_us; /* microseconds a worker polls for work before it sleeps; 0: the default, which
                      is 50 (sleeps at once with more threads than CPUs); -1: sleeps at once */
} moec_pool_options;

/* Creates a pool of threads - 1 workers with gang = 1. The calling thread of run() is task 0;
   callers from several threads queue. The pool may be used after fork(): the child starts workers
   of its own at its first run(). Both arguments `options` and `error` may be NULL.
   E-ARGUMENT (threads or spin_us out of range), E-MEMORY, E-IO (the system gave no thread). */
MOEC_API int moec_pool_create(const moec_pool_options *options, moec_executor **pool,
                              moec_error *error);

/* Ends the workers and frees the pool. No run() may be in progress and no context may still use it.
   NULL is ignored. */
MOEC_API void moec_pool_destroy(moec_executor *pool);

/* ---------------------------------------------------------------------------------- model ----- */

/* Where weights come from (moec_open_options.load). */
enum {
  MOEC_MAP,  /* map the files: starts at once, memory is shared between processes; in huge pages
                where the file system caches files so. Replace a mapped file by renaming another
                over it; one that is cut short ends the process (SIGBUS) */
  MOEC_COPY, /* read the files into private huge pages: slower to start, fastest to run */
  MOEC_NONE  /* no files: moec_set_weight brings every weight before its layer is run */
};

typedef struct {
  size_t struct_size;
  const char *weights;   /* folder of the packed files; NULL: `dir`/weights. Another checkpoint of
                            equal structure is another folder for the same code */
  DLDevice device;       /* {0,0}: the CPU; {kDLCUDA, n}: a CUDA device, for a library that was
                            compiled for it. Weights live on that device, nowhere twice */
  int32_t load;          /* MOEC_MAP | MOEC_COPY | MOEC_NONE */
  int32_t verify;        /* 1: check the hash of every weight byte; 0: ids, sizes and headers */
  const char *cpu_level; /* highest level to use, as "x86-64-v4"; NULL: the best this machine and
                            the library both have. MOEC_CPU is a second cap of the same form.
                            On a CUDA device: the level to use, as "sm_80" (MOEC_CPU is not read) */
} moec_open_options;

/* Opens the compiled model in folder `dir` (it holds exactly one lib*.so). `options` may be NULL.
   Errors, after which *model is NULL and nothing stays open or allocated:
   E-ARGUMENT (null pointer, unknown load), E-PATH (no library in the folder, or several; a file
   name that is not plain), E-IO (a file cannot be read), E-ABI (code of another major or a later
   minor version), E-ISA (this machine or the library lacks the level), E-UNSUPPORTED and
   E-NO-DEVICE (device); on a CUDA device also E-NO-DRIVER, E-DRIVER-OLD, E-ARCH (no code for this
   device), E-DEVICE-MEMORY, E-LAUNCH (another error of the driver) and E-FORK; E-FILE-FORMAT (not a
   packed file, truncated, of a later schema), E-WEIGHTS (weights of other code), E-LAYOUT (tensors
   other than the code wants), E-HASH (verify: bytes changed), E-MEMORY. */
MOEC_API int moec_open(const char *dir, const moec_open_options *options, moec_model **model,
                       moec_error *error);

/* The same for generated code that is linked into the program: `module` is its <name>_moec_module.
   There is no folder, so options->weights must be set or options->load be MOEC_NONE (E-ARGUMENT).
 */
MOEC_API int moec_open_module(const moec_module *module, const moec_open_options *options,
                              moec_model **model, moec_error *error);

/* Gives the model back. It ends when the last of its contexts is destroyed. NULL is ignored. */
MOEC_API void moec_close(moec_model *model);

/* Flag of moec_set_weight: use `src` in place (layout "rows-1") instead of packing a copy.
   Not built yet: refused with E-UNSUPPORTED. */
enum { MOEC_BORROW = 1 };

/* Sets a weight from memory: live models, RL updates, merged LoRA. Packs a copy; a mapped file is
   never changed (the layer first gets memory of its own).
   layer   0 ... moec_layer_count - 1
   role    with expert = e              with expert = -1 (all)
           "gate", "up"    [F,H]        [E,F,H]       half of the fused gate_up weight
           "gate_up"       [2F,H]       [E,2F,H]      rows 0...F-1 gate, F...2F-1 up
           "down"          [H,F]        [E,H,F]
           "router"        [1,H], [H]   [E,H]
           A dense layer has E = 1 and takes expert 0 or -1, with or without the leading dimension.
   src     f32, bf16 or f16, on the CPU, any strides; rounded to nearest even into the format of the
           layer. moec_layer_info.format tells it
   flags   0 (MOEC_BORROW)
   The layer must not be running meanwhile: neither a call of it nor another moec_set_weight.
   E-ARGUMENT (null pointer, unknown layer, role or flag; expert out of range), E-SHAPE, E-DTYPE,
   E-DEVICE, E-NONFINITE (src holds NaN or infinity: nothing is changed), E-UNSUPPORTED,
   E-MEMORY. */
MOEC_API int moec_set_weight(moec_model *model, int32_t layer, const char *role, int64_t expert,
                             const DLTensor *src, uint32_t flags, moec_error *error);

/* The inverse: unpacks a matrix of all experts into `dst`, bit by bit what was packed (bf16 into
   f32 is exact; f32 into bf16 is rounded). role    "gate", "up" [E,F,H], "gate_up" [E,2F,H], "down"
   [E,H,F]; not the router nor vectors, which are small: keep them dst     f32 or bf16, on the CPU,
   rank 3 (a dense layer: rank 2 or 3), any strides May run beside moec_run. E-ARGUMENT, E-SHAPE,
   E-DTYPE, E-DEVICE, as above; E-WEIGHTS (a part was never set). */
MOEC_API int moec_get_weight(const moec_model *model, int32_t layer, const char *role,
                             DLTensor *dst, moec_error *error);

/* Frees the memory of a layer's weights, which all have to be set again before it runs. For models
   opened with MOEC_NONE (else E-ARGUMENT). The layer must not be running meanwhile. */
MOEC_API int moec_release_weights(moec_model *model, int32_t layer, moec_error *error);

/* Inputs a layer may need besides x (moec_layer_info.needs). */
enum {
  MOEC_TOKEN_IDS = 1,
  MOEC_TOKEN_TYPES = 2,
  MOEC_SEQUENCES = 4,
  MOEC_ROUTER_X = 8,
  MOEC_STATE = 16
};

/* What a layer is. Strings live as long as the model. */
typedef struct {
  size_t struct_size;
  const char *name;      /* "model.layers.3.mlp" */
  int32_t index;         /* number of the decoder layer it belongs to */
  int32_t kind;          /* 0 MoE, 1 dense FFN */
  int64_t H, F, E, K;    /* dense: F is the whole width, E = 1, K = 1 */
  int64_t S;             /* width of the shared expert; 0: none */
  int64_t W;             /* width of the carried router state; 0: none */
  uint32_t needs;        /* MOEC_TOKEN_IDS | ...: inputs without which a call is refused */
  DLDataType compute;    /* x is rounded to this when it is read, and an expert's row before it is
                            weighted; sums are f32; y is rounded once */
  const char *format;    /* of the experts' weights: "f32", "bf16" */
  const char *layout;    /* of the experts' weights: "panel32-1" */
  const char *level;     /* of the code that runs: "x86-64-v4" */
  uint64_t weight_bytes; /* packed, padding included */
  uint64_t active_flops; /* floating-point operations per token */
} moec_layer_info;

/* Number of layers, in model order. 0 for NULL. */
MOEC_API int32_t moec_layer_count(const moec_model *model);

/* Fills *info, whose struct_size must be set (MOEC_INIT). E-ARGUMENT. */
MOEC_API int moec_get_layer_info(const moec_model *model, int32_t layer, moec_layer_info *info,
                                 moec_error *error);

/* -------------------------------------------------------------------------------- context ----- */

typedef struct {
  size_t struct_size;
  int64_t max_tokens;            /* bounds the workspace, not T: a larger T runs in chunks, with the
                                    same bits; 0: 512 */
  const moec_executor *executor; /* NULL: the calling thread alone. Outlives the context. On a GPU
                                    NULL */
  void *workspace;               /* 64-byte aligned (on a GPU 256, and memory of that device); NULL:
                                    allocated by moec_context_create. Else it must outlive the
                                    context and belongs to it alone */
  uint64_t workspace_bytes;      /* of `workspace`: at least moec_workspace_size() */
} moec_context_options;

/* Bytes a context with these options needs, whether or not they name a workspace. `options` may be
   NULL. E-ARGUMENT (null pointer, max_tokens < 0, bad executor). */
MOEC_API int moec_workspace_size(const moec_model *model, const moec_context_options *options,
                                 uint64_t *bytes, moec_error *error);

/* Creates a context, which holds a reference to its model. All allocation is here; moec_run never
   allocates. A context works in a child of fork() as well, but for those of a GPU (E-FORK).
   `options` may be NULL.
   E-ARGUMENT (as above; workspace misaligned or too small), E-MEMORY, E-DEVICE-MEMORY (nothing
   stays allocated, and the model and its other contexts go on). */
MOEC_API int moec_context_create(moec_model *model, const moec_context_options *options,
                                 moec_context **context, moec_error *error);

/* Frees the context. No call may be running in it. NULL is ignored. */
MOEC_API void moec_context_destroy(moec_context *context);

/* ----------------------------------------------------------------------------------- call ----- */

/* moec_call.flags */
enum {
  MOEC_ROUTED_ONLY = 1, /* the sum of w * f(x) alone, as transformers' Experts module computes it:
                           no shared expert, no scale on the sum, no norm. Without it a call with
                           `experts` given computes the whole layer with that routing */
  MOEC_ACCUMULATE = 2,  /* y += result: residual add, partial sums (y stays otherwise an output) */
  MOEC_SKIP_FOREIGN = 4 /* ids outside [0,E) are skipped; without it they are E-EXPERT-ID. -1 is
                           skipped always */
};

/* One call of one layer. Tensors are on the model's device, aligned to their element, contiguous in
   their last dimension; row stride >= width; strides NULL means compact; byte_offset is added to
   data. An output overlaps no other tensor of the call. T is the first dimension of x. */
typedef struct {
  size_t struct_size;
  uint32_t flags;            /* MOEC_ROUTED_ONLY | ... */
  void *stream;              /* CUDA: the CUstream the call is enqueued on; CPU: NULL */
  const DLTensor *x;         /* [T,H] f32|bf16 */
  const DLTensor *experts;   /* [T,k] i32|i64, given together with `weights`: the router is skipped.
                                k >= 0 need not be K. An id may occur twice in a row */
  const DLTensor *weights;   /* [T,k] f32|bf16|f16 */
  const DLTensor *router_x;  /* [T,H], of x's type: what the router reads instead of x
                                (MOEC_ROUTER_X); not with `experts` given */
  const DLTensor *token_ids; /* [T] i32|i64 (MOEC_TOKEN_IDS) */
  const DLTensor *token_types; /* [T] i32|i64 (MOEC_TOKEN_TYPES) */
  const DLTensor *sequences;   /* [B+1] i32|i64: first token of each sequence (MOEC_SEQUENCES) */
  const DLTensor *state;       /* [T,W] f32: carried router state (MOEC_STATE) */
  DLTensor *y;                 /* [T,H] f32|bf16, whatever x is; NULL: route only */
  DLTensor *experts_out;       /* [T,K] i32|i64: chosen ids, by falling score, then by id.
                                  Not with `experts` given (nor the next two) */
  DLTensor *weights_out;       /* [T,K] f32: their weights */
  DLTensor *logits_out;        /* [T,E] f32: what the router computed before its score function */
  DLTensor *counts_out;        /* [E+1] i32: rows each expert got, then rows skipped */
  DLTensor *state_out;         /* [T,W] f32 (MOEC_STATE) */
} moec_call;

/* Runs one layer and returns when its outputs are written. T = 0 is fine. A NaN or infinity in x
   stays in its own row.
   On a GPU it returns when everything is enqueued on call->stream: it never waits for the device,
   reads nothing back and allocates nothing, so it may be captured in a CUDA graph. Two calls in one
   context must be ordered by the caller where they are on different streams: they share the
   workspace. Foreign ids are skipped and reported by moec_context_status. E-LAUNCH: the driver
   refused a launch, E-FORK.
   On the CPU it runs in the floating-point environment round to nearest, subnormals kept, whatever
   the caller's is.
   E-ARGUMENT, E-SHAPE, E-DTYPE, E-STRIDE, E-OVERLAP, E-DEVICE: a tensor is missing or not as above;
      E-EXPERT-ID: an id outside [0,E), before anything is computed;
   E-NEEDS: an input the layer needs is missing (one it does not need: E-ARGUMENT);
   E-BUSY: the context is running another call; E-WEIGHTS: a weight was never set (MOEC_NONE);
   E-NONFINITE is never raised here: weights are checked when packed, x is the caller's. */
MOEC_API int moec_run(moec_context *context, int32_t layer, const moec_call *call,
                      moec_error *error);

/* CUDA, its stream idle: what the device reported since the last check, once: E-EXPERT-ID, E-LAUNCH
   (a fault that the driver found; most leave the process without the device), E-FORK. On the CPU
   always 0, as moec_run has reported everything. E-ARGUMENT (null pointer). */
MOEC_API int moec_context_status(moec_context *context, moec_error *error);

#ifdef __cplusplus
}
#endif
#endif /* MOEC_H */
