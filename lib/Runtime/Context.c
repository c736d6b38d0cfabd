#include "Call.h"

#include <immintrin.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>

enum { DEFAULT_TOKENS = 512, MOST_LANES = 65536, STAGE_SPIN_NS = 100000 };

/* ---- sizes ---- */

typedef struct {
  int64_t max_tokens;
  int32_t lanes;
  uint64_t ids, weights, offsets, logits, scratch, scratch_bytes, more,
      total; /* byte offsets, sizes */
} plan;

static int64_t slots_of(const moec_layer_code *c) { return c->kind ? 1 : c->K; }

/* Rows (token, slot) that a context has room for: a call with any k up to E fits at least one
 * token.
 */
static int64_t rows_of(const moec_layer_code *c, int64_t max_tokens) {
  int64_t rows = max_tokens * slots_of(c);
  return !c->kind && rows < c->E ? c->E : rows;
}

static uint64_t aligned(const moec_model *m, uint64_t bytes) {
  const uint64_t unit = m->target->alignment;
  return (bytes + unit - 1) / unit * unit;
}

static int make_plan(const char *w, const moec_model *model, const moec_context_options *options,
                     plan *p, moec_error *error) {
  if (!model)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: model: expected a pointer, but got NULL", w);
  memset(p, 0, sizeof *p);
  p->max_tokens = DEFAULT_TOKENS;
  p->lanes = 1;
  if (options) {
    int r = moec_check_struct(options, sizeof *options, w, "options", error);
    if (r)
      return r;
    if (options->max_tokens < 0)
      return moec_fail(error, MOEC_E_ARGUMENT, "%s: max_tokens: expected 0 or more, but got %lld",
                       w, (long long)options->max_tokens);
    if (options->max_tokens)
      p->max_tokens = options->max_tokens;
    const moec_executor *x = options->executor;
    if (x && !model->target->has_lanes)
      return moec_fail(error, MOEC_E_ARGUMENT,
                       "%s: executor: expected NULL for a GPU, but got an executor", w);
    if (x) {
      r = moec_check_struct(x, sizeof *x, w, "executor", error);
      if (r)
        return r;
      if (!x->run)
        return moec_fail(error, MOEC_E_ARGUMENT,
                         "%s: executor.run: expected a function, but got "
                         "NULL",
                         w);
      if (x->lanes < 1 || x->lanes > MOST_LANES)
        return moec_fail(error, MOEC_E_ARGUMENT, "%s: executor.lanes: expected 1 to %d, but got %d",
                         w, MOST_LANES, x->lanes);
      if (x->gang != 0 && x->gang != 1)
        return moec_fail(error, MOEC_E_ARGUMENT, "%s: executor.gang: expected 0 or 1, but got %d",
                         w, x->gang);
      p->lanes = x->lanes;
    }
  }
  int64_t rows = 0, experts = 0, routed = 0;
  for (int32_t i = 0; i < model->layer_count; ++i) {
    const moec_layer_state *s = &model->layers[i];
    const moec_layer_code *c = s->desc->code;
    const int64_t k = slots_of(c);
    if (p->max_tokens > (INT32_MAX - 64) / k)
      return moec_fail(error, MOEC_E_ARGUMENT,
                       "%s: max_tokens: expected at most %lld (max_tokens x K below 2^31), but got "
                       "%lld",
                       w, (long long)((INT32_MAX - 64) / k), (long long)p->max_tokens);
    const int64_t r = rows_of(c, p->max_tokens);
    rows = r > rows ? r : rows;
    experts = c->E > experts ? c->E : experts;
    routed = !c->kind && c->E > routed ? c->E : routed;
    /* workspace_bytes grows with tokens, with tokens x slots and with lanes, so these cover every
       chunk: all tokens with as many slots as there are rows for, and one token with E slots. */
    const int64_t shapes[2][2] = {{p->max_tokens, (r + p->max_tokens - 1) / p->max_tokens}, {1, r}};
    for (int32_t j = 0; j < s->level->entry_count; ++j)
      for (int n = 0; n < 2; ++n) {
        uint64_t b = s->level->entries[j].workspace_bytes(shapes[n][0], shapes[n][1], p->lanes);
        p->scratch_bytes = b > p->scratch_bytes ? b : p->scratch_bytes;
      }
  }
  p->weights = p->ids + aligned(model, (uint64_t)rows * 4);
  p->offsets = p->weights + aligned(model, (uint64_t)rows * 4);
  p->logits = p->offsets + aligned(model, (uint64_t)(experts + 1) * 4);
  p->scratch = p->logits + aligned(model, (uint64_t)p->max_tokens * (uint64_t)routed * 4);
  p->more = p->scratch + aligned(model, p->scratch_bytes);
  p->total = p->more + aligned(model, model->target->more_bytes);
  return 0;
}

