/* The target CPU: stages on lanes, tensors in host memory. */
#include "Call.h"

#include <immintrin.h>
#include <limits.h>

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

static int cpu_open(moec_model *m, const char *cap, const char *where, moec_error *error) {
  (void)cap; /* levels are the layers' */
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
