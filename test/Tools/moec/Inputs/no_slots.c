/* Routing given to a layer with a shared expert: with no slots, as with weights of zero, the shared
   expert's output is left; with MOEC_ROUTED_ONLY nothing is. */
#include "shared.h"
#include <stdio.h>
#include <string.h>

enum { T = 5, H = SHARED_H };

static DLTensor matrix(void *data, int64_t *shape, uint8_t code) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.ndim = 2;
  t.shape = shape;
  t.dtype.code = code;
  t.dtype.bits = 32;
  t.dtype.lanes = 1;
  t.device.device_type = kDLCPU;
  return t;
}

/* y of the layer by `k` slots of weight 0. 0 or 1. */
static int run(moec_context *context, int64_t k, uint32_t flags, float *y) {
  static float x[T * H], weights[T * 2];
  static int32_t experts[T * 2] = {0, 1, 1, 2, 2, 3, 3, 0, 0, 1};
  int64_t rows[] = {T, H}, slots[] = {T, k};
  moec_error error;
  moec_call call;
  DLTensor tx = matrix(x, rows, kDLFloat), ty = matrix(y, rows, kDLFloat);
  DLTensor te = matrix(experts, slots, kDLInt), tw = matrix(weights, slots, kDLFloat);
  for (int i = 0; i < T * H; ++i)
    x[i] = (float)(i * 37 % 19) / 9 - 1;
  memset(y, 0xff, sizeof x);
  MOEC_INIT(call);
  call.x = &tx;
  call.y = &ty;
  call.experts = &te;
  call.weights = &tw;
  call.flags = flags;
  if (moec_run(context, 0, &call, &error)) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  return 0;
}

int main(void) {
  static float zeros[T * H], none[T * H], routed[T * H];
  moec_error error;
  moec_model *model;
  moec_context *context;
  float largest = 0, rest = 0;
  if (moec_open("s.moec", NULL, &model, &error) ||
      moec_context_create(model, NULL, &context, &error)) {
    fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  if (run(context, 2, 0, zeros) || run(context, 0, 0, none) ||
      run(context, 0, MOEC_ROUTED_ONLY, routed))
    return 1;
  for (int i = 0; i < T * H; ++i) {
    largest = none[i] > largest ? none[i] : largest;
    rest = routed[i] > rest ? routed[i] : rest;
  }
  printf("no slots: %s, %s\n", memcmp(zeros, none, sizeof zeros) ? "other bits" : "equal bits",
         largest > 0 ? "not zero" : "zero");
  printf("routed only: %s\n", rest == 0 ? "zero" : "not zero");
  moec_context_destroy(context);
  moec_close(model);
  return 0;
}