int moec_workspace_size(const moec_model *model, const moec_context_options *options,
                        uint64_t *bytes, moec_error *error) {
  static const char w[] = "moec_workspace_size";
  plan p;
  if (!bytes)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: bytes: expected a pointer, but got NULL", w);
  *bytes = 0;
  int r = make_plan(w, model, options, &p, error);
  if (r)
    return r;
  *bytes = p.total;
  return moec_succeed(error);
}

/* ---- create, destroy ---- */

int moec_context_create(moec_model *model, const moec_context_options *options, moec_context **out,
                        moec_error *error) {
  static const char w[] = "moec_context_create";
  if (!out)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: context: expected a pointer, but got NULL", w);
  *out = NULL;
  plan p;
  int r = make_plan(w, model, options, &p, error);
  if (r)
    return r;
  char *workspace = options ? options->workspace : NULL;
  const moec_target *target = model->target;
  if (workspace && (uintptr_t)workspace % target->alignment)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: workspace: expected an address aligned to %u bytes, but got %p", w,
                     target->alignment, (void *)workspace);
  if (workspace && options->workspace_bytes < p.total)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: workspace_bytes: expected at least %llu, but got "
                     "%llu",
                     w, (unsigned long long)p.total, (unsigned long long)options->workspace_bytes);
  moec_context *c = aligned_alloc(64, sizeof *c);
  if (!c)
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected memory, but got none", w);
  memset(c, 0, sizeof *c);
  if (!workspace) {
    c->owned_bytes = p.total;
    if ((r = target->allocate(model, p.total, p.max_tokens, &c->owned, w, error))) {
      free(c);
      return r;
    }
    workspace = c->owned;
  }
  moec_watch_forks();
  atomic_fetch_add(&model->references, 1);
  c->model = model;
  c->lanes = p.lanes;
  if (options && options->executor)
    c->executor = *options->executor;
  c->forks = moec_fork_generation();
  c->max_tokens = p.max_tokens;
  c->ids = (int32_t *)(void *)(workspace + p.ids);
  c->weights = (float *)(void *)(workspace + p.weights);
  c->offsets = (int32_t *)(void *)(workspace + p.offsets);
  c->logits = (float *)(void *)(workspace + p.logits);
  c->scratch = workspace + p.scratch;
  c->scratch_bytes = p.scratch_bytes;
  /* More lanes than CPUs: whoever polls keeps another lane from arriving. */
  c->spin_ns = p.lanes > 1 && p.lanes <= moec_cpus_allowed() ? STAGE_SPIN_NS : 0;
  if ((r = target->attach(c, workspace + p.more, w, error))) {
    moec_context_destroy(c);
    return r;
  }
  *out = c;
  return moec_succeed(error);
}

void moec_context_destroy(moec_context *context) {
  if (!context)
    return;
  if (context->owned)
    context->model->target->release(context->model, context->owned, context->owned_bytes);
  moec_close(context->model);
  free(context);
}

int moec_context_status(moec_context *context, moec_error *error) {
  if (!context)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "moec_context_status: context: expected a pointer, but "
                     "got NULL");
  return context->model->target->status(context, error);
}

/* ---- running stages ---- */

/* Round to nearest, subnormals kept, exceptions masked: results do not depend on the host's mode.
 */
static inline uint32_t enter_float_mode(void) {
  uint32_t before = _mm_getcsr();
  _mm_setcsr(0x1f80);
  return before;
}

static void wait_for_all(moec_context *c) {
  const uint32_t now = atomic_load_explicit(&c->fence, memory_order_relaxed);
  if (atomic_fetch_add(&c->arrived, 1) + 1 == (uint32_t)c->lanes) {
    atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
    atomic_store(&c->fence, now + 1);
    if (atomic_load(&c->sleepers))
      moec_futex_wake(&c->fence, INT_MAX);
    return;
  }
  int64_t end = 0;
  for (uint32_t spins = 1;; ++spins) {
    if (atomic_load_explicit(&c->fence, memory_order_acquire) != now)
      return;
    moec_pause();
    if (spins % 64)
      continue;
    int64_t t = moec_now_ns();
    if (!end)
      end = t + c->spin_ns;
    else if (t >= end)
      break;
  }
  atomic_fetch_add(&c->sleepers, 1);
  while (atomic_load(&c->fence) == now)
    moec_futex_wait(&c->fence, now);
  atomic_fetch_sub(&c->sleepers, 1);
}

