/* moec_set_weight: roles, single experts, strides, types, refusals; a refused weight changes
 * nothing.
 */
#include "helpers.h"

static float y[3 * 40];
static int row(moec_context *c, int layer) {
  static float x[3 * 40];
  const int64_t h = sources[layer].H;
  seed = 4711;
  for (int i = 0; i < 3 * h; ++i)
    x[i] = uniform();
  tensor tx, ty;
  moec_call call;
  MOEC_INIT(call);
  call.x = make2(&tx, x, F32, 3, h);
  call.y = make2(&ty, y, F32, 3, h);
  return moec_run(c, layer, &call, &err);
}

int main(void) {
  make_sources();
  enum { H = 40, F = 23, E = 5 };
  const source *s = &sources[0];
  moec_model *m = open_mock();
  moec_context *c = NULL;
  OK(moec_context_create(m, NULL, &c, &err));
  tensor t;

  /* Layer 0 whole; the float64 comparison is in call.c. */
  set_all(m);
  float want[3 * H];
  OK(row(c, 0));
  memcpy(want, y, sizeof want);
  moec_context_destroy(c);
  moec_close(m);

  /* Piece by piece, in every form the header promises; it runs only when the last piece is there.
   */
  m = open_mock();
  OK(moec_context_create(m, NULL, &c, &err));
  for (int64_t e = 0; e < E; ++e) {
    FAILS(row(c, 0), WEIGHTS, "never set");
    if (e % 2) {
      OK(moec_set_weight(m, 0, "router", e, make(&t, s->router + e * H, F32, H, -1, -1), 0, &err));
    } else {
      OK(moec_set_weight(m, 0, "router", e, make2(&t, s->router + e * H, F32, 1, H), 0, &err));
    }
    /* gate and up in one tensor, or alone, or transposed */
    float both[2 * F * H], across[F * H];
    memcpy(both, s->gate + e * F * H, sizeof both / 2);
    memcpy(both + F * H, s->up + e * F * H, sizeof both / 2);
    if (e % 2) {
      OK(moec_set_weight(m, 0, "gate_up", e, make2(&t, both, F32, 2 * F, H), 0, &err));
    } else {
      OK(moec_set_weight(m, 0, "up", e, make(&t, both + F * H, F32, 1, F, H), 0, &err));
      OK(moec_set_weight(m, 0, "up", e, &t.t, 0, &err)); /* twice counts once */
      FAILS(row(c, 0), WEIGHTS, "never set");
      for (int i = 0; i < F * H; ++i)
        across[i % H * F + i / H] = both[i];
      make2(&t, across, F32, F, H);
      OK(moec_set_weight(m, 0, "gate", e, stride2(&t, 1, F), 0, &err));
    }
    float wide[2 * H * F + 1];
    for (int i = 0; i < H * F; ++i)
      wide[1 + 2 * i] = s->down[e * H * F + i];
    make2(&t, wide, F32, H, F);
    t.t.byte_offset = 4;
    OK(moec_set_weight(m, 0, "down", e, stride2(&t, 2 * F, 2), 0, &err));
  }
  OK(row(c, 0));
  CHECK(!memcmp(y, want, sizeof want));
  FAILS(row(c, 1), WEIGHTS, "model.layers.1.mlp"); /* same code, other weights */

  /* A dense layer takes expert 0 or -1, with or without the leading dimension. */
  const source *d = &sources[3];
  OK(moec_set_weight(m, 3, "gate", -1, make2(&t, d->gate, F32, 70, 40), 0, &err));
  OK(moec_set_weight(m, 3, "up", 0, make(&t, d->up, F32, 1, 70, 40), 0, &err));
  OK(moec_set_weight(m, 3, "down", 0, make2(&t, d->down, F32, 40, 70), 0, &err));
  OK(row(c, 3));

  /* bf16 and f16 sources; f32 sources are rounded to the layer's format. */
  const source *b = &sources[2];
  uint16_t *half = (uint16_t *)malloc((size_t)(b->E * b->F * b->H) * 2);
  float *sum = (float *)malloc((size_t)(b->E * b->F * b->H) * 4), y2[3 * 40];
  for (int64_t i = 0; i < b->E * b->F * b->H; ++i) {
    half[i] = bf16_round(b->gate[i]);
    sum[i] = b->gate[i] * (1 + 1e-4f); /* rounds to the same bf16 */
  }
  set_all(m);
  OK(row(c, 2));
  memcpy(y2, y, sizeof y2);
  OK(moec_set_weight(m, 2, "gate", -1, make(&t, half, BF16, b->E, b->F, b->H), 0, &err));
  OK(row(c, 2));
  CHECK(!memcmp(y, y2, sizeof(float) * 3 * 33));
  OK(moec_set_weight(m, 2, "gate", -1, make(&t, sum, F32, b->E, b->F, b->H), 0, &err));
  OK(row(c, 2));
  CHECK(!memcmp(y, y2, sizeof(float) * 3 * 33));
  for (int64_t i = 0; i < b->E * b->F * b->H; ++i) {
    half[i] = (uint16_t)(i % 3 ? 0x3800 : 0xb400); /* 0.5, -0.25 */
    sum[i] = i % 3 ? 0.5f : -0.25f;
  }
  OK(moec_set_weight(m, 2, "gate", -1, make(&t, half, F16, b->E, b->F, b->H), 0, &err));
  OK(row(c, 2));
  memcpy(y2, y, sizeof y2);
  OK(moec_set_weight(m, 2, "gate", -1, make(&t, sum, F32, b->E, b->F, b->H), 0, &err));
  OK(row(c, 2));
  CHECK(!memcmp(y, y2, sizeof(float) * 3 * 33));

  /* Refusals; the layer computes what it did. */
  float *w = s->down, saved = w[9];
  make(&t, w, F32, E, H, F);
  FAILS(moec_set_weight(NULL, 0, "down", -1, &t.t, 0, &err), ARGUMENT, "model");
  FAILS(moec_set_weight(m, 0, NULL, -1, &t.t, 0, &err), ARGUMENT, "role");
  FAILS(moec_set_weight(m, 0, "down", -1, NULL, 0, &err), ARGUMENT, "src");
  FAILS(moec_set_weight(m, 4, "down", -1, &t.t, 0, &err), ARGUMENT, "layer: expected 0 to 3");
  FAILS(moec_set_weight(m, -1, "down", -1, &t.t, 0, &err), ARGUMENT, "layer");
  FAILS(moec_set_weight(m, 0, "gate_proj", -1, &t.t, 0, &err), ARGUMENT,
        "role: expected one of router, gate_up, gate, up, down, but got \"gate_proj\"");
  FAILS(moec_set_weight(m, 3, "router", -1, &t.t, 0, &err), ARGUMENT, "role");
  FAILS(moec_set_weight(m, 0, "down", 5, &t.t, 0, &err), ARGUMENT, "expert: expected -1 to 4");
  FAILS(moec_set_weight(m, 0, "down", -2, &t.t, 0, &err), ARGUMENT, "expert");
  FAILS(moec_set_weight(m, 0, "router", 5, &t.t, 0, &err), ARGUMENT, "expert");
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, MOEC_BORROW, &err), UNSUPPORTED, "MOEC_BORROW");
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 2, &err), ARGUMENT, "flags");
  FAILS(moec_set_weight(m, 0, "down", 1, &t.t, 0, &err), SHAPE,
        "down: expected [40, 23], but got [5, 40, 23]");
  FAILS(moec_set_weight(m, 0, "gate", -1, &t.t, 0, &err), SHAPE, "expected [5, 23, 40]");
  FAILS(moec_set_weight(m, 0, "gate_up", -1, &t.t, 0, &err), SHAPE, "expected [5, 46, 40]");
  FAILS(moec_set_weight(m, 0, "router", -1, &t.t, 0, &err), SHAPE, "expected [5, 40]");
  make2(&t, w, F32, H, F);
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), SHAPE, "expected [5, 40, 23]");
  t.t.ndim = 7;
  FAILS(moec_set_weight(m, 0, "down", 0, &t.t, 0, &err), SHAPE, "rank 7");
  make(&t, w, I32, E, H, F);
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), DTYPE, "but got i32");
  make(&t, w, F32, E, H, F);
  t.t.device.device_type = kDLCUDA;
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), DEVICE, "src");
  make(&t, NULL, F32, E, H, F);
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), ARGUMENT, "data");
  make(&t, w, F32, E, H, F);
  t.t.byte_offset = 1;
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), ARGUMENT, "aligned");
  for (int i = 0; i < H * F; ++i)
    w[i] += 1; /* what must not get in */
  make(&t, w, F32, E, H, F);
  w[3 * H * F + 2 * F + 1] = NAN;
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), NONFINITE, "[3, 2, 1]");
  w[3 * H * F + 2 * F + 1] = INFINITY;
  FAILS(moec_set_weight(m, 0, "down", -1, &t.t, 0, &err), NONFINITE, "[3, 2, 1]");
  OK(row(c, 0));
  CHECK(!memcmp(y, want, sizeof want));
  (void)saved;

  /* What was packed comes back, bit by bit, into any strides; part of it, too. */
  for (int i = 0; i < E * H * F; ++i)
    w[i] = (float)(i % 97) / 7 - 5;
  OK(moec_set_weight(m, 0, "down", -1, make(&t, w, F32, E, H, F), 0, &err));
  float back[2 * E * H * F], two[2 * E * F * H];
  OK(moec_get_weight(m, 0, "down", make(&t, back, F32, E, H, F), &err));
  CHECK(!memcmp(back, w, sizeof(float) * E * H * F));
  make(&t, back, F32, E, H, F); /* transposed in memory */
  t.strides[0] = H * F, t.strides[1] = 1, t.strides[2] = H;
  t.t.strides = t.strides;
  OK(moec_get_weight(m, 0, "down", &t.t, &err));
  for (int e = 0; e < E; ++e)
    for (int i = 0; i < H * F; ++i)
      CHECK(back[e * H * F + i % F * H + i / F] == w[e * H * F + i]);
  OK(moec_get_weight(m, 0, "gate_up", make(&t, two, F32, E, 2 * F, H), &err));
  OK(moec_get_weight(m, 0, "up", make(&t, back, F32, E, F, H), &err));
  for (int e = 0; e < E; ++e) {
    CHECK(!memcmp(two + 2 * e * F * H, s->gate + e * F * H, sizeof(float) * F * H));
    CHECK(!memcmp(two + (2 * e + 1) * F * H, s->up + e * F * H, sizeof(float) * F * H));
    CHECK(!memcmp(back + e * F * H, s->up + e * F * H, sizeof(float) * F * H));
  }
  OK(moec_set_weight(m, 2, "gate", -1, make(&t, half, BF16, b->E, b->F, b->H), 0, &err));
  OK(moec_get_weight(m, 2, "gate", make(&t, sum, F32, b->E, b->F, b->H), &err));
  uint16_t *again = (uint16_t *)malloc((size_t)(b->E * b->F * b->H) * 2);
  OK(moec_get_weight(m, 2, "gate", make(&t, again, BF16, b->E, b->F, b->H), &err));
  CHECK(!memcmp(again, half, (size_t)(b->E * b->F * b->H) * 2));
  free(again);
  OK(moec_get_weight(m, 3, "down", make2(&t, back, F32, 40, 70), &err));
  FAILS(moec_get_weight(m, 0, "router", make2(&t, back, F32, E, H), &err), ARGUMENT, "router");
  FAILS(moec_get_weight(m, 0, "down", make2(&t, back, F32, H, F), &err), SHAPE, "[5, 40, 23]");
  FAILS(moec_get_weight(m, 0, "down", make(&t, back, F16, E, H, F), &err), DTYPE, "but got f16");
  FAILS(moec_get_weight(m, 9, "down", &t.t, &err), ARGUMENT, "layer");
  FAILS(moec_get_weight(m, 0, NULL, &t.t, &err), ARGUMENT, "role");

  /* Released, the layer wants every weight again, and then computes what it did. */
  OK(row(c, 0));
  memcpy(want, y, sizeof want);
  OK(moec_release_weights(m, 0, &err));
  FAILS(row(c, 0), WEIGHTS, "never set");
  FAILS(moec_get_weight(m, 0, "down", make(&t, back, F32, E, H, F), &err), WEIGHTS, "down");
  OK(moec_release_weights(m, 0, &err));
  OK(moec_set_weight(m, 0, "router", -1, make2(&t, s->router, F32, E, H), 0, &err));
  OK(moec_set_weight(m, 0, "gate_up", -1, make(&t, two, F32, E, 2 * F, H), 0, &err));
  FAILS(row(c, 0), WEIGHTS, "never set");
  FAILS(moec_get_weight(m, 0, "down", make(&t, back, F32, E, H, F), &err), WEIGHTS, "expert 0");
  OK(moec_set_weight(m, 0, "down", -1, make(&t, w, F32, E, H, F), 0, &err));
  OK(row(c, 0));
  CHECK(!memcmp(y, want, sizeof want));
  FAILS(moec_release_weights(NULL, 0, &err), ARGUMENT, "model");
  free(half);
  free(sum);
  moec_context_destroy(c);
  moec_close(m);
  return finish("weights");
}
