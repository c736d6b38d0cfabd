/* Times one call of the smallest layer, whose arithmetic is almost nothing: what remains is the
   fixed cost of a call. fixed_cost DIR [THREADS [CALLS]]; prints nanoseconds. */
#define _POSIX_C_SOURCE 200809L
#include "moec.h"
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

enum { WARM = 20000, BLOCKS = 101 };

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static int fail(const moec_error *error) {
  fprintf(stderr, "%s\n", error->message);
  return 1;
}

static DLTensor matrix(void *data, uint8_t code, uint8_t bits, int64_t *shape) {
  DLTensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.device.device_type = kDLCPU;
  t.ndim = 2;
  t.dtype.code = code;
  t.dtype.bits = bits;
  t.dtype.lanes = 1;
  t.shape = shape;
  return t;
}

int main(int argc, char **argv) {
  moec_error error;
  moec_model *model;
  moec_context *context;
  moec_executor *pool;
  moec_pool_options pool_options;
  moec_context_options options;
  moec_layer_info info;
  int calls = argc > 3 ? atoi(argv[3]) : 1000;
  MOEC_INIT(pool_options);
  MOEC_INIT(options);
  MOEC_INIT(info);
  if (argc < 2)
    return 2;
  pool_options.threads = argc > 2 ? atoi(argv[2]) : 2;
  pool_options.spin_us = 1000; /* warm: a worker does not sleep between two calls */
  options.max_tokens = 1;
  if (moec_pool_create(&pool_options, &pool, &error) || moec_open(argv[1], NULL, &model, &error))
    return fail(&error);
  options.executor = pool;
  if (moec_context_create(model, &options, &context, &error) ||
      moec_get_layer_info(model, 0, &info, &error))
    return fail(&error);

  float *x = malloc((size_t)info.H * sizeof *x), *y = malloc((size_t)info.H * sizeof *y);
  int32_t ids[8];
  float weights[8];
  if (!x || !y || info.K > 8)
    return 1;
  for (int64_t i = 0; i < info.H; ++i)
    x[i] = (float)(i % 7) - 3.0f;
  for (int32_t k = 0; k < (int32_t)info.K; ++k) {
    ids[k] = k;
    weights[k] = 0.5f;
  }
  int64_t row[2] = {1, info.H}, chosen[2] = {1, info.K};
  DLTensor tx = matrix(x, kDLFloat, 32, row), ty = matrix(y, kDLFloat, 32, row);
  DLTensor te = matrix(ids, kDLInt, 32, chosen), tw = matrix(weights, kDLFloat, 32, chosen);
  static const char *const names[] = {"whole layer", "experts given", "route only"};
  for (int kind = 0; kind < 3; ++kind) {
    moec_call call;
    double times[BLOCKS];
    MOEC_INIT(call);
    call.x = &tx;
    call.y = kind == 2 ? NULL : &ty;
    if (kind == 1) {
      call.experts = &te;
      call.weights = &tw;
    } else if (kind == 2) {
      call.experts_out = &te;
      call.weights_out = &tw;
    }
    for (int i = 0; i < WARM; ++i)
      if (moec_run(context, 0, &call, &error))
        return fail(&error);
    for (int b = 0; b < BLOCKS; ++b) {
      int64_t begin = now();
      for (int i = 0; i < calls; ++i)
        if (moec_run(context, 0, &call, &error))
          return fail(&error);
      times[b] = (double)(now() - begin) / calls;
    }
    qsort(times, BLOCKS, sizeof *times, ascending);
    printf("%-14s %8.0f ns (quartiles %.0f to %.0f)\n", names[kind], times[BLOCKS / 2],
           times[BLOCKS / 4], times[3 * BLOCKS / 4]);
  }
  free(x);
  free(y);
  moec_context_destroy(context);
  moec_close(model);
  moec_pool_destroy(pool);
  return 0;
}