static void run_all_stages(void *arg, int32_t lane) {
  moec_context *c = arg;
  const uint32_t before = enter_float_mode();
  for (int32_t s = 0; s < c->entry->stage_count; ++s) {
    if (s)
      wait_for_all(c);
    c->entry->stages[s](&c->frame, lane, c->lanes);
  }
  _mm_setcsr(before);
}

static void run_one_stage(void *arg, int32_t lane) {
  moec_context *c = arg;
  const uint32_t before = enter_float_mode();
  c->entry->stages[c->stage](&c->frame, lane, c->lanes);
  _mm_setcsr(before);
}

static void cpu_run(moec_context *c, const moec_entry *entry) {
  memset(c->frame.counters, 0, sizeof c->frame.counters);
  c->entry = entry;
  /* One lane needs no executor, but one that promises no gang is asked for every stage all the
     same: `moec bench` times stages by it. */
  if (c->lanes == 1 && (!c->executor.run || c->executor.gang)) {
    const uint32_t before = enter_float_mode();
    for (int32_t s = 0; s < entry->stage_count; ++s)
      entry->stages[s](&c->frame, 0, 1);
    _mm_setcsr(before);
  } else if (c->executor.gang) {
    atomic_store_explicit(&c->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&c->sleepers, 0, memory_order_relaxed);
    c->executor.run(c->executor.self, c->lanes, run_all_stages, c);
  } else {
    for (c->stage = 0; c->stage < entry->stage_count; ++c->stage)
      c->executor.run(c->executor.self, c->lanes, run_one_stage, c);
  }
}

/* ---- the tensors of a call ---- */

static void types_text(uint32_t types, char *text, size_t size) {
  static const char *const names[] = {"f32", "bf16", "f16", "i32", "i64"};
  size_t n = 0;
  text[0] = 0;
  for (int i = 0; i < 5 && n < size; ++i)
    if (types & (1u << i))
      n += (size_t)snprintf(text + n, size - n, "%s%s", n ? " or " : "", names[i]);
}

/* Checks a tensor of shape [d0] (rank 1) or [d0, d1]; -1: any extent. */
static int check(checking *k, const DLTensor *t, const char *name, int32_t rank, int64_t d0,
                 int64_t d1, uint32_t types, bool output, moec_view *v) {
  moec_error *e = k->error;
  const char *w = k->where, *l = k->layer;
  const int64_t want[2] = {d0, d1};
  bool fits = t->ndim == rank && t->shape;
  for (int32_t i = 0; fits && i < rank; ++i)
    fits = want[i] < 0 ? t->shape[i] >= 0 : t->shape[i] == want[i];
  if (!fits) {
    static const char *const letters[2] = {"T", "k"};
    char expected[64], got[96];
    size_t n = 0;
    for (int32_t i = 0; i < rank; ++i)
      n += (size_t)(want[i] < 0 ? snprintf(expected + n, sizeof expected - n, "%s%s", i ? ", " : "",
                                           letters[i])
                                : snprintf(expected + n, sizeof expected - n, "%s%lld",
                                           i ? ", " : "", (long long)want[i]));
    n = 0;
    got[0] = 0;
    for (int32_t i = 0; t->shape && i < t->ndim && i < 4; ++i)
      n += (size_t)snprintf(got + n, sizeof got - n, "%s%lld", i ? ", " : "",
                            (long long)t->shape[i]);
    if (t->shape && t->ndim >= 0 && t->ndim <= 4)
      return moec_fail(e, MOEC_E_SHAPE, "%s: %s: %s: expected [%s], but got [%s]", w, l, name,
                       expected, got);
    return moec_fail(e, MOEC_E_SHAPE, "%s: %s: %s: expected [%s], but got rank %d%s", w, l, name,
                     expected, t->ndim, t->shape ? "" : " without a shape");
  }
  v->dtype = moec_dtype(t->dtype);
  const uint32_t type = v->dtype == MOEC_DT_F32    ? F32
                        : v->dtype == MOEC_DT_BF16 ? BF16
                        : v->dtype == MOEC_DT_F16  ? F16
                        : v->dtype == MOEC_DT_I32  ? I32
                        : v->dtype == MOEC_DT_I64  ? I64
                                                   : 0;
  if (!(type & types)) {
    char expected[48], got[24];
    types_text(types, expected, sizeof expected);
    moec_dtype_text(t->dtype, got);
    return moec_fail(e, MOEC_E_DTYPE, "%s: %s: %s: expected %s, but got %s%s", w, l, name, expected,
                     got, type == F16 ? "; f16 activations are not built yet" : "");
  }
  int r = moec_check_device(t, k->device, w, name, e);
  if (r)
    return r;
  const int64_t rows = rank == 2 ? t->shape[0] : 1, width = t->shape[rank - 1];
  const int64_t size = moec_dtype_bytes(v->dtype);
  v->stride = width;
  v->data = NULL;
  if (!rows || !width)
    return 0;
  if (t->strides) {
    if (width > 1 && t->strides[rank - 1] != 1)
      return moec_fail(
          e, MOEC_E_STRIDE,
          "%s: %s: %s: expected a contiguous last dimension (stride 1), but got stride "
          "%lld",
          w, l, name, (long long)t->strides[rank - 1]);
    if (rows > 1) {
      v->stride = t->strides[0];
      if (v->stride < width)
        return moec_fail(e, MOEC_E_STRIDE,
                         "%s: %s: %s: expected a row stride of at least %lld, but got %lld", w, l,
                         name, (long long)width, (long long)v->stride);
    }
  }
  if (!t->data)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: %s: expected data, but got NULL", w, l, name);
  v->data = (char *)t->data + t->byte_offset;
  if ((uintptr_t)v->data % (uintptr_t)size)
    return moec_fail(e, MOEC_E_ARGUMENT,
                     "%s: %s: %s: expected an address aligned to %lld bytes, but got %p", w, l,
                     name, (long long)size, (void *)v->data);
  uint64_t bytes;
  if (__builtin_mul_overflow((uint64_t)(rows - 1), (uint64_t)v->stride, &bytes) ||
      __builtin_add_overflow(bytes, (uint64_t)width, &bytes) ||
      __builtin_mul_overflow(bytes, (uint64_t)size, &bytes) || bytes > (uint64_t)INT64_MAX)
    return moec_fail(
        e, MOEC_E_SHAPE,
        "%s: %s: %s: expected a tensor that fits in memory, but got %lld rows of stride "
        "%lld",
        w, l, name, (long long)rows, (long long)v->stride);
  region *g = &k->regions[k->count++];
  g->name = name;
  g->begin = (uintptr_t)v->data;
  g->end = g->begin + bytes;
  g->width = (uint64_t)(width * size);
  g->step = (uint64_t)(v->stride * size);
  g->output = output;
  return 0;
}

