#include "mock.h"

#include <math.h>
#include <string.h>
#include <xmmintrin.h>

__attribute__((visibility("hidden"))) unsigned mock_float_mode;
__attribute__((visibility("hidden"))) int64_t mock_most_tokens;

typedef struct {
  int64_t H, F, E, K;
  int dense, bf16, compute_bf16;
} spec;

static const spec specs[3] = {
    {40, 23, 5, 2, 0, 0, 0}, {33, 48, 9, 3, 0, 1, 1}, {40, 70, 1, 1, 1, 1, 0}};

static float from_bf16(uint16_t h) {
  uint32_t b = (uint32_t)h << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static uint16_t to_bf16(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  if (f != f)
    return (uint16_t)(b >> 16 | 64);
  return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

/* Layout panel32-1, written out once more. */
static float weight(const void *w, int bf16, int parts, int64_t rows, int64_t cols, int64_t e,
                    int part, int64_t n, int64_t k) {
  int64_t kp = (cols + 31) / 32 * 32, per = parts == 2 ? 16 : 32;
  int64_t panels = (rows + per - 1) / per;
  int64_t panel = e * panels + n / per, lane = n % per + (part ? 16 : 0);
  if (bf16) {
    const char *p = (const char *)w + panel * kp * 64;
    return from_bf16(*(const uint16_t *)(p + ((k / 2) * 64 + lane * 2 + (k & 1)) * 2));
  }
  const char *p = (const char *)w + panel * kp * 128;
  return *(const float *)(p + (k * 32 + lane) * 4);
}

static float read_x(const spec *s, int xd, const moec_frame *f, int64_t t, int64_t k) {
  float v = xd == MOEC_DT_F32 ? ((const float *)f->x)[t * f->x_stride + k]
                              : from_bf16(((const uint16_t *)f->x)[t * f->x_stride + k]);
  return s->compute_bf16 ? from_bf16(to_bf16(v)) : v;
}

static int64_t take(moec_frame *f, int counter) {
  return __atomic_fetch_add(&f->counters[8 * counter], 1, __ATOMIC_ACQ_REL);
}

static inline void route(const spec *s, int xd, int alone, moec_frame *f, int32_t lane,
                         int32_t lanes) {
  (void)lane;
  for (int64_t t; (t = take(f, 0)) < f->tokens;) {
    float p[16], most = -INFINITY, sum = 0;
    for (int64_t e = 0; e < s->E; ++e) {
      float z = 0;
      for (int64_t k = 0; k < s->H; ++k)
        z += read_x(s, xd, f, t, k) * weight(f->weights[0], 0, 1, s->E, s->H, 0, 0, e, k);
      p[e] = z;
      if (alone) /* the entry `route`; in `forward` there is no place for them */
        f->logits[t * f->logits_stride + e] = z;
      most = z > most ? z : most;
    }
    for (int64_t e = 0; e < s->E; ++e)
      sum += p[e] = expf(p[e] - most);
    for (int64_t j = 0; j < s->K; ++j) {
      int64_t best = 0;
      for (int64_t e = 1; e < s->E; ++e)
        if (p[e] > p[best])
          best = e;
      f->experts[t * s->K + j] = (int32_t)best;
      f->expert_weights[t * s->K + j] = p[best] / sum;
      p[best] = -1;
    }
  }
  if (take(f, 1) == lanes - 1) /* the last lane: all of this stage's results are there */
    f->offsets[0] = 0;
}

static inline void up(const spec *s, int xd, moec_frame *f, int32_t lane, int32_t lanes) {
  (void)lanes;
  float *h = (float *)f->workspace;
  const void *w = f->weights[s->dense ? 0 : 1];
  __atomic_store_n(&mock_float_mode, _mm_getcsr(), __ATOMIC_RELAXED);
  if (!lane && f->tokens > __atomic_load_n(&mock_most_tokens, __ATOMIC_RELAXED))
    __atomic_store_n(&mock_most_tokens, f->tokens, __ATOMIC_RELAXED);
  int64_t k_slots = f->slots;
  for (int64_t r; (r = take(f, 2)) < f->tokens * k_slots;) {
    int64_t t = r / k_slots, e = s->dense ? 0 : f->experts[r];
    for (int64_t n = 0; e >= 0 && n < s->F; ++n) {
      float g = 0, u = 0;
      for (int64_t k = 0; k < s->H; ++k) {
        float x = read_x(s, xd, f, t, k);
        g += x * weight(w, s->bf16, 2, s->F, s->H, e, 0, n, k);
        u += x * weight(w, s->bf16, 2, s->F, s->H, e, 1, n, k);
      }
      h[r * s->F + n] = (g > 0 ? g : 0) * u;
    }
  }
  /* Scratch of a lane, at the very end of the workspace. */
  char *end = (char *)f->workspace + ((f->tokens * k_slots * s->F * 4 + 63) & ~(int64_t)63);
  memset(end + 64 * lane, lane, 64);
}

static inline void down(const spec *s, int yd, moec_frame *f, int32_t lane, int32_t lanes) {
  (void)lane, (void)lanes;
  const float *h = (const float *)f->workspace;
  const void *w = f->weights[s->dense ? 1 : 2];
  for (int64_t t; (t = take(f, 3)) < f->tokens;)
    for (int64_t n = 0; n < s->H; ++n) {
      float *y32 = (float *)f->y + t * f->y_stride + n;
      uint16_t *y16 = (uint16_t *)f->y + t * f->y_stride + n;
      float y = !f->accumulate ? 0 : yd == MOEC_DT_F32 ? *y32 : from_bf16(*y16);
      for (int64_t e = 0; e < s->E; ++e)
        for (int64_t j = 0; j < f->slots; ++j) {
          int64_t r = t * f->slots + j;
          if (!s->dense && f->experts[r] != e)
            continue;
          float z = 0;
          for (int64_t k = 0; k < s->F; ++k)
            z += h[r * s->F + k] * weight(w, s->bf16, 1, s->H, s->F, e, 0, n, k);
          if (s->compute_bf16)
            z = from_bf16(to_bf16(z));
          y += s->dense ? z : f->expert_weights[r] * z;
        }
      if (yd == MOEC_DT_F32)
        *y32 = y;
      else
        *y16 = to_bf16(y);
    }
}

#define CODE(c)                                                                                    \
  static void up##c##0(moec_frame * f, int32_t i, int32_t n) { up(&specs[c], 0, f, i, n); }        \
  static void up##c##1(moec_frame * f, int32_t i, int32_t n) { up(&specs[c], 1, f, i, n); }        \
  static void down##c##0(moec_frame * f, int32_t i, int32_t n) { down(&specs[c], 0, f, i, n); }    \
  static void down##c##1(moec_frame * f, int32_t i, int32_t n) { down(&specs[c], 1, f, i, n); }    \
  static uint64_t bytes##c(int64_t tokens, int64_t slots, int64_t lanes) {                         \
    return (uint64_t)(((tokens * slots * specs[c].F * 4 + 63) & ~(int64_t)63) + 64 * lanes);       \
  }
#define ROUTE(name, c, xd, alone)                                                                  \
  static void name(moec_frame *f, int32_t i, int32_t n) { route(&specs[c], xd, alone, f, i, n); }
#define ROUTER(c)                                                                                  \
  ROUTE(route##c##0, c, 0, 0)                                                                      \
  ROUTE(route##c##1, c, 1, 0)                                                                      \
  ROUTE(alone##c##0, c, 0, 1)                                                                      \
  ROUTE(alone##c##1, c, 1, 1)                                                                      \
  static const moec_stage_fn r##c##0 [] = {alone##c##0}, r##c##1 [] = {alone##c##1};               \
  static const moec_stage_fn f##c##00 [] = {route##c##0, up##c##0, down##c##0},                    \
                                      f##c##01 [] = {route##c##0, up##c##0, down##c##1},           \
                                      f##c##10 [] = {route##c##1, up##c##1, down##c##0},           \
                                      f##c##11 [] = {route##c##1, up##c##1, down##c##1};
#define EXPERTS(c)                                                                                 \
  static const moec_stage_fn e##c##00 [] = {up##c##0, down##c##0},                                 \
                                      e##c##01 [] = {up##c##0, down##c##1},                        \
                                      e##c##10 [] = {up##c##1, down##c##0},                        \
                                      e##c##11 [] = {up##c##1, down##c##1};
CODE(0)
ROUTER(0)
EXPERTS(0)
CODE(1)
ROUTER(1)
EXPERTS(1)
CODE(2)
/* clang-format off */ /* it takes the line above for a type */
static const moec_stage_fn e200[] = {up20, down20}, e211[] = {up21, down21}; /* no mixed types */
/* clang-format on */

#define MOE_ENTRIES(c)                                                                             \
  {                                                                                                \
    {0, 0, 0, 3, f##c##00, bytes##c}, {0, 0, 1, 3, f##c##01, bytes##c},                            \
        {0, 1, 0, 3, f##c##10, bytes##c}, {0, 1, 1, 3, f##c##11, bytes##c},                        \
        {1, 0, 0, 1, r##c##0, bytes##c}, {1, 1, 0, 1, r##c##1, bytes##c},                          \
        {2, 0, 0, 2, e##c##00, bytes##c}, {2, 0, 1, 2, e##c##01, bytes##c},                        \
        {2, 1, 0, 2, e##c##10, bytes##c}, {                                                        \
      2, 1, 1, 2, e##c##11, bytes##c                                                               \
    }                                                                                              \
  }
static const moec_entry entries0[] = MOE_ENTRIES(0), entries1[] = MOE_ENTRIES(1);
static const moec_entry entries2[] = {{0, 0, 0, 2, e200, bytes2}, {0, 1, 1, 2, e211, bytes2}};

#define UP(n, m) (((n) + (m) - 1) / (m) * (m))
#define BYTES(size, per, e, rows, cols)                                                            \
  UP((uint64_t)(e) * (UP(rows, per) / (per)) * UP(cols, 32) * 32 * (size), 4096)
static const moec_weight_desc weights0[] = {
    {"router", "f32", "panel32-1", 1, 1, 5, 40, BYTES(4, 32, 1, 5, 40)},
    {"gate_up", "f32", "panel32-1", 5, 2, 23, 40, BYTES(4, 16, 5, 23, 40)},
    {"down", "f32", "panel32-1", 5, 1, 40, 23, BYTES(4, 32, 5, 40, 23)}};
static const moec_weight_desc weights1[] = {
    {"router", "f32", "panel32-1", 1, 1, 9, 33, BYTES(4, 32, 1, 9, 33)},
    {"gate_up", "bf16", "panel32-1", 9, 2, 48, 33, BYTES(2, 16, 9, 48, 33)},
    {"down", "bf16", "panel32-1", 9, 1, 33, 48, BYTES(2, 32, 9, 33, 48)}};
static const moec_weight_desc weights2[] = {
    {"gate_up", "bf16", "panel32-1", 1, 2, 70, 40, BYTES(2, 16, 1, 70, 40)},
    {"down", "bf16", "panel32-1", 1, 1, 40, 70, BYTES(2, 32, 1, 40, 70)}};

#define LEVELS(c, n)                                                                               \
  {                                                                                                \
    {"x86-64-v3", 3, n, entries##c}, { "x86-64-v4", 4, n, entries##c }                             \
  }
static const moec_level_code levels0[] = LEVELS(0, 10), levels1[] = LEVELS(1, 10),
                             levels2[] = LEVELS(2, 2);
static const moec_layer_code codes[] = {
    {0, MOEC_DT_F32, 40, 23, 5, 2, 0, 0, 0, 0, 11040, 3, 2, weights0, levels0},
    {0, MOEC_DT_BF16, 33, 48, 9, 3, 0, 0, 0, 0, 28512, 3, 2, weights1, levels1},
    {1, MOEC_DT_F32, 40, 70, 1, 1, 0, 0, 0, 0, 16800, 2, 2, weights2, levels2}};
static const moec_layer_desc layers[] = {
    {"model.layers.0.mlp", "model.layers.0.mlp.safetensors", 0, 0, &codes[0], {1, 7}},
    {"model.layers.1.mlp", "model.layers.1.mlp.safetensors", 1, 0, &codes[0], {2, 7}},
    {"model.layers.2.mlp", "model.layers.2.mlp.safetensors", 2, 0, &codes[1], {3, 7}},
    {"model.layers.3.mlp", "model.layers.3.mlp.safetensors", 3, 0, &codes[2], {4, 7}}};

__attribute__((visibility("default"))) const moec_module mock_moec_module = {
    sizeof(moec_module), MOEC_ABI, 0, "mock", "0.0.0", MOCK_LAYERS, 0, layers, 0, 0, 0, 0, 0, 0, 0};
