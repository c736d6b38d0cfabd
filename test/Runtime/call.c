/* moec_run: results against float64, and every refusal. Compiled as C99 and as C++17. */
#include "helpers.h"

#include <xmmintrin.h>

enum { T = 7 };

static float *inputs(int64_t n, int compute_bf16) { return random_values(n, 1.0f, compute_bf16); }

static void forward(moec_context *c, int layer, double bound) {
  const source *s = &sources[layer];
  float *x = inputs(T * s->H, s->compute_bf16);
  float *y = (float *)malloc((size_t)(T * s->H) * 4);
  double *want = (double *)malloc((size_t)(T * s->H) * sizeof(double));
  float logits[T * 16], weights[T * 4];
  int32_t ids[T * 4], counts[16], counted[16];
  double z[16], w[4], dense = 1;
  int32_t zero = 0, chosen[T][4];
  memset(counted, 0, sizeof counted);
  for (int t = 0; t < T; ++t) {
    if (!s->dense) {
      expect_route(s, x + t * s->H, z, chosen[t], w);
      for (int j = 0; j < s->K; ++j)
        ++counted[chosen[t][j]];
    }
    expect_row(s, x + t * s->H, s->dense ? &zero : chosen[t], s->dense ? &dense : w, s->K,
               want + t * s->H);
  }
  tensor tx, ty, te, tw, tl, tc;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, F32, T, s->H);
  call.y = make2(&ty, y, F32, T, s->H);
  memset(y, 0xff, (size_t)(T * s->H) * 4); /* NaN */
  OK(moec_run(c, layer, &call, &err));
  CHECK(err.code == 0 && !err.message[0]);
  CHECK(distance(y, want, T * s->H) < bound);

  /* MOEC_ACCUMULATE adds. */
  for (int64_t i = 0; i < T * s->H; ++i) {
    y[i] = 0.25f;
    want[i] += 0.25;
  }
  call.flags = MOEC_ACCUMULATE | MOEC_ROUTED_ONLY;
  OK(moec_run(c, layer, &call, &err));
  CHECK(distance(y, want, T * s->H) < bound);
  for (int64_t i = 0; i < T * s->H; ++i)
    want[i] -= 0.25;
  call.flags = 0;

  /* Row strides and byte offsets. */
  float *wide = (float *)malloc((size_t)(T * 2 * s->H + 3) * 4);
  memset(wide, 0xff, (size_t)(T * 2 * s->H + 3) * 4);
  for (int t = 0; t < T; ++t)
    memcpy(wide + 3 + t * 2 * s->H, x + t * s->H, (size_t)s->H * 4);
  make2(&tx, wide, F32, T, s->H);
  tx.t.byte_offset = 12;
  stride2(&tx, 2 * s->H, 1);
  make2(&ty, wide, F32, T, s->H); /* beside x in the same rows: no overlap */
  ty.t.byte_offset = 12 + (uint64_t)s->H * 4;
  stride2(&ty, 2 * s->H, 1);
  OK(moec_run(c, layer, &call, &err));
  for (int t = 0; t < T; ++t)
    CHECK(distance(wide + 3 + (2 * t + 1) * s->H, want + t * s->H, s->H) < 4 * bound);
  make2(&tx, x, F32, T, s->H);
  make2(&ty, y, F32, T, s->H);

  if (!s->dense) {
    /* Router outputs, with y and without. */
    for (int pass = 0; pass < 2; ++pass) {
      memset(logits, 0xff, sizeof logits);
      memset(weights, 0xff, sizeof weights);
      memset(ids, 0xff, sizeof ids);
      memset(y, 0xff, (size_t)(T * s->H) * 4);
      call.y = pass ? NULL : &ty.t;
      call.experts_out = make2(&te, ids, I32, T, s->K);
      call.weights_out = make2(&tw, weights, F32, T, s->K);
      call.logits_out = make2(&tl, logits, F32, T, s->E);
      call.counts_out = make(&tc, counts, I32, s->E + 1, -1, -1);
      OK(moec_run(c, layer, &call, &err));
      if (!pass)
        CHECK(distance(y, want, T * s->H) < bound);
      for (int t = 0; t < T; ++t) {
        expect_route(s, x + t * s->H, z, chosen[t], w);
        CHECK(distance(logits + t * s->E, z, s->E) < 1e-5);
        CHECK(distance(weights + t * s->K, w, s->K) < 1e-5);
        CHECK(!memcmp(ids + t * s->K, chosen[t], (size_t)s->K * 4));
      }
      for (int e = 0; e <= s->E; ++e)
        CHECK(counts[e] == (e < s->E ? counted[e] : 0));
    }
    /* Ids alone: the entry still has a place for the rest. */
    memset(ids, 0xff, sizeof ids);
    call.weights_out = call.logits_out = call.counts_out = NULL;
    OK(moec_run(c, layer, &call, &err));
    for (int t = 0; t < T; ++t)
      CHECK(!memcmp(ids + t * s->K, chosen[t], (size_t)s->K * 4));
    call.counts_out = &tc.t;
    call.y = &ty.t;
    call.experts_out = call.weights_out = call.logits_out = NULL;

    /* Experts given: more slots than K, skipped ids, ids twice, i64 and f16, strided. */
    enum { k = 6 };
    int64_t given[T][k + 2];
    uint16_t half[T][k];
    static const uint16_t halves[4] = {0x3c00, 0x3800, 0xb400, 0x0001}; /* 1, .5, -.25, 2^-24 */
    static const double values[4] = {1, 0.5, -0.25, 5.9604644775390625e-08};
    int32_t g[k];
    double v[k];
    memset(counted, 0, sizeof counted);
    for (int t = 0; t < T; ++t) {
      for (int j = 0; j < k; ++j) {
        given[t][j] = (t * 3 + j * j) % (s->E + 1) - 1;
        half[t][j] = halves[(t + j) % 4];
        g[j] = (int32_t)given[t][j];
        v[j] = values[(t + j) % 4];
        ++counted[g[j] < 0 ? s->E : g[j]];
      }
      given[t][k] = given[t][k + 1] = 1 << 20; /* between the rows: not read */
      expect_row(s, x + t * s->H, g, v, k, want + t * s->H);
    }
    call.experts = make2(&te, given, I64, T, k);
    stride2(&te, k + 2, 1);
    call.weights = make2(&tw, half, F16, T, k);
    memset(y, 0xff, (size_t)(T * s->H) * 4);
    memset(counts, 0xff, sizeof counts);
    OK(moec_run(c, layer, &call, &err));
    CHECK(distance(y, want, T * s->H) < bound);
    for (int e = 0; e <= s->E; ++e)
      CHECK(counts[e] == counted[e]);

    /* Foreign ids: refused, or skipped when asked. */
    given[2][1] = s->E;
    FAILS(moec_run(c, layer, &call, &err), EXPERT_ID, "experts[2, 1]");
    given[2][1] = (int64_t)1 << 32; /* 0 if only 32 bits were looked at */
    FAILS(moec_run(c, layer, &call, &err), EXPERT_ID, "4294967296");
    given[2][1] = -2;
    FAILS(moec_run(c, layer, &call, &err), EXPERT_ID, "-2");
    call.flags = MOEC_SKIP_FOREIGN;
    for (int j = 0; j < k; ++j) {
      g[j] = j == 1 ? -1 : (int32_t)given[2][j];
      v[j] = values[(2 + j) % 4];
    }
    expect_row(s, x + 2 * s->H, g, v, k, want + 2 * s->H);
    static const int64_t foreign[] = {-2, (int64_t)1 << 32, 1000000, -((int64_t)1 << 33)};
    for (int i = 0; i < 5; ++i) {
      given[2][1] = i < 4 ? foreign[i] : s->E;
      OK(moec_run(c, layer, &call, &err));
      CHECK(distance(y, want, T * s->H) < bound);
    }
    call.flags = 0;

    /* k = 0: the empty sum. */
    call.experts = make2(&te, NULL, I32, T, 0);
    call.weights = make2(&tw, NULL, F32, T, 0);
    memset(y, 0xff, (size_t)(T * s->H) * 4);
    OK(moec_run(c, layer, &call, &err));
    for (int64_t i = 0; i < T * s->H; ++i)
      CHECK(y[i] == 0);
    call.experts = call.weights = NULL;

    /* T = 0: counts are zero, pointers may be NULL. */
    make2(&tx, NULL, F32, 0, s->H);
    make2(&ty, NULL, F32, 0, s->H);
    memset(counts, 0xff, sizeof counts);
    OK(moec_run(c, layer, &call, &err));
    for (int e = 0; e <= s->E; ++e)
      CHECK(counts[e] == 0);
  }
  free(x);
  free(y);
  free(wide);
  free(want);
}