static bool overlaps(const region *a, const region *b) {
  if (a->begin >= b->end || b->begin >= a->end)
    return false;
  if (a->step != b->step)
    return true; /* rows that interleave without meeting are told apart at equal strides only */
  const uintptr_t low = a->begin < b->begin ? a->begin : b->begin;
  const region *first = a->begin == low ? a : b, *second = first == a ? b : a;
  const uint64_t shift = (second->begin - low) % a->step;
  return shift < first->width || shift + second->width > a->step;
}

static int check_overlaps(const checking *k) {
  for (int32_t i = 0; i < k->count; ++i)
    for (int32_t j = 0; j < k->count; ++j)
      if (i != j && k->regions[i].output && (j > i || !k->regions[j].output) &&
          overlaps(&k->regions[i], &k->regions[j]))
        return moec_fail(k->error, MOEC_E_OVERLAP,
                         "%s: %s: %s: expected memory of its own, but got memory that %s uses too",
                         k->where, k->layer, k->regions[i].name, k->regions[j].name);
  return 0;
}

/* ---- ids and weights ---- */

static inline int64_t read_id(const moec_view *v, int64_t row, int64_t slot) {
  const int64_t i = row * v->stride + slot;
  return v->dtype == MOEC_DT_I32 ? ((const int32_t *)v->data)[i] : ((const int64_t *)v->data)[i];
}

/* The first foreign id of rows r0 ... r1-1 as row * k + slot, or -1. */
static int64_t find_foreign(const moec_view *v, int64_t r0, int64_t r1, int64_t k, int64_t E) {
  for (int64_t r = r0; r < r1; ++r)
    for (int64_t s = 0; s < k; ++s) {
      const int64_t id = read_id(v, r, s);
      if (id < -1 || id >= E)
        return r * k + s;
    }
  return -1;
}

static void convert_ids(const moec_view *v, int64_t r0, int64_t rows, int64_t k, int64_t E,
                        int32_t *out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = 0; s < k; ++s) {
      const int64_t id = read_id(v, r0 + r, s);
      *out++ = id < 0 || id >= E ? -1 : (int32_t)id;
    }
}

static float half_to_float(uint16_t h) {
  uint32_t e = h >> 10 & 31, m = h & 1023, b;
  if (e == 31) {
    b = 0x7f800000u | m << 13;
  } else if (e) {
    b = (e + 112) << 23 | m << 13;
  } else { /* subnormal: m * 2^-24, exact */
    float f = (float)m * 0x1p-24f;
    memcpy(&b, &f, sizeof b);
  }
  b |= (uint32_t)(h & 0x8000) << 16;
  float f;
  memcpy(&f, &b, sizeof f);
  return f;
}

