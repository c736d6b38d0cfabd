/* Shared by the C programs of this folder; C99 and C++17. */
#ifndef HELPERS_H
#define HELPERS_H
#include "mock.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;
#define CHECK(condition)                                                                           \
  ((condition) ? (void)0                                                                           \
               : (void)(++failures,                                                                \
                        fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition)))
/* The call succeeds; prints its message if not. */
#define OK(call) check_code((call), 0, NULL, __LINE__)
/* The call fails with MOEC_E_<name> and its message holds the text. */
#define FAILS(call, name, text) check_code((call), MOEC_E_##name, text, __LINE__)

static moec_error err;

static void check_code(int got, int want, const char *text, int line) {
  const char *name = moec_error_name(want);
  if (got != want) {
    ++failures;
    fprintf(stderr, "line %d: expected %s, but got %s: %s\n", line, name, moec_error_name(got),
            err.message);
    return;
  }
  if (!want)
    return;
  size_t n = strlen(name);
  if (err.code != want || strncmp(err.message, name, n) || strncmp(err.message + n, ": ", 2) ||
      !strstr(err.message, text)) {
    ++failures;
    fprintf(stderr, "line %d: expected a message %s with \"%s\", but got: %s\n", line, name, text,
            err.message);
  }
  if (getenv("MOEC_TEST_VERBOSE"))
    fprintf(stderr, "%s\n", err.message);
}

/* ---- numbers ---- */

static uint64_t seed = 12345;
static float uniform(void) { /* -1 ... 1, not zero */
  seed = seed * 6364136223846793005u + 1442695040888963407u;
  return ((float)(seed >> 41) + 0.5f) * (1.0f / 4194304.0f) - 1.0f;
}
static float bf16_value(uint16_t h) {
  uint32_t b = (uint32_t)h << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}
static uint16_t bf16_round(float f) { /* finite values */
  uint32_t b;
  memcpy(&b, &f, 4);
  return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}

/* ---- tensors ---- */

typedef struct {
  DLTensor t;
  int64_t shape[3], strides[3];
} tensor;

enum { F32, BF16, F16, I32, I64, U8 };

/* A compact tensor; extents below 0 do not exist. */
static DLTensor *make(tensor *t, void *data, int type, int64_t a, int64_t b, int64_t c) {
  static const uint8_t codes[] = {kDLFloat, kDLBfloat, kDLFloat, kDLInt, kDLInt, kDLUInt};
  static const uint8_t bits[] = {32, 16, 16, 32, 64, 8};
  memset(t, 0, sizeof *t);
  t->t.data = data;
  t->t.device.device_type = kDLCPU;
  t->t.ndim = b < 0 ? 1 : c < 0 ? 2 : 3;
  t->t.dtype.code = codes[type];
  t->t.dtype.bits = bits[type];
  t->t.dtype.lanes = 1;
  t->t.shape = t->shape;
  t->shape[0] = a;
  t->shape[1] = b;
  t->shape[2] = c;
  return &t->t;
}
static DLTensor *make2(tensor *t, void *data, int type, int64_t a, int64_t b) {
  return make(t, data, type, a, b, -1);
}
static DLTensor *stride2(tensor *t, int64_t a, int64_t b) {
  t->strides[0] = a;
  t->strides[1] = b;
  t->t.strides = t->strides;
  return &t->t;
}

/* ---- the mock's layers: sources and float64 expectation ---- */

typedef struct {
  int64_t H, F, E, K;
  int dense, bf16, compute_bf16;
  float *router, *gate, *up, *down; /* [E,H], [E,F,H], [E,F,H], [E,H,F]; bf16: rounded values */
} source;

static source sources[MOCK_LAYERS];

static float *random_values(int64_t n, float scale, int round) {
  float *p = (float *)malloc((size_t)n * 4);
  for (int64_t i = 0; i < n; ++i) {
    float v = uniform() * scale;
    p[i] = round ? bf16_value(bf16_round(v)) : v;
  }
  return p;
}

