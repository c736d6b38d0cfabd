/* What the files of the runtime share. Nothing here is exported. */
#ifndef MOEC_RUNTIME_INTERNAL_H
#define MOEC_RUNTIME_INTERNAL_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#define MOEC_API __attribute__((visibility("default")))
#include "moe/Runtime/Machine.h"
#include "moec.h"
#include "moec/module.h"

/* Sizes that generated code and packed files rely on. */
_Static_assert(sizeof(moec_error) == 512, "moec_error is 512 bytes for ever");
_Static_assert(sizeof(moec_id_block) == 4096, "the id block is one page");
_Static_assert(offsetof(moec_id_block, tensors) == 88, "layout of the id block");
_Static_assert(sizeof(moec_id_tensor) == 56, "layout of the id block");
_Static_assert(offsetof(moec_frame, ticket) == 1176, "layout of the frame");
_Static_assert(offsetof(moec_frame, weights) == 8, "layout of the frame");
_Static_assert(offsetof(moec_frame, x) == 16, "layout of the frame");
_Static_assert(offsetof(moec_frame, x_stride) == 24, "layout of the frame");
_Static_assert(offsetof(moec_frame, y) == 32, "layout of the frame");
_Static_assert(offsetof(moec_frame, y_stride) == 40, "layout of the frame");
_Static_assert(offsetof(moec_frame, tokens) == 48, "layout of the frame");
_Static_assert(offsetof(moec_frame, slots) == 56, "layout of the frame");
_Static_assert(offsetof(moec_frame, experts) == 64, "layout of the frame");
_Static_assert(offsetof(moec_frame, expert_weights) == 72, "layout of the frame");
_Static_assert(offsetof(moec_frame, logits) == 80, "layout of the frame");
_Static_assert(offsetof(moec_frame, logits_stride) == 88, "layout of the frame");
_Static_assert(offsetof(moec_frame, offsets) == 96, "layout of the frame");
_Static_assert(offsetof(moec_frame, accumulate) == 104, "layout of the frame");
_Static_assert(offsetof(moec_frame, lanes) == 112, "layout of the frame");
_Static_assert(offsetof(moec_frame, counters) == 128, "layout of the frame");

#define MOEC_MAX_WEIGHTS 16  /* tensors of a layer: what the id block has room for */
#define MOEC_PAGE 4096u      /* tensors of a packed file begin and end at multiples of this */
#define MOEC_HUGE (2u << 20) /* alignment of weights and workspaces */
#define MOEC_MAX_LANES 4095  /* the pool's word has 12 bits for the number of tasks */

/* ---- errors (Error.c) ---- */

/* Writes "E-NAME: " and the formatted text to `error`, if there is one. Returns `code`. */
__attribute__((format(printf, 3, 4))) int moec_fail(moec_error *error, int code, const char *format,
                                                    ...);
int moec_succeed(moec_error *error);

/* A struct of the caller: at least `known` bytes, and zero beyond the bytes we know. */
int moec_check_struct(const void *s, size_t known, const char *where, const char *type,
                      moec_error *error);

/* ---- machine (Machine.c) ---- */

bool moec_has_avx2(void); /* AVX2, FMA and F16C, enabled by the system */

void *moec_map_memory(size_t bytes); /* zeroed, huge-page aligned if large; NULL: no memory */
void moec_unmap_memory(void *p, size_t bytes);

/* ---- pool (Pool.c) ---- */

bool moec_is_pool(const moec_executor *e);
int moec_pool_ready(const moec_executor *e); /* starts workers (child of fork); 0 or an errno */
uint32_t moec_fork_generation(void); /* number of forks between the first process and this */
void moec_watch_forks(void);         /* must precede the fork that shall be counted */

static inline void moec_pause(void) { __builtin_ia32_pause(); }
int64_t moec_now_ns(void);
void moec_futex_wait(_Atomic uint32_t *word, uint32_t value);
void moec_futex_wake(_Atomic uint32_t *word, int32_t count);

/* ---- model (Model.c, LayerWeights.c) ---- */

typedef struct moec_job moec_job;

typedef struct {
  const moec_layer_desc *desc;
  const moec_level_code *level;
  const moec_entry *entry[3][2][2]; /* [kind][x dtype][y dtype]; route: y dtype 0 */
  const void *weights[MOEC_MAX_WEIGHTS];
  unsigned char *memory; /* what the weights lie in */
  size_t memory_bytes;
  bool mapped;                           /* memory is a file: read only */
  uint64_t device_memory;                /* the same on a GPU */
  int64_t missing;                       /* (expert, part) matrices that were never set; 0: runs */
  unsigned char *have[MOEC_MAX_WEIGHTS]; /* MOEC_NONE: one byte per row group that was set */
} moec_layer_state;