static void convert_weights(const moec_view *v, int64_t r0, int64_t rows, int64_t k, float *out) {
  for (int64_t r = 0; r < rows; ++r, out += k) {
    const int64_t from = (r0 + r) * v->stride;
    if (v->dtype == MOEC_DT_F32) {
      memcpy(out, (const float *)(const void *)v->data + from, (size_t)k * 4);
      continue;
    }
    const uint16_t *h = (const uint16_t *)(const void *)v->data + from;
    for (int64_t s = 0; s < k; ++s) {
      if (v->dtype == MOEC_DT_BF16) {
        const uint32_t b = (uint32_t)h[s] << 16;
        memcpy(out + s, &b, sizeof b);
      } else {
        out[s] = half_to_float(h[s]);
      }
    }
  }
}

/* ---- moec_run ---- */

static int refuse(const checking *k, const char *what, const char *why) {
  return moec_fail(k->error, MOEC_E_ARGUMENT, "%s: %s: %s: expected NULL, but got a tensor: %s",
                   k->where, k->layer, what, why);
}

static int check_call(checking *k, const moec_layer_code *code, const moec_call *call, tensors *t) {
  moec_error *e = k->error;
  const char *w = k->where, *l = k->layer;
  if (call->flags & ~(uint32_t)(MOEC_ROUTED_ONLY | MOEC_ACCUMULATE | MOEC_SKIP_FOREIGN))
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: flags: expected bits 0x7, but got 0x%x", w, l,
                     call->flags);
  if (call->stream && k->device.device_type == kDLCPU)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: stream: expected NULL on the CPU, but got %p", w,
                     l, call->stream);
  static const char given[] = "with experts given the router is skipped";
  if (!call->x)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: x: expected a tensor, but got NULL", w, l);
  static const char unneeded[] = "the layer does not need it";
  const bool reads_router_x = (code->needs & MOEC_ROUTER_X) && !call->experts;
  if (call->router_x && !reads_router_x)
    return refuse(k, "router_x", call->experts ? given : unneeded);
  if (!call->router_x && reads_router_x)
    return moec_fail(e, MOEC_E_NEEDS,
                     "%s: %s: router_x: expected a tensor, but got NULL: the router of this layer "
                     "does not read x",
                     w, l);
  if (call->token_ids)
    return refuse(k, "token_ids", unneeded);
  if (call->token_types)
    return refuse(k, "token_types", unneeded);
  if (call->sequences)
    return refuse(k, "sequences", unneeded);
  if (call->state)
    return refuse(k, "state", unneeded);
  if (call->state_out)
    return refuse(k, "state_out", "the layer carries no router state");
  if (!call->experts != !call->weights)
    return moec_fail(e, MOEC_E_ARGUMENT,
                     "%s: %s: expected experts and weights together, but got %s alone", w, l,
                     call->experts ? "experts" : "weights");
  static const char dense[] = "the layer is dense, it has no router";
  const char *no_router = code->kind ? dense : call->experts ? given : NULL;
  if (code->kind && call->experts)
    return refuse(k, "experts", dense);
  if (no_router && call->experts_out)
    return refuse(k, "experts_out", no_router);
  if (no_router && call->weights_out)
    return refuse(k, "weights_out", no_router);
  if (no_router && call->logits_out)
    return refuse(k, "logits_out", no_router);
  if (code->kind && call->counts_out)
    return refuse(k, "counts_out", dense);
  if (!call->y) {
    if (no_router)
      return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: y: expected a tensor, but got NULL: %s", w, l,
                       no_router);
    if (!call->experts_out && !call->weights_out && !call->logits_out && !call->counts_out)
      return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: expected y or a router output, but got neither",
                       w, l);
  }
  int r = check(k, call->x, "x", 2, -1, code->H, F32 | BF16, false, &t->x);
  if (r)
    return r;
  const int64_t T = t->T = call->x->shape[0];
  /* Of x's type: there is one code for both. */
  const uint32_t x_type = t->x.dtype == MOEC_DT_F32 ? F32 : BF16;
  if (call->router_x &&
      (r = check(k, call->router_x, "router_x", 2, T, code->H, x_type, false, &t->router_x)))
    return r;
  t->k = slots_of(code);
  if (call->experts) {
    if ((r = check(k, call->experts, "experts", 2, T, -1, I32 | I64, false, &t->experts)))
      return r;
    t->k = call->experts->shape[1];
    r = check(k, call->weights, "weights", 2, T, t->k, F32 | BF16 | F16, false, &t->weights);
    if (r)
      return r;
  }
  if (call->y && (r = check(k, call->y, "y", 2, T, code->H, F32 | BF16, true, &t->y)))
    return r;
  if (call->experts_out && (r = check(k, call->experts_out, "experts_out", 2, T, code->K, I32 | I64,
                                      true, &t->experts_out)))
    return r;
  if (call->weights_out &&
      (r = check(k, call->weights_out, "weights_out", 2, T, code->K, F32, true, &t->weights_out)))
    return r;
  if (call->logits_out &&
      (r = check(k, call->logits_out, "logits_out", 2, T, code->E, F32, true, &t->logits_out)))
    return r;
  if (call->counts_out &&
      (r = check(k, call->counts_out, "counts_out", 1, code->E + 1, 0, I32, true, &t->counts_out)))
    return r;
  return check_overlaps(k);
}