static void make_sources(void) {
  static const int64_t sizes[MOCK_LAYERS][7] = {{40, 23, 5, 2, 0, 0, 0},
                                                {40, 23, 5, 2, 0, 0, 0},
                                                {33, 48, 9, 3, 0, 1, 1},
                                                {40, 70, 1, 1, 1, 1, 0}};
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    source *s = &sources[i];
    s->H = sizes[i][0];
    s->F = sizes[i][1];
    s->E = sizes[i][2];
    s->K = sizes[i][3];
    s->dense = (int)sizes[i][4];
    s->bf16 = (int)sizes[i][5];
    s->compute_bf16 = (int)sizes[i][6];
    s->router = random_values(s->E * s->H, 0.8f, 0);
    s->gate = random_values(s->E * s->F * s->H, 0.3f, s->bf16);
    s->up = random_values(s->E * s->F * s->H, 0.3f, s->bf16);
    s->down = random_values(s->E * s->H * s->F, 0.3f, s->bf16);
  }
}

static void free_sources(void) {
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    free(sources[i].router);
    free(sources[i].gate);
    free(sources[i].up);
    free(sources[i].down);
  }
}

/* Router in float64: logits [E], ids and weights [K]. */
static void expect_route(const source *s, const float *x, double *logits, int32_t *ids,
                         double *weights) {
  double p[16], sum = 0;
  for (int64_t e = 0; e < s->E; ++e) {
    double z = 0;
    for (int64_t k = 0; k < s->H; ++k)
      z += (double)x[k] * s->router[e * s->H + k];
    logits[e] = z;
    sum += p[e] = exp(z);
  }
  for (int64_t j = 0; j < s->K; ++j) {
    int64_t best = 0;
    for (int64_t e = 1; e < s->E; ++e)
      if (p[e] > p[best])
        best = e;
    ids[j] = (int32_t)best;
    weights[j] = p[best] / sum;
    p[best] = -1;
  }
}

/* One row of y in float64. */
static void expect_row(const source *s, const float *x, const int32_t *ids, const double *weights,
                       int64_t slots, double *y) {
  double *h = (double *)malloc((size_t)s->F * sizeof(double));
  for (int64_t n = 0; n < s->H; ++n)
    y[n] = 0;
  for (int64_t j = 0; j < slots; ++j) {
    int64_t e = ids[j];
    if (e < 0)
      continue;
    for (int64_t n = 0; n < s->F; ++n) {
      double g = 0, u = 0;
      for (int64_t k = 0; k < s->H; ++k) {
        g += (double)x[k] * s->gate[(e * s->F + n) * s->H + k];
        u += (double)x[k] * s->up[(e * s->F + n) * s->H + k];
      }
      h[n] = (g > 0 ? g : 0) * u;
    }
    for (int64_t n = 0; n < s->H; ++n) {
      double z = 0;
      for (int64_t k = 0; k < s->F; ++k)
        z += h[k] * s->down[(e * s->H + n) * s->F + k];
      y[n] += weights[j] * z;
    }
  }
  free(h);
}

/* Brings every weight of every layer by moec_set_weight. */
static void set_all(moec_model *m) {
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    const source *s = &sources[i];
    tensor t;
    if (!s->dense)
      OK(moec_set_weight(m, i, "router", -1, make2(&t, s->router, F32, s->E, s->H), 0, &err));
    OK(moec_set_weight(m, i, "gate", -1, make(&t, s->gate, F32, s->E, s->F, s->H), 0, &err));
    OK(moec_set_weight(m, i, "up", -1, make(&t, s->up, F32, s->E, s->F, s->H), 0, &err));
    OK(moec_set_weight(m, i, "down", -1, make(&t, s->down, F32, s->E, s->H, s->F), 0, &err));
  }
}

static moec_model *open_mock(void) {
  moec_open_options o;
  MOEC_INIT(o);
  o.load = MOEC_NONE;
  moec_model *m = NULL;
  OK(moec_open_module(&mock_moec_module, &o, &m, &err));
  return m;
}

/* Largest |a - b| over largest |b|. */
static double distance(const float *a, const double *b, int64_t n) {
  double d = 0, most = 1e-30;
  for (int64_t i = 0; i < n; ++i) {
    double e = fabs((double)a[i] - b[i]);
    d = e > d || e != e ? e : d;
    most = fabs(b[i]) > most ? fabs(b[i]) : most;
  }
  return d / most;
}

static int finish(const char *name) {
  free_sources();
  if (failures)
    fprintf(stderr, "%s: %d failures\n", name, failures);
  return failures != 0;
}
#endif
