/* Times and checks the first layer of a library on a CUDA device, through the C interface.
     gpu_layer DIR [--device N] [--tokens 1,8] [--repeats N] [--check TOKENS] [--reference DIR]
   One JSON object a line: the device's copy bandwidth, then microseconds of one call by events,
   with a cold L2 (a captured graph; without a graph). --check compares TOKENS rows first, with
   float64 on the host or the same layer compiled for the CPU (--reference); what is off ends
   with 7. */
#include "moec.h"

#include <dlfcn.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FUNCTIONS(X)                                                                               \
  X("cuInit", init, (unsigned))                                                                    \
  X("cuDeviceGet", device_get, (int *, int))                                                       \
  X("cuDeviceGetName", device_name, (char *, int, int))                                            \
  X("cuDeviceGetAttribute", attribute, (int *, int, int))                                          \
  X("cuDevicePrimaryCtxRetain", retain, (void **, int))                                            \
  X("cuCtxPushCurrent_v2", push, (void *))                                                         \
  X("cuCtxSynchronize", synchronize, (void))                                                       \
  X("cuMemAlloc_v2", allocate, (uint64_t *, size_t))                                               \
  X("cuMemFree_v2", release, (uint64_t))                                                           \
  X("cuMemcpyHtoD_v2", upload, (uint64_t, const void *, size_t))                                   \
  X("cuMemcpyDtoH_v2", download, (void *, uint64_t, size_t))                                       \
  X("cuMemcpyDtoDAsync_v2", copy, (uint64_t, uint64_t, size_t, void *))                            \
  X("cuMemsetD2D8Async", fill, (uint64_t, size_t, unsigned char, size_t, size_t, void *))          \
  X("cuStreamCreate", stream_create, (void **, unsigned))                                          \
  X("cuStreamBeginCapture_v2", capture, (void *, int))                                             \
  X("cuStreamEndCapture", end_capture, (void *, void **))                                          \
  X("cuGraphInstantiateWithFlags", instantiate, (void **, void *, unsigned long long))             \
  X("cuGraphLaunch", launch, (void *, void *))                                                     \
  X("cuGraphExecDestroy", exec_destroy, (void *))                                                  \
  X("cuGraphDestroy", graph_destroy, (void *))                                                     \
  X("cuEventCreate", event_create, (void **, unsigned))                                            \
  X("cuEventRecord", record, (void *, void *))                                                     \
  X("cuEventElapsedTime", elapsed, (float *, void *, void *))
static struct {
#define MEMBER(text, name, arguments) int(*name) arguments;
  FUNCTIONS(MEMBER)
} cuda;

static void die(const char *what, int code) {
  fprintf(stderr, "gpu_layer: expected to %s, but got error %d\n", what, code);
  exit(1);
}
#define DO(what, call)                                                                             \
  do {                                                                                             \
    const int code_ = (call);                                                                      \
    if (code_)                                                                                     \
      die(what, code_);                                                                            \
  } while (0)