/* The codes to run, one after the other; 0 or an error. */
static int find_entries(const checking *k, const moec_layer_state *s, const moec_call *call,
                        const tensors *t, const moec_entry *entries[2]) {
  const int32_t x = t->x.dtype, y = call->y ? t->y.dtype : 0;
  int32_t kinds[2] = {MOEC_ENTRY_FORWARD, -1};
  if (call->experts)
    kinds[0] = MOEC_ENTRY_EXPERTS;
  else if (!call->y)
    kinds[0] = MOEC_ENTRY_ROUTE;
  else if (call->logits_out) /* only `route` writes logits */
    kinds[0] = MOEC_ENTRY_ROUTE, kinds[1] = MOEC_ENTRY_EXPERTS;
  for (int i = 0; i < 2; ++i) {
    entries[i] = NULL;
    if (kinds[i] < 0)
      continue;
    entries[i] = s->entry[kinds[i]][x][kinds[i] == MOEC_ENTRY_ROUTE ? 0 : y];
    if (!entries[i])
      return moec_fail(k->error, MOEC_E_DTYPE,
                       "%s: %s: expected types that the library has code for, but got x %s, y %s",
                       k->where, k->layer, x == MOEC_DT_F32 ? "f32" : "bf16",
                       !call->y           ? "NULL"
                       : y == MOEC_DT_F32 ? "f32"
                                          : "bf16");
  }
  return 0;
}

static void cpu_give(moec_context *c, const moec_job *job, int64_t first, int64_t rows) {
  const tensors *t = job->t;
  const moec_call *call = job->call;
  const int64_t E = job->layer->desc->code->E;
  const int64_t k = t->k;
  if (call->experts_out)
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t s = 0; s < k; ++s) {
        const int64_t i = (first + r) * t->experts_out.stride + s;
        if (t->experts_out.dtype == MOEC_DT_I32)
          ((int32_t *)(void *)t->experts_out.data)[i] = c->ids[r * k + s];
        else
          ((int64_t *)(void *)t->experts_out.data)[i] = c->ids[r * k + s];
      }
  if (call->weights_out)
    for (int64_t r = 0; r < rows; ++r)
      memcpy((float *)(void *)t->weights_out.data + (first + r) * t->weights_out.stride,
             c->weights + r * k, (size_t)k * 4);
  if (call->counts_out) {
    int32_t *counts = (int32_t *)(void *)t->counts_out.data;
    for (int64_t i = 0; i < rows * k; ++i) {
      const int64_t id = c->ids[i];
      ++counts[id < 0 || id >= E ? E : id];
    }
  }
}

static void cpu_take(moec_context *c, const moec_job *job, int64_t first, int64_t rows) {
  const tensors *t = job->t;
  convert_ids(&t->experts, first, rows, t->k, job->layer->desc->code->E, c->ids);
  convert_weights(&t->weights, first, rows, t->k, c->weights);
}

static void cpu_clear(moec_context *c, void *to, int64_t step, int64_t width, int64_t rows) {
  (void)c;
  for (int64_t i = 0; i < rows; ++i)
    memset((char *)to + i * step, 0, (size_t)width);
}