static void bf16_activations(moec_context *c) {
  const source *s = &sources[2];
  uint16_t x[T * 33], y[T * 33];
  float x32[T * 33], y32[T * 33];
  double want[T * 33], z[16], w[4];
  int32_t ids[4];
  for (int i = 0; i < T * 33; ++i)
    x32[i] = bf16_value(x[i] = bf16_round(uniform()));
  for (int t = 0; t < T; ++t) {
    expect_route(s, x32 + t * s->H, z, ids, w);
    expect_row(s, x32 + t * s->H, ids, w, s->K, want + t * s->H);
  }
  tensor tx, ty;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, BF16, T, 33);
  call.y = make2(&ty, y, BF16, T, 33);
  OK(moec_run(c, 2, &call, &err));
  for (int i = 0; i < T * 33; ++i)
    y32[i] = bf16_value(y[i]);
  CHECK(distance(y32, want, T * 33) < 0.01);
  call.y = make2(&ty, y32, F32, T, 33); /* y's type is its own */
  OK(moec_run(c, 2, &call, &err));
  CHECK(distance(y32, want, T * 33) < 0.01);
}

static void refusals(moec_model *m, moec_context *c) {
  enum { H = 40, E = 5, K = 2 };
  static float x[(T + 1) * H * 2], y[(T + 1) * H * 2], f[T * 16];
  static int32_t ids[T * 4], counts[16];
  for (int i = 0; i < T * H; ++i)
    x[i] = uniform();
  tensor tx, ty, te, tw, tl, tc, other;
  moec_call call;
#define RESET()                                                                                    \
  (MOEC_INIT(call), call.x = make2(&tx, x, F32, T, H), call.y = make2(&ty, y, F32, T, H))

  RESET();
  FAILS(moec_run(NULL, 0, &call, &err), ARGUMENT, "context");
  FAILS(moec_run(c, 0, NULL, &err), ARGUMENT, "call");
  CHECK(moec_run(c, 0, NULL, NULL) == MOEC_E_ARGUMENT); /* no message wanted */
  FAILS(moec_run(c, -1, &call, &err), ARGUMENT, "layer: expected 0 to 3, but got -1");
  FAILS(moec_run(c, MOCK_LAYERS, &call, &err), ARGUMENT, "layer");
  call.struct_size = 8;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "struct_size");
  {
    struct {
      moec_call call;
      uint64_t later;
    } longer;
    memset(&longer, 0, sizeof longer);
    longer.call = call;
    longer.call.struct_size = sizeof longer;
    OK(moec_run(c, 0, &longer.call, &err)); /* a later caller that does not use its new field */
    longer.later = 1;
    FAILS(moec_run(c, 0, &longer.call, &err), ARGUMENT, "does not know");
  }
  RESET(), call.flags = 8;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "flags");
  RESET(), call.stream = &call;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "stream");
  RESET(), call.x = NULL;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "x: expected a tensor");
  RESET(), call.y = NULL;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "expected y or a router output");

  /* rank, shape */
  RESET(), tx.t.ndim = 1;
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "x: expected [T, 40], but got [7]");
  RESET(), make(&tx, x, F32, 1, T, H);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "x: expected [T, 40], but got [1, 7, 40]");
  RESET(), make2(&tx, x, F32, T, H - 1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "x: expected [T, 40], but got [7, 39]");
  RESET(), make2(&tx, x, F32, -1, H);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "x");
  RESET(), tx.t.shape = NULL;
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "without a shape");
  RESET(), tx.t.ndim = -5;
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "rank -5");
  RESET(), tx.t.ndim = 1 << 30;
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "rank 1073741824");
  RESET(), make2(&ty, y, F32, T - 1, H);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "y: expected [7, 40], but got [6, 40]");
  RESET(), make2(&ty, y, F32, T, H + 1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "y");
  RESET(), make2(&tx, x, F32, (int64_t)1 << 62, H), make2(&ty, y, F32, (int64_t)1 << 62, H);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "fits in memory");

  /* dtype */
  RESET(), make2(&tx, x, F16, T, H);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "x: expected f32 or bf16, but got f16");
  RESET(), make2(&ty, y, F16, T, H);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "y: expected f32 or bf16, but got f16");
  RESET(), make2(&tx, x, I32, T, H);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "i32");
  RESET(), tx.t.dtype.lanes = 4;
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "f32x4");
  RESET(), tx.t.dtype.bits = 64;
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "f64");
  RESET(), make2(&ty, y, BF16, T, H); /* the dense layer has no mixed code */
  FAILS(moec_run(c, 3, &call, &err), DTYPE, "x f32, y bf16");

  /* strides, alignment, null, device */
  RESET(), stride2(&tx, H, 2);
  FAILS(moec_run(c, 0, &call, &err), STRIDE, "x: expected a contiguous last dimension");
  RESET(), stride2(&tx, H - 1, 1);
  FAILS(moec_run(c, 0, &call, &err), STRIDE, "x: expected a row stride of at least 40");
  RESET(), stride2(&tx, 0, 1);
  FAILS(moec_run(c, 0, &call, &err), STRIDE, "x");
  RESET(), stride2(&ty, -H, 1);
  FAILS(moec_run(c, 0, &call, &err), STRIDE, "y");
  RESET(), tx.t.byte_offset = 2;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "x: expected an address aligned to 4");
  RESET(), tx.t.data = NULL;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "x: expected data, but got NULL");
  RESET(), ty.t.data = NULL;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "y: expected data, but got NULL");
  RESET(), tx.t.device.device_type = kDLCUDA;
  FAILS(moec_run(c, 0, &call, &err), DEVICE, "x");
  RESET(), ty.t.device.device_type = kDLCUDA;
  FAILS(moec_run(c, 0, &call, &err), DEVICE, "y");

  /* overlap */
  RESET(), ty.t.data = x;
  FAILS(moec_run(c, 0, &call, &err), OVERLAP,
        "y: expected memory of its own, but got memory that x");
  RESET(), ty.t.data = x + T * H - 1;
  FAILS(moec_run(c, 0, &call, &err), OVERLAP, "x");
  RESET(), call.flags = MOEC_ACCUMULATE, ty.t.data = x;
  FAILS(moec_run(c, 0, &call, &err), OVERLAP, "x");
  RESET(), stride2(&tx, 2 * H, 1), make2(&ty, x + H - 1, F32, T, H), stride2(&ty, 2 * H, 1);
  FAILS(moec_run(c, 0, &call, &err), OVERLAP, "x");
  RESET(), stride2(&tx, 2 * H, 1), make2(&ty, x + H + 1, F32, T, H), stride2(&ty, 2 * H, 1);
  FAILS(moec_run(c, 0, &call, &err), OVERLAP, "x");
  RESET(), stride2(&tx, 2 * H, 1), make2(&ty, x + H, F32, T, H), stride2(&ty, 2 * H, 1);
  OK(moec_run(c, 0, &call, &err));
  RESET(), call.weights_out = make2(&tw, y, F32, T, K);
  FAILS(moec_run(c, 0, &call, &err), OVERLAP, "weights_out");
  RESET(), ty.t.data = x + T * H; /* right behind x */
  OK(moec_run(c, 0, &call, &err));

  /* inputs and outputs that do not go together */
  RESET(), call.experts = make2(&te, ids, I32, T, K);
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "experts alone");
  RESET(), call.weights = make2(&tw, f, F32, T, K);
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "weights alone");
  call.experts = make2(&te, ids, I32, T, K);
  OK(moec_run(c, 0, &call, &err));
  make2(&te, ids, U8, T, K);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "experts: expected i32 or i64, but got u8");
  make2(&te, ids, I32, T - 1, K);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "experts: expected [7, k]");
  make2(&te, ids, I32, T, K), make2(&tw, f, F32, T, K + 1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "weights: expected [7, 2], but got [7, 3]");
  make2(&tw, f, I32, T, K);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "weights");
  make2(&tw, f, F32, T, K), call.y = NULL;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "y: expected a tensor");
  call.y = &ty.t, call.experts_out = make2(&other, counts, I32, T, K);
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "experts_out: expected NULL");
  call.experts_out = NULL, call.weights_out = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "weights_out: expected NULL");
  call.weights_out = NULL, call.logits_out = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "logits_out: expected NULL");
  RESET(), call.experts_out = make2(&te, ids, F32, T, K);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "experts_out");
  make2(&te, ids, I32, T, K + 1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "experts_out: expected [7, 2]");
  RESET(), call.weights_out = make2(&tw, f, BF16, T, K);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "weights_out");
  RESET(), call.logits_out = make2(&tl, f, F32, T, E + 1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "logits_out");
  RESET(), call.counts_out = make(&tc, counts, I32, E, -1, -1);
  FAILS(moec_run(c, 0, &call, &err), SHAPE, "counts_out: expected [6], but got [5]");
  RESET(), call.counts_out = make(&tc, counts, I64, E + 1, -1, -1);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "counts_out");
  make2(&other, f, F32, T, 1);
  RESET(), call.router_x = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "router_x: expected NULL");
  RESET(), call.token_ids = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "token_ids: expected NULL");
  RESET(), call.token_types = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "token_types: expected NULL");
  RESET(), call.sequences = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "sequences: expected NULL");
  RESET(), call.state = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "state: expected NULL");
  RESET(), call.state_out = &other.t;
  FAILS(moec_run(c, 0, &call, &err), ARGUMENT, "state_out: expected NULL");
  RESET(), call.experts = call.weights = &other.t;
  FAILS(moec_run(c, 3, &call, &err), ARGUMENT, "dense");
  RESET(), call.counts_out = &other.t;
  FAILS(moec_run(c, 3, &call, &err), ARGUMENT, "dense");
  RESET(), call.y = NULL;
  FAILS(moec_run(c, 3, &call, &err), ARGUMENT, "dense");

  FAILS(moec_context_status(NULL, &err), ARGUMENT, "context");
  OK(moec_context_status(c, &err));

  /* layer info */
  moec_layer_info info;
  MOEC_INIT(info);
  OK(moec_get_layer_info(m, 2, &info, &err));
  CHECK(!strcmp(info.name, "model.layers.2.mlp") && info.index == 2 && info.kind == 0);
  CHECK(info.H == 33 && info.F == 48 && info.E == 9 && info.K == 3 && !info.S && !info.W);
  CHECK(info.compute.code == kDLBfloat && info.compute.bits == 16 && info.compute.lanes == 1);
  CHECK(!strcmp(info.format, "bf16") && !strcmp(info.layout, "panel32-1"));
  CHECK(!strncmp(info.level, "x86-64-v", 8) && !info.needs);
  CHECK(info.weight_bytes % 4096 == 0 && info.weight_bytes && info.active_flops == 28512);
  FAILS(moec_get_layer_info(NULL, 0, &info, &err), ARGUMENT, "model");
  FAILS(moec_get_layer_info(m, 0, NULL, &err), ARGUMENT, "info");
  FAILS(moec_get_layer_info(m, 4, &info, &err), ARGUMENT, "layer");
  info.struct_size = 4;
  FAILS(moec_get_layer_info(m, 0, &info, &err), ARGUMENT, "struct_size");
  CHECK(moec_layer_count(NULL) == 0 && moec_layer_count(m) == MOCK_LAYERS);
  CHECK(moec_abi_version() == MOEC_ABI);
  CHECK(!strcmp(moec_error_name(MOEC_E_SHAPE), "E-SHAPE") && !strcmp(moec_error_name(0), "OK") &&
        !strcmp(moec_error_name(-7), "E-UNKNOWN"));
}

