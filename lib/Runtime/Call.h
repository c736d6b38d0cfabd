/* A call of moec_run on its way: shared by the general part (CheckCall.c, Run.c) and the
   targets. */
#ifndef MOEC_RUNTIME_CALL_H
#define MOEC_RUNTIME_CALL_H

#include "Internal.h"

/* What a context has on a GPU. */
typedef struct {
  moec_gpu_launcher launcher; /* self is the context */
  void *stream;
  uint64_t
      *status; /* on the device: smallest token << 32 | slot with a foreign id; all ones: none */
  int failure; /* of the first launch of this call that failed, and what it was: */
  const char *kernel;
  uint32_t grid[2], block;
  const char *layer; /* of the last call, for what the device reports later */
  int64_t T;
} moec_gpu_call;

struct moec_context {
  moec_model *model;
  moec_executor executor; /* a copy; lanes = 1 and run = NULL: the calling thread alone */
  int32_t lanes;
  uint32_t forks; /* fork generation in which the pool was last known to have its workers */
  int64_t max_tokens;
  void *owned; /* workspace, if allocated here */
  uint64_t owned_bytes;
  int32_t *ids;     /* [rows] */
  float *weights;   /* [rows] */
  int32_t *offsets; /* [E+1] */
  float *logits;    /* [max_tokens, E]: where `route` writes what nobody asked for */
  void *scratch;    /* what generated code plans */
  uint64_t scratch_bytes;
  moec_gpu_call gpu;
  int64_t spin_ns;                       /* how long a lane polls at a fence before it sleeps */
  _Alignas(64) _Atomic uint32_t busy;    /* 0, or 1 + the fork generation of the call that runs */
  _Alignas(64) _Atomic uint32_t arrived; /* the fence between stages */
  _Alignas(64) _Atomic uint32_t fence;
  _Atomic uint32_t sleepers;
  const moec_entry *entry;
  int32_t stage; /* gang = 0 */
  _Alignas(64) moec_frame frame;
};

enum { F32 = 1, BF16 = 2, F16 = 4, I32 = 8, I64 = 16, MOST_TENSORS = 9 };

typedef struct {
  const char *name;
  uintptr_t begin, end; /* bytes from the first to after the last element */
  uint64_t width, step; /* bytes of a row and between rows */
  bool output;
} region;

typedef struct {
  const char *where, *layer;
  moec_error *error;
  DLDevice device; /* where tensors have to be */
  region regions[MOST_TENSORS];
  int32_t count;
} checking;

typedef struct {
  moec_view x, router_x, experts, weights, y, experts_out, weights_out, logits_out, counts_out;
  int64_t T, k;
} tensors;

/* Everything of one call. */
struct moec_job {
  const moec_layer_state *layer;
  const moec_call *call;
  const tensors *t;
  const checking *check;
};

/* ---- sizes ---- */

static inline int64_t moec_slots_of(const moec_layer_code *c) { return c->kind ? 1 : c->K; }

/* Rows (token, slot) that a context has room for: a call with any k up to E fits at least one
 * token.
 */
static inline int64_t moec_rows_of(const moec_layer_code *c, int64_t max_tokens) {
  int64_t rows = max_tokens * moec_slots_of(c);
  return !c->kind && rows < c->E ? c->E : rows;
}

/* ---- the call (CheckCall.c) ---- */

/* Checks a call's struct and tensors and fills `t`; 0 or an error. */
int moec_check_call(checking *k, const moec_layer_code *code, const moec_call *call, tensors *t);

#endif