static int cpu_begin(moec_context *c, const moec_job *job) {
  const moec_call *call = job->call;
  const tensors *t = job->t;
  const checking *check = job->check;
  const int64_t E = job->layer->desc->code->E;
  if (call->experts && !(call->flags & MOEC_SKIP_FOREIGN)) {
    const int64_t bad = find_foreign(&t->experts, 0, t->T, t->k, E);
    if (bad >= 0)
      return moec_fail(check->error, MOEC_E_EXPERT_ID,
                       "%s: %s: experts[%lld, %lld]: expected -1 to %lld, but got %lld",
                       check->where, check->layer, (long long)(bad / t->k), (long long)(bad % t->k),
                       (long long)E - 1, (long long)read_id(&t->experts, bad / t->k, bad % t->k));
  }
  if (t->T && t->k && c->lanes > 1 && c->forks != moec_fork_generation() &&
      moec_is_pool(&c->executor)) {
    if (moec_pool_ready(&c->executor)) /* the first call in a child of fork */
      return moec_fail(check->error, MOEC_E_IO,
                       "%s: expected %d threads after fork, but got fewer: the system refused",
                       check->where, c->lanes);
    c->forks = moec_fork_generation();
  }
  return 0;
}

static int cpu_end(moec_context *c, const moec_job *job, int result) {
  (void)c, (void)job;
  return result;
}

static int cpu_status(moec_context *c, moec_error *error) {
  (void)c;
  return moec_succeed(error);
}

/* ---- host memory ---- */

static int cpu_open(moec_model *m, const char *where, moec_error *error) {
  if (!moec_has_images(m->module))
    return 0;
  return moec_fail(error, MOEC_E_ISA,
                   "%s: expected code for a CPU, but got code for GPUs: open it on a CUDA device",
                   where);
}

static void cpu_close(moec_model *m) { (void)m; }

static int cpu_place(moec_model *m, moec_layer_state *layer, const char *where, moec_error *error) {
  (void)m, (void)layer, (void)where, (void)error;
  return 0;
}

static int cpu_arena(moec_model *m, moec_layer_state *layer, const char *where, moec_error *error) {
  (void)m;
  if (!moec_layer_arena(layer))
    return 0;
  return moec_fail(error, MOEC_E_MEMORY, "%s: %s: expected memory for its weights, but got none",
                   where, layer->desc->name);
}

static void cpu_drop(moec_model *m, moec_layer_state *layer) {
  (void)m;
  moec_unmap_memory(layer->memory, layer->memory_bytes);
  layer->memory = NULL;
  layer->memory_bytes = 0;
}

static int cpu_borrow(moec_model *m, const void *weight, uint64_t bytes, void **host,
                      const char *where, moec_error *error) {
  (void)m, (void)bytes, (void)where, (void)error;
  *host = (void *)(uintptr_t)weight;
  return 0;
}

static int cpu_give_back(moec_model *m, const void *weight, uint64_t bytes, void *host,
                         bool changed, const char *where, moec_error *error) {
  (void)m, (void)weight, (void)bytes, (void)host, (void)changed, (void)where, (void)error;
  return 0;
}

static int cpu_allocate(moec_model *m, uint64_t bytes, int64_t max_tokens, void **memory,
                        const char *where, moec_error *error) {
  (void)m;
  *memory = moec_map_memory((size_t)bytes);
  if (*memory)
    return 0;
  return moec_fail(error, MOEC_E_MEMORY,
                   "%s: expected %llu bytes for max_tokens = %lld, but got none", where,
                   (unsigned long long)bytes, (long long)max_tokens);
}

static void cpu_release(moec_model *m, void *memory, uint64_t bytes) {
  (void)m;
  moec_unmap_memory(memory, (size_t)bytes);
}

static int cpu_attach(moec_context *c, void *more, const char *where, moec_error *error) {
  (void)c, (void)more, (void)where, (void)error;
  return 0;
}

const moec_target moec_cpu_target = {
    .alignment = 64,
    .has_lanes = true,
    .open = cpu_open,
    .close = cpu_close,
    .place = cpu_place,
    .arena = cpu_arena,
    .drop = cpu_drop,
    .borrow = cpu_borrow,
    .give_back = cpu_give_back,
    .allocate = cpu_allocate,
    .release = cpu_release,
    .attach = cpu_attach,
    .begin = cpu_begin,
    .clear = cpu_clear,
    .take = cpu_take,
    .run = cpu_run,
    .give = cpu_give,
    .end = cpu_end,
    .status = cpu_status,
};

/* ---- chunks ---- */