/* A host that flushes subnormals and rounds up gets the same bits, and its mode back. */
static void float_mode(moec_context *c) {
  float x[40], a[40], b[40];
  for (int i = 0; i < 40; ++i)
    x[i] = uniform() * 1e-20f; /* products of gate and up are subnormal */
  tensor tx, ty;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, F32, 1, 40);
  call.y = make2(&ty, a, F32, 1, 40);
  OK(moec_run(c, 0, &call, &err));
  CHECK((mock_float_mode & ~0x3fu) == 0x1f80);
  ty.t.data = b;
  const unsigned before = _mm_getcsr(), odd = 0xdfc0; /* FTZ, DAZ, round up */
  _mm_setcsr(odd);
  int r = moec_run(c, 0, &call, &err);
  const unsigned after = _mm_getcsr();
  _mm_setcsr(before);
  OK(r);
  CHECK(after == odd);
  CHECK((mock_float_mode & ~0x3fu) == 0x1f80);
  CHECK(!memcmp(a, b, sizeof a));
}

int main(void) {
  make_sources();
  moec_model *m = open_mock();
  moec_context *c = NULL;
  OK(moec_context_create(m, NULL, &c, &err));
  tensor t, ty;
  static float x[40], y[40];
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&t, x, F32, 1, 40);
  call.y = make2(&ty, y, F32, 1, 40);
  FAILS(moec_run(c, 0, &call, &err), WEIGHTS, "never set");
  set_all(m);
  for (int i = 0; i < MOCK_LAYERS; ++i)
    forward(c, i, sources[i].compute_bf16 ? 0.01 : 1e-5);
  bf16_activations(c);
  refusals(m, c);
  float_mode(c);
  moec_close(m); /* the context keeps the model */
  OK(moec_run(c, 0, &call, &err));
  moec_context_destroy(c);
  moec_context_destroy(NULL);
  moec_close(NULL);
  return finish("call");
}