/* Where weights, workspaces and tensors live, and what runs there. Functions that return int set
   the error and return its number. */
typedef struct moec_target {
  uint32_t alignment;  /* of a workspace and everything in it */
  bool has_lanes;      /* runs on an executor */
  uint32_t more_bytes; /* of a workspace: the end of it, for `attach` */
  /* Of a model whose code was checked: finds the device, loads code. `close` undoes it. `cap` is a
     level for it to take, of the user's, or NULL. */
  int (*open)(moec_model *, const char *cap, const char *where, moec_error *);
  void (*close)(moec_model *);
  /* The weights of a layer were loaded into host memory: brings them to the device. */
  int (*place)(moec_model *, moec_layer_state *, const char *where, moec_error *);
  /* Memory of its own for every weight of a layer; gives a layer's memory back. */
  int (*arena)(moec_model *, moec_layer_state *, const char *where, moec_error *);
  void (*drop)(moec_model *, moec_layer_state *);
  /* Bytes of a weight for the host to read or change; `give_back` writes them if `changed`. */
  int (*borrow)(moec_model *, const void *weight, uint64_t bytes, void **host, const char *where,
                moec_error *);
  int (*give_back)(moec_model *, const void *weight, uint64_t bytes, void *host, bool changed,
                   const char *where, moec_error *);
  int (*allocate)(moec_model *, uint64_t bytes, int64_t max_tokens, void **memory,
                  const char *where, moec_error *); /* of a context */
  void (*release)(moec_model *, void *memory, uint64_t bytes);
  int (*attach)(moec_context *, void *more, const char *where, moec_error *); /* ends creation */

  /* A call, in this order: */
  int (*begin)(moec_context *, const moec_job *);
  void (*clear)(moec_context *, void *to, int64_t step, int64_t width, int64_t rows); /* bytes */
  void (*take)(moec_context *, const moec_job *, int64_t first, int64_t rows); /* ids, weights */
  void (*run)(moec_context *, const moec_entry *);
  void (*give)(moec_context *, const moec_job *, int64_t first, int64_t rows); /* routing, counts */
  int (*end)(moec_context *, const moec_job *, int result); /* after every begin that succeeded */
  int (*status)(moec_context *, moec_error *);
} moec_target;

extern const moec_target moec_cpu_target;  /* CpuTarget.c */
extern const moec_target moec_cuda_target; /* Cuda*.c */

struct moec_model {
  atomic_int references;
  const moec_target *target;
  DLDevice device;
  struct moec_gpu *gpu; /* of the target */
  const char *level;    /* of every layer, where the target has chosen it; else NULL */
  const moec_module *module;
  void *handle; /* dlopen */
  int32_t layer_count;
  moec_layer_state *layers;
};

/* Code of a GPU. */
static inline bool moec_has_images(const moec_module *m) {
  return m->struct_size >= offsetof(moec_module, gpu_level_count) && m->image_count > 0;
}
uint64_t moec_weight_packed_bytes(const moec_weight_desc *w);
int moec_format_dtype(const char *format); /* MOEC_DT_F32 | MOEC_DT_BF16, -1: neither */
/* MOEC_NONE: no piece of this weight was set; returns how many there are. */
int64_t moec_forget_weight(moec_layer_state *layer, int32_t weight);
uint64_t moec_layer_bytes(const moec_layer_code *code); /* of its weights */
int moec_layer_arena(moec_layer_state *layer); /* host memory for every weight; -1: no memory */

/* ---- tensors (Tensor.c) ---- */

static const DLDevice moec_host = {kDLCPU, 0};

typedef struct {
  char *data;     /* byte_offset added */
  int32_t dtype;  /* MOEC_DT_... or MOEC_DT_I32 */
  int64_t stride; /* elements between rows */
} moec_view;
enum { MOEC_DT_I32 = 16, MOEC_DT_I64 = 17, MOEC_DT_OTHER = -1 };

int32_t moec_dtype(DLDataType t);
int32_t moec_dtype_bytes(int32_t dtype);
void moec_dtype_text(DLDataType t, char text[24]);
int moec_check_device(const DLTensor *t, DLDevice device, const char *where, const char *name,
                      moec_error *error);

#endif