/* T > 0 and k > 0. */
static int run_chunks(moec_context *c, const moec_job *job) {
  const moec_layer_state *s = job->layer;
  const moec_call *call = job->call;
  const tensors *t = job->t;
  const checking *check = job->check;
  const moec_target *target = c->model->target;
  const moec_layer_code *code = s->desc->code;
  const moec_entry *entries[2];
  int r = find_entries(check, s, call, t, entries);
  if (r)
    return r;
  const int64_t rows = rows_of(code, c->max_tokens);
  int64_t chunk = rows / t->k < c->max_tokens ? rows / t->k : c->max_tokens;
  for (int i = 0; i < 2; ++i)
    while (entries[i] && chunk &&
           entries[i]->workspace_bytes(chunk < t->T ? chunk : t->T, t->k, c->lanes) >
               c->scratch_bytes)
      chunk /= 2;
  if (!chunk)
    return moec_fail(check->error, MOEC_E_SHAPE,
                     "%s: %s: experts: expected at most %lld ids for a token, but got %lld; a "
                     "context with more max_tokens holds more",
                     check->where, check->layer, (long long)rows, (long long)t->k);
  moec_frame *f = &c->frame;
  f->workspace = c->scratch;
  f->weights = s->weights;
  f->x_stride = t->x.stride;
  f->y_stride = t->y.stride;
  f->slots = t->k;
  f->experts = c->ids;
  f->expert_weights = c->weights;
  f->logits_stride = call->logits_out ? t->logits_out.stride : code->E;
  f->offsets = c->offsets;
  f->accumulate = (call->flags & MOEC_ACCUMULATE) != 0;
  f->routed_only = (call->flags & MOEC_ROUTED_ONLY) != 0;
  f->router_x_stride = t->router_x.stride;
  f->lanes = c->lanes;
  for (int64_t first = 0; first < t->T; first += chunk) {
    const int64_t n = t->T - first < chunk ? t->T - first : chunk;
    f->tokens = n;
    f->x = t->x.data + first * t->x.stride * moec_dtype_bytes(t->x.dtype);
    if (call->router_x)
      f->router_x =
          t->router_x.data + first * t->router_x.stride * moec_dtype_bytes(t->router_x.dtype);
    f->y = call->y ? t->y.data + first * t->y.stride * moec_dtype_bytes(t->y.dtype) : NULL;
    f->logits = NULL;
    if (call->logits_out)
      f->logits = (float *)(void *)t->logits_out.data + first * t->logits_out.stride;
    else if (entries[0]->kind == MOEC_ENTRY_ROUTE)
      f->logits = c->logits;
    if (call->experts)
      target->take(c, job, first, n);
    target->run(c, entries[0]);
    if (entries[1]) {
      f->logits = NULL;
      target->run(c, entries[1]);
    }
    target->give(c, job, first, n);
  }
  return 0;
}

int moec_run(moec_context *c, int32_t layer, const moec_call *call, moec_error *error) {
  checking k = {"moec_run", "", error, moec_host, {{0}}, 0};
  if (!c || !call)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", k.where,
                     c ? "call" : "context");
  int r = moec_check_struct(call, sizeof *call, k.where, "call", error);
  if (r)
    return r;
  if (layer < 0 || layer >= c->model->layer_count)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: layer: expected 0 to %d, but got %d", k.where,
                     c->model->layer_count - 1, layer);
  const moec_layer_state *s = &c->model->layers[layer];
  const moec_layer_code *code = s->desc->code;
  k.layer = s->desc->name;
  k.device = c->model->device;
  tensors t;
  memset(&t, 0, sizeof t);
  if ((r = check_call(&k, code, call, &t)))
    return r;
  if (s->missing)
    return moec_fail(error, MOEC_E_WEIGHTS,
                     "%s: %s: expected all weights, but got %lld matrices that were never set; set "
                     "them with moec_set_weight",
                     k.where, k.layer, (long long)s->missing);
  /* Held by a call of the parent at the time of a fork: nobody holds it in this process. */
  const uint32_t mine = moec_fork_generation() + 1;
  uint32_t holder = 0;
  while (!atomic_compare_exchange_strong(&c->busy, &holder, mine))
    if (holder == mine)
      return moec_fail(error, MOEC_E_BUSY,
                       "%s: %s: expected an idle context, but got one that runs another call; give "
                       "every thread its own",
                       k.where, k.layer);
  const moec_target *target = c->model->target;
  const moec_job job = {s, call, &t, &k};
  if (!(r = target->begin(c, &job))) {
    const int64_t counts = (code->E + 1) * 4, row = code->H * moec_dtype_bytes(t.y.dtype);
    if (call->counts_out)
      target->clear(c, t.counts_out.data, counts, counts, 1);
    if (t.T && t.k)
      r = run_chunks(c, &job);
    else if (t.T && !(call->flags & MOEC_ACCUMULATE)) /* no slots: the empty sum */
      target->clear(c, t.y.data, t.y.stride * moec_dtype_bytes(t.y.dtype), row, t.T);
    r = target->end(c, &job, r);
  }
  atomic_store_explicit(&c->busy, 0, memory_order_release);
  return r ? r : moec_succeed(error);
}