static moec_error error;
#define OK(call)                                                                                   \
  do {                                                                                             \
    if (call) {                                                                                    \
      fprintf(stderr, "gpu_layer: %s\n", error.message);                                           \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

/* ---- numbers: every value is a function of its place, so that none has to be kept ---- */

static float value(uint64_t role, uint64_t expert, uint64_t row, uint64_t column, float scale) {
  uint64_t h = (role << 60) ^ (expert << 44) ^ (row << 22) ^ column;
  h *= 0x9e3779b97f4a7c15u;
  h ^= h >> 29;
  h *= 0xbf58476d1ce4e5b9u;
  h ^= h >> 32;
  const float f = ((float)(h >> 40) * (1.0f / 8388608.0f) - 1.0f) * scale;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float rounded;
  memcpy(&rounded, &bits, 4);
  return rounded;
}
static uint16_t bf16(float f) {
  uint32_t b;
  memcpy(&b, &f, 4);
  return (uint16_t)((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
static float widen(uint16_t h) {
  uint32_t b = (uint32_t)h << 16;
  float f;
  memcpy(&f, &b, 4);
  return f;
}

enum { ROUTER, GATE, UP, DOWN, INPUT };
static moec_layer_info info;
static float scale_of(int role) {
  const double fan = role == DOWN ? (double)info.F : (double)info.H;
  return role == INPUT ? 1.7f : (float)(1.7 * (role == ROUTER ? 2 : 1) / sqrt(fan));
}

static void describe(DLTensor *t, void *data, int device, int id, int code, int bits, int ndim,
                     int64_t *shape) {
  memset(t, 0, sizeof *t);
  t->data = data;
  t->device.device_type = (DLDeviceType)device;
  t->device.device_id = id;
  t->ndim = ndim;
  t->dtype.code = (uint8_t)code;
  t->dtype.bits = (uint8_t)bits;
  t->dtype.lanes = 1;
  t->shape = shape;
}

/* Sets a weight of every expert (count 0: of none in particular) if the layer has one of that role;
   vectors have no columns. */
static void set_weight(moec_model *m, const char *role, int number, int64_t count, int64_t rows,
                       int64_t columns, float scale) {
  const int64_t width = columns ? columns : 1;
  uint16_t *buffer = malloc((size_t)(rows * width) * 2);
  for (int64_t e = 0; e < (count ? count : 1); ++e) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < width; ++j)
        buffer[i * width + j] =
            bf16(value((uint64_t)number, (uint64_t)e, (uint64_t)i, (uint64_t)j, scale));
    int64_t shape[2] = {rows, columns};
    DLTensor t;
    describe(&t, buffer, kDLCPU, 0, kDLBfloat, 16, columns ? 2 : 1, shape);
    const int code = moec_set_weight(m, 0, role, count ? e : -1, &t, 0, &error);
    if (code == 100 /* E-ARGUMENT: a layer without this role */ && !e)
      break;
    OK(code);
  }
  free(buffer);
}

static void set_weights(moec_model *m) {
  const int64_t H = info.H, F = info.F, E = info.E, S = info.S, n = info.kind ? 1 : E;
  if (!info.kind)
    set_weight(m, "router", ROUTER, 0, E, H, scale_of(ROUTER));
  set_weight(m, "gate", GATE, n, F, H, scale_of(GATE));
  set_weight(m, "up", UP, n, F, H, scale_of(UP));
  set_weight(m, "down", DOWN, n, H, F, scale_of(DOWN));
  set_weight(m, "router_bias", 5, 0, E, 0, 0.5f);
  set_weight(m, "selection_bias", 6, 0, E, 0, 0.2f);
  set_weight(m, "gate_bias", 7, n, F, 0, 0.5f);
  set_weight(m, "up_bias", 8, n, F, 0, 0.5f);
  set_weight(m, "down_bias", 9, n, H, 0, 0.5f);
  if (S) {
    set_weight(m, "shared_gate_proj", 10, 1, S, H, scale_of(GATE));
    set_weight(m, "shared_up_proj", 11, 1, S, H, scale_of(UP));
    set_weight(m, "shared_down", 12, 1, H, S, (float)(1.7 / sqrt((double)S)));
    set_weight(m, "shared_gate", 13, 1, 1, H, scale_of(ROUTER));
  }
}

/* ---- check ---- */

static double dot(int role, int64_t e, int64_t row, const double *v, int64_t n) {
  double sum = 0;
  const float scale = scale_of(role);
  for (int64_t i = 0; i < n; ++i)
    sum += v[i] * value((uint64_t)role, (uint64_t)e, (uint64_t)row, (uint64_t)i, scale);
  return sum;
}

/* Relative error of rows t of y given their routing; logits within 1e-3 of float64. */
static double check_rows(const uint16_t *y, const int32_t *ids, const float *weights,
                         const float *logits, int64_t T, int64_t count) {
  double off = 0, all = 0;
  double *x = malloc((size_t)info.H * sizeof *x), *h = malloc((size_t)info.F * sizeof *h);
  for (int64_t n = 0; n < count; ++n) {
    const int64_t t = n * (T - 1) / (count > 1 ? count - 1 : 1);
    for (int64_t i = 0; i < info.H; ++i)
      x[i] = value(INPUT, 0, (uint64_t)t, (uint64_t)i, scale_of(INPUT));
    double *row = calloc((size_t)info.H, sizeof *row);
    for (int64_t e = 0; logits && e < info.E; ++e) {
      const double exact = dot(ROUTER, 0, e, x, info.H);
      if (!(fabs(exact - logits[t * info.E + e]) <= 1e-3 * (1 + fabs(exact)))) {
        fprintf(stderr, "gpu_layer: logits[%lld, %lld]: expected %g, but got %g\n", (long long)t,
                (long long)e, exact, (double)logits[t * info.E + e]);
        exit(7);
      }
    }
    for (int64_t k = 0; k < info.K; ++k) {
      const int64_t e = ids ? ids[t * info.K + k] : 0;
      for (int64_t f = 0; f < info.F; ++f) {
        const double g = dot(GATE, e, f, x, info.H);
        h[f] = widen(bf16((float)(g / (1 + exp(-g)) * dot(UP, e, f, x, info.H))));
      }
      for (int64_t i = 0; i < info.H; ++i)
        row[i] += (weights ? weights[t * info.K + k] : 1) *
                  widen(bf16((float)dot(DOWN, e, i, h, info.F)));
    }
    for (int64_t i = 0; i < info.H; ++i) {
      const double d = widen(y[t * info.H + i]) - row[i];
      off += d * d;
      all += row[i] * row[i];
    }
    free(row);
  }
  free(x);
  free(h);
  return sqrt(off / (all > 0 ? all : 1));
}

/* The same for a layer of any kind: `reference` computes those rows on the CPU. */
static double compare_rows(moec_model *reference, const uint16_t *y, const int32_t *ids,
                           const float *weights, const float *logits, int64_t T, int64_t count) {
  const int64_t H = info.H, K = info.K, E = info.E;
  moec_context_options o;
  MOEC_INIT(o);
  o.max_tokens = count;
  moec_context *c;
  OK(moec_context_create(reference, &o, &c, &error));
  uint16_t *x = malloc((size_t)(count * H) * 2), *own = malloc((size_t)(count * H) * 2);
  int32_t *own_ids = malloc((size_t)(count * K) * 4), *chosen = malloc((size_t)(count * K) * 4);
  float *own_w = malloc((size_t)(count * K) * 4), *own_logits = malloc((size_t)(count * E) * 4);
  int64_t *at = malloc((size_t)count * sizeof *at);
  for (int64_t n = 0; n < count; ++n) {
    at[n] = n * (T - 1) / (count > 1 ? count - 1 : 1);
    for (int64_t i = 0; i < H; ++i)
      x[n * H + i] = bf16(value(INPUT, 0, (uint64_t)at[n], (uint64_t)i, scale_of(INPUT)));
    for (int64_t k = 0; k < K; ++k) {
      own_ids[n * K + k] = info.kind ? 0 : ids[at[n] * K + k];
      own_w[n * K + k] = info.kind ? 1 : weights[at[n] * K + k];
    }
  }
  int64_t wide[2] = {count, H}, narrow[2] = {count, K}, all[2] = {count, E};
  DLTensor tx, ty, ti, tw, tc, tl;
  describe(&tx, x, kDLCPU, 0, kDLBfloat, 16, 2, wide);
  describe(&ty, own, kDLCPU, 0, kDLBfloat, 16, 2, wide);
  describe(&ti, own_ids, kDLCPU, 0, kDLInt, 32, 2, narrow);
  describe(&tw, own_w, kDLCPU, 0, kDLFloat, 32, 2, narrow);
  describe(&tc, chosen, kDLCPU, 0, kDLInt, 32, 2, narrow);
  describe(&tl, own_logits, kDLCPU, 0, kDLFloat, 32, 2, all);
  moec_call call;
  MOEC_INIT(call);
  call.x = &tx;
  if (!info.kind) {
    call.experts_out = &tc;
    call.logits_out = &tl;
    OK(moec_run(c, 0, &call, &error));
    call.experts_out = call.logits_out = NULL;
    call.experts = &ti;
    call.weights = &tw;
  }
  call.y = &ty;
  OK(moec_run(c, 0, &call, &error));
  double off = 0, size = 0;
  for (int64_t n = 0; n < count; ++n) {
    for (int64_t e = 0; !info.kind && e < E; ++e) {
      const double exact = own_logits[n * E + e], got = logits[at[n] * E + e];
      if (!(fabs(exact - got) <= 1e-3 * (1 + fabs(exact)))) {
        fprintf(stderr, "gpu_layer: logits[%lld, %lld]: expected %g, but got %g\n",
                (long long)at[n], (long long)e, exact, got);
        exit(7);
      }
    }
    for (int64_t i = 0; i < H; ++i) {
      const double exact = widen(own[n * H + i]), d = widen(y[at[n] * H + i]) - exact;
      off += d * d;
      size += exact * exact;
    }
  }
  free(x), free(own), free(own_ids), free(chosen), free(own_w), free(own_logits), free(at);
  moec_context_destroy(c);
  return sqrt(off / (size > 0 ? size : 1));
}

/* ---- time ---- */

static int by_value(const void *a, const void *b) {
  const float x = *(const float *)a, y = *(const float *)b;
  return x < y ? -1 : x > y;
}

static void *stream, *begin, *end;
static uint64_t flush; /* of twice the L2 cache */
static size_t flush_bytes;

typedef struct {
  float low, median, high;
} spread;

static spread quartiles(float *us, int n) {
  qsort(us, (size_t)n, sizeof *us, by_value);
  const spread s = {us[n / 4], us[n / 2], us[3 * n / 4]};
  return s;
}

static spread measure(moec_context *c, const moec_call *call, void *graph, int repeats) {
  float *us = malloc((size_t)repeats * sizeof *us);
  for (int i = -3; i < repeats; ++i) {
    DO("flush L2", cuda.fill(flush, flush_bytes, (unsigned char)i, flush_bytes, 1, stream));
    DO("record", cuda.record(begin, stream));
    if (graph)
      DO("launch the graph", cuda.launch(graph, stream));
    else
      OK(moec_run(c, 0, call, &error));
    DO("record", cuda.record(end, stream));
    DO("wait", cuda.synchronize());
    float ms = 0;
    DO("read the time", cuda.elapsed(&ms, begin, end));
    if (i >= 0)
      us[i] = ms * 1000;
  }
  const spread s = quartiles(us, repeats);
  free(us);
  return s;
}

static double bandwidth(void) {
  const size_t bytes = 512u << 20;
  uint64_t a = 0, b = 0;
  if (cuda.allocate(&a, bytes))
    return 0;
  if (cuda.allocate(&b, bytes)) {
    (void)cuda.release(a);
    return 0;
  }
  float us[9];
  for (int i = -1; i < 9; ++i) {
    DO("record", cuda.record(begin, stream));
    DO("copy", cuda.copy(a, b, bytes, stream));
    DO("record", cuda.record(end, stream));
    DO("wait", cuda.synchronize());
    float ms = 0;
    DO("read the time", cuda.elapsed(&ms, begin, end));
    if (i >= 0)
      us[i] = ms * 1000;
  }
  (void)cuda.release(a);
  (void)cuda.release(b);
  const float median = quartiles(us, 9).median;
  return median > 0 ? 2e-3 * (double)bytes / median : 0; /* GB/s, read and written */
}

static uint64_t device_memory(size_t bytes) {
  uint64_t p = 0;
  DO("allocate tensors", cuda.allocate(&p, bytes ? bytes : 1));
  return p;
}

static void run_tokens(const char *dir, moec_model *m, moec_model *reference, int device, int64_t T,
                       int repeats, int64_t check, double gbs) {
  const int64_t H = info.H, K = info.K, E = info.E;
  moec_context_options o;
  MOEC_INIT(o);
  o.max_tokens = T;
  moec_context *c;
  OK(moec_context_create(m, &o, &c, &error));
  uint64_t x = device_memory((size_t)(T * H) * 2), y = device_memory((size_t)(T * H) * 2);
  uint16_t *host = malloc((size_t)(T * H) * 2);
  for (int64_t t = 0; t < T; ++t)
    for (int64_t i = 0; i < H; ++i)
      host[t * H + i] = bf16(value(INPUT, 0, (uint64_t)t, (uint64_t)i, scale_of(INPUT)));
  DO("copy x", cuda.upload(x, host, (size_t)(T * H) * 2));
  int64_t wide[2] = {T, H}, chosen[2] = {T, K}, all[2] = {T, E};
  DLTensor tx, ty, ti, tw, tl;
  describe(&tx, (void *)(uintptr_t)x, kDLCUDA, device, kDLBfloat, 16, 2, wide);
  describe(&ty, (void *)(uintptr_t)y, kDLCUDA, device, kDLBfloat, 16, 2, wide);
  moec_call call;
  MOEC_INIT(call);
  call.stream = stream;
  call.x = &tx;
  call.y = &ty;
  double off = -1;
  if (check > 0) {
    check = check < T ? check : T;
    uint64_t ids = device_memory((size_t)(T * K) * 4), w = device_memory((size_t)(T * K) * 4);
    uint64_t logits = device_memory((size_t)(T * E) * 4);
    describe(&ti, (void *)(uintptr_t)ids, kDLCUDA, device, kDLInt, 32, 2, chosen);
    describe(&tw, (void *)(uintptr_t)w, kDLCUDA, device, kDLFloat, 32, 2, chosen);
    describe(&tl, (void *)(uintptr_t)logits, kDLCUDA, device, kDLFloat, 32, 2, all);
    int32_t *host_ids = malloc((size_t)(T * K) * 4);
    float *host_w = malloc((size_t)(T * K) * 4), *host_logits = malloc((size_t)(T * E) * 4);
    uint16_t *again = malloc((size_t)(T * H) * 2);
    if (!info.kind) {
      call.experts_out = &ti;
      call.weights_out = &tw;
      call.logits_out = &tl;
    }
    OK(moec_run(c, 0, &call, &error));
    DO("run the layer", cuda.synchronize());
    OK(moec_context_status(c, &error));
    DO("read y", cuda.download(host, y, (size_t)(T * H) * 2));
    DO("read ids", cuda.download(host_ids, ids, (size_t)(T * K) * 4));
    DO("read weights", cuda.download(host_w, w, (size_t)(T * K) * 4));
    DO("read logits", cuda.download(host_logits, logits, (size_t)(T * E) * 4));
    off = reference   ? compare_rows(reference, host, host_ids, host_w, host_logits, T, check)
          : info.kind ? check_rows(host, NULL, NULL, NULL, T, check)
                      : check_rows(host, host_ids, host_w, host_logits, T, check);
    call.experts_out = call.weights_out = call.logits_out = NULL;
    OK(moec_run(c, 0, &call, &error)); /* the other way to the same bits */
    DO("run the layer", cuda.synchronize());
    DO("read y", cuda.download(again, y, (size_t)(T * H) * 2));
    if (memcmp(host, again, (size_t)(T * H) * 2)) {
      fprintf(stderr, "gpu_layer: T = %lld: expected equal bits twice, but got others\n",
              (long long)T);
      exit(7);
    }
    if (!(off <= 8e-3)) {
      fprintf(stderr,
              "gpu_layer: T = %lld: expected a relative error of at most 8e-3, but got %g\n",
              (long long)T, off);
      exit(7);
    }
    (void)cuda.release(ids), (void)cuda.release(w), (void)cuda.release(logits);
    free(host_ids), free(host_w), free(host_logits), free(again);
  }
  void *graph = NULL, *exec = NULL;
  DO("capture", cuda.capture(stream, 2));
  OK(moec_run(c, 0, &call, &error));
  DO("end the capture", cuda.end_capture(stream, &graph));
  DO("instantiate the graph", cuda.instantiate(&exec, graph, 0));
  const spread replay = measure(c, &call, exec, repeats);
  const spread plain = measure(c, &call, NULL, repeats);
  OK(moec_context_status(c, &error));
  const double active = (double)E * (1 - pow(1 - 1.0 / (double)E, (double)(T * K)));
  const double bytes =
      2.0 * 3 * (double)H * ((double)info.F * active + (double)info.S) + 2.0 * 2 * (double)(T * H);
  const double tflops = (double)info.active_flops * (double)T / replay.median * 1e-6;
  printf("{\"model\": \"%s\", \"H\": %lld, \"F\": %lld, \"E\": %lld, \"K\": %lld, \"T\": %lld, "
         "\"us\": %.2f, \"us_low\": %.2f, \"us_high\": %.2f, \"us_without_graph\": %.2f, "
         "\"tflops\": %.2f, \"floor_us\": %.2f, \"error\": %.3g}\n",
         dir, (long long)H, (long long)info.F, (long long)E, (long long)K, (long long)T,
         (double)replay.median, (double)replay.low, (double)replay.high, (double)plain.median,
         tflops, gbs > 0 ? bytes / gbs * 1e-3 : 0, off);
  fflush(stdout);
  (void)cuda.exec_destroy(exec), (void)cuda.graph_destroy(graph);
  (void)cuda.release(x), (void)cuda.release(y);
  free(host);
  moec_context_destroy(c);
}

int main(int argc, char **argv) {
  const char *dir = NULL, *reference_dir = NULL, *tokens = "1,8,64,512,2048,8192,16384";
  const char *number = "0", *times = "50", *checked = "0";
  const char *const names[] = {"--device", "--tokens", "--repeats", "--check", "--reference"};
  const char **const values[] = {&number, &tokens, &times, &checked, &reference_dir};
  for (int i = 1; i < argc; ++i) {
    int n = 0;
    while (n < 5 && strcmp(argv[i], names[n]))
      ++n;
    if (n < 5 && i + 1 < argc)
      *values[n] = argv[++i];
    else if (argv[i][0] != '-')
      dir = argv[i];
    else
      dir = NULL, i = argc;
  }
  const int device = atoi(number), repeats = atoi(times);
  const int64_t check = atoi(checked);
  int handle = 0;
  if (!dir || repeats < 1)
    return fprintf(stderr, "usage: gpu_layer DIR [--device N] [--tokens 1,8] [--repeats N] "
                           "[--check TOKENS] [--reference DIR]\n"),
           2;
  moec_open_options o;
  MOEC_INIT(o);
  o.load = MOEC_NONE;
  o.device.device_type = kDLCUDA;
  o.device.device_id = device;
  moec_model *m;
  OK(moec_open(dir, &o, &m, &error));
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
#define FIND(text, name, arguments)                                                                \
  *(void **)(void *)&cuda.name = library ? dlsym(library, text) : NULL;                            \
  if (!cuda.name)                                                                                  \
    return fprintf(stderr, "gpu_layer: expected a driver with %s, but got one without\n", text), 1;
  FUNCTIONS(FIND)
  void *context;
  DO("get the device", cuda.device_get(&handle, device));
  DO("get the context", cuda.retain(&context, handle));
  DO("use the context", cuda.push(context));
  DO("create a stream", cuda.stream_create(&stream, 1));
  DO("create an event", cuda.event_create(&begin, 0));
  DO("create an event", cuda.event_create(&end, 0));
  int l2 = 0;
  DO("ask for the L2 cache", cuda.attribute(&l2, 38, handle));
  flush_bytes = 2 * (size_t)l2 + 1;
  flush = device_memory(flush_bytes);
  MOEC_INIT(info);
  OK(moec_get_layer_info(m, 0, &info, &error));
  set_weights(m);
  moec_model *reference = NULL;
  if (reference_dir) {
    o.device.device_type = kDLCPU;
    o.device.device_id = 0;
    OK(moec_open(reference_dir, &o, &reference, &error));
    set_weights(reference);
  }
  char name[128] = "";
  DO("name the device", cuda.device_name(name, sizeof name, handle));
  const double gbs = bandwidth();
  printf("{\"device\": \"%s\", \"copy_gbs\": %.1f}\n", name, gbs);
  const char *slash = strrchr(dir, '/');
  for (const char *p = tokens; *p;) {
    char *rest;
    const int64_t T = strtoll(p, &rest, 10);
    if (T < 1 || rest == p)
      return fprintf(stderr, "gpu_layer: expected numbers of tokens, but got %s\n", p), 2;
    run_tokens(slash ? slash + 1 : dir, m, reference, device, T, repeats, check, gbs);
    p = *rest == ',' ? rest + 1 : rest;
  }
  if (reference)
    moec_close(reference);
  moec_close(m);
  return 0;
}
