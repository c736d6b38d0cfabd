/* The runtime on a CUDA device, with a stub of the driver: what is called, and every failure. */
#include "cuda_stub.h"
#include "moec.h"
#include "moec/module.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "helpers.h"

/* ---- a module by hand: one layer, one kernel ---- */

enum { H = 40, F = 23, E = 5, K = 2 };

static void enqueue(moec_frame *f, int32_t lane, int32_t lanes) {
  (void)lane, (void)lanes;
  void *arguments[] = {&f->x, &f->y, &f->tokens, &f->workspace, &f->experts, &f->offsets};
  moec_gpu_launch launch = {"layer_up", 0, 65536, {(uint32_t)f->tokens, 3, 1}, {128, 1, 1}, NULL};
  launch.arguments = arguments;
  f->launcher->launch(f->launcher->self, &launch);
}
static uint64_t bytes_of(int64_t tokens, int64_t slots, int64_t lanes) {
  return (uint64_t)(tokens * slots * 64 * lanes);
}
static const moec_stage_fn stages[] = {enqueue};
static const moec_entry entries[] = {{0, 1, 1, 1, stages, bytes_of},
                                     {1, 1, 0, 1, stages, bytes_of},
                                     {2, 1, 1, 1, stages, bytes_of},
                                     {0, 0, 0, 1, stages, bytes_of}};
static const moec_level_code levels[] = {{"sm_80", 0, 4, entries}};
static const moec_weight_desc weights[] = {{"router", "bf16", "panel32-1", 1, 1, E, H, 4096},
                                           {"gate_up", "bf16", "panel32-1", E, 2, F, H, 40960},
                                           {"down", "bf16", "panel32-1", E, 1, H, F, 20480}};
static const moec_layer_code code = {0, MOEC_DT_BF16, H, F, E,       K,     0, 0, 0,
                                     0, 11040,        3, 1, weights, levels};
static const moec_layer_desc layers[] = {
    {"model.layers.0.mlp", "model.layers.0.mlp.safetensors", 0, 0, &code, {1, 9}}};
static const char text[] = ".entry layer_up .entry call_in .entry call_out .entry call_counts";
static const moec_gpu_image images[] = {{MOEC_IMAGE_CUBIN, 80, text, sizeof text},
                                        {MOEC_IMAGE_CUBIN, 86, text, sizeof text},
                                        {MOEC_IMAGE_PTX, 80, text, sizeof text}};
static const moec_gpu_kernel kernels[] = {
    {"layer_up", 128, 65536}, {"call_in", 256, 0}, {"call_out", 256, 0}, {"call_counts", 256, 32}};
/* As it was before there were levels. */
static moec_module module = {offsetof(moec_module, gpu_level_count),
                             0x00010001,
                             0,
                             "gpu",
                             "0.0.0",
                             1,
                             0,
                             layers,
                             3,
                             4,
                             images,
                             kernels,
                             0,
                             0,
                             NULL};

/* Two levels, each with its kernels and images. */
static void enqueue_hopper(moec_frame *f, int32_t lane, int32_t lanes) {
  (void)lane, (void)lanes;
  void *arguments[] = {&f->x, &f->y, &f->tokens};
  moec_gpu_launch launch = {"hopper_up", 7, 200 * 1024, {1, 1, 1}, {384, 1, 1}, NULL};
  launch.arguments = arguments;
  f->launcher->launch(f->launcher->self, &launch);
}
static const moec_stage_fn hopper_stages[] = {enqueue_hopper};
static const moec_entry hopper_entries[] = {{0, 1, 1, 1, hopper_stages, bytes_of}};
static const moec_level_code both_levels[] = {{"sm_80", 80, 4, entries},
                                              {"sm_90a", 90, 1, hopper_entries}};
static const moec_layer_code both_code = {0, MOEC_DT_BF16, H, F, E,       K,          0, 0, 0,
                                          0, 11040,        3, 2, weights, both_levels};
static const moec_layer_desc both_layers[] = {
    {"model.layers.0.mlp", "model.layers.0.mlp.safetensors", 0, 0, &both_code, {1, 9}}};
static const char hopper_text[] =
    ".entry hopper_up .entry call_in .entry call_out .entry call_counts";
static const moec_gpu_image both_images[] = {
    {MOEC_IMAGE_CUBIN, 80, text, sizeof text},
    {MOEC_IMAGE_PTX, 80, text, sizeof text},
    {MOEC_IMAGE_EXACT, 90, hopper_text, sizeof hopper_text}};
static const moec_gpu_kernel both_kernels[] = {
    {"layer_up", 128, 65536}, {"call_in", 256, 0},           {"call_out", 256, 0},
    {"call_counts", 256, 32}, {"call_in", 256, 0},           {"call_out", 256, 0},
    {"call_counts", 256, 32}, {"hopper_up", 384, 200 * 1024}};
static const moec_gpu_level gpu_levels[] = {{"sm_80", 80, 0, 0, 2, 0, 4},
                                            {"sm_90a", 90, MOEC_GPU_MAPS, 2, 1, 4, 4}};
static moec_module both = {sizeof(moec_module), MOEC_ABI, 0, "gpu",       "0.0.0",      1, 0,
                           both_layers,         3,        8, both_images, both_kernels, 2, 0,
                           gpu_levels};

/* ---- the stub, found in the library that was loaded first ---- */

static void (*reset)(const stub_machine *);
static void (*hook)(const stub_hooks *);
static void (*fail)(const char *, int, int, int);
static int (*calls)(const char *);
static size_t (*used)(void);
static int (*held)(void);
static void *(*stream_of)(void);
static int (*device_allocate)(uint64_t *, size_t);
static int (*device_free)(uint64_t);
static int (*capture)(void *, int);
static int (*end_capture)(void *, void **);
static int (*destroy_graph)(void *);

static int load_stub(const char *path) {
  void *stub = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
  if (!stub)
    return fprintf(stderr, "%s\n", dlerror()), 0;
  *(void **)(void *)&reset = dlsym(stub, "stub_reset");
  *(void **)(void *)&hook = dlsym(stub, "stub_hook");
  *(void **)(void *)&fail = dlsym(stub, "stub_fail");
  *(void **)(void *)&calls = dlsym(stub, "stub_calls");
  *(void **)(void *)&used = dlsym(stub, "stub_used");
  *(void **)(void *)&held = dlsym(stub, "stub_open");
  *(void **)(void *)&stream_of = dlsym(stub, "stub_stream");
  *(void **)(void *)&device_allocate = dlsym(stub, "cuMemAlloc_v2");
  *(void **)(void *)&device_free = dlsym(stub, "cuMemFree_v2");
  *(void **)(void *)&capture = dlsym(stub, "cuStreamBeginCapture_v2");
  *(void **)(void *)&end_capture = dlsym(stub, "cuStreamEndCapture");
  *(void **)(void *)&destroy_graph = dlsym(stub, "cuGraphDestroy");
  return reset && hook && fail && calls && used && held && stream_of && device_allocate;
}

static int open_on(int32_t device, moec_model **m) {
  moec_open_options o;
  MOEC_INIT(o);
  o.load = MOEC_NONE;
  o.device.device_type = kDLCUDA;
  o.device.device_id = device;
  return moec_open_module(&module, &o, m, &err);
}

static void *device_memory(size_t bytes) {
  uint64_t p = 0;
  CHECK(device_allocate(&p, bytes) == 0);
  return (void *)(uintptr_t)p;
}

static DLTensor *on_device(DLTensor *t, int32_t id) {
  t->device.device_type = kDLCUDA;
  t->device.device_id = id;
  return t;
}

/* Values, so that a layer is complete. */
static void set_weights(moec_model *m) {
  float *values = (float *)calloc(E * 2 * F * H, sizeof(float));
  tensor t;
  OK(moec_set_weight(m, 0, "router", -1, make2(&t, values, F32, E, H), 0, &err));
  OK(moec_set_weight(m, 0, "gate_up", -1, make(&t, values, F32, E, 2 * F, H), 0, &err));
  OK(moec_set_weight(m, 0, "down", -1, make(&t, values, F32, E, H, F), 0, &err));
  free(values);
}

/* ---- opening ---- */

static void test_open(void) {
  moec_model *m = NULL;
  const stub_machine none = {0, 8, 0, 12080, 166912, 0}, turing = {1, 7, 5, 12080, 65536, 0};
  const stub_machine small = {1, 8, 9, 12080, 49152, 0}, newer = {1, 9, 0, 12080, 232448, 0};
  /* The driver is started once for a process that succeeded: the failures come first. */
  const stub_machine old = {1, 8, 0, 10020, 166912, 0};
  reset(&old);
  FAILS(open_on(0, &m), DRIVER_OLD,
        "expected a driver for CUDA 11.0 or later, but got one for "
        "CUDA 10.2");
  reset(&none);
  FAILS(open_on(0, &m), NO_DEVICE, "the driver reports CUDA_ERROR_NO_DEVICE (100)");
  reset(NULL);
  FAILS(open_on(1, &m), NO_DEVICE, "expected CUDA device 0 to 0, but got CUDA device 1");
  FAILS(open_on(-1, &m), NO_DEVICE, "but got CUDA device -1");
  reset(&turing);
  FAILS(open_on(0, &m), ARCH,
        "(compute capability 7.5), but got a library with sm_80, sm_86, "
        "compute_80");
  reset(&small);
  FAILS(open_on(0, &m), ARCH,
        "65536 bytes of shared memory for a block (kernel layer_up), but got "
        "CUDA device 0 with 49152");
  CHECK(!m && !used() && !held());

  reset(&newer); /* no cubin of 9.0: PTX */
  OK(open_on(0, &m));
  CHECK(calls("cuModuleLoadData") == 1 && calls("cuModuleGetFunction") == 4);
  CHECK(calls("cuFuncSetAttribute") == 1 && calls("cuFuncLoad") == 4);
  moec_layer_info info;
  MOEC_INIT(info);
  OK(moec_get_layer_info(m, 0, &info, &err));
  CHECK(!strcmp(info.level, "sm_80"));
  moec_close(m);
  CHECK(!used() && !held());

  reset(NULL);
  fail("cuModuleLoadData", 209, 0, 0); /* the cubin is refused, PTX is not */
  OK(open_on(0, &m));
  CHECK(calls("cuModuleLoadData") == 2);
  moec_close(m);
  fail("cuModuleLoadData", 209, 0, 1);
  FAILS(open_on(0, &m), ARCH, "expected a device that takes one of sm_80, sm_86, compute_80");
  fail("cuModuleLoadData", 222, 0, 1);
  FAILS(open_on(0, &m), DRIVER_OLD, "expected a driver that takes sm_80");
  reset(NULL);
  fail("cuModuleLoadData", 2, 0, 1);
  FAILS(open_on(0, &m), DEVICE_MEMORY, "to load the kernels");
  reset(NULL);
  fail("cuModuleGetFunction", 500, 2, 0);
  FAILS(open_on(0, &m), LAUNCH, "expected to load kernel call_out");
  fail("cuDevicePrimaryCtxRetain", 3, 0, 0);
  FAILS(open_on(0, &m), LAUNCH, "expected to start a context");
  CHECK(!m && !used());

  moec_open_options o;
  MOEC_INIT(o);
  o.load = MOEC_NONE;
  FAILS(moec_open_module(&module, &o, &m, &err), ISA, "but got code for GPUs");
  o.device.device_type = kDLCUDA;
  o.cpu_level = "x86-64-v3";
  FAILS(moec_open_module(&module, &o, &m, &err), ARCH,
        "cpu_level: expected a level of the library (sm_80) for a CUDA device, but got "
        "\"x86-64-v3\"");
  o.cpu_level = NULL;
  FAILS(moec_open_module(&mock_moec_module, &o, &m, &err), ARCH, "but got one for CPUs");
  o.device.device_type = kDLMetal;
  FAILS(moec_open_module(&module, &o, &m, &err), UNSUPPORTED, "but got device type 8");
}

/* ---- levels ---- */

static char order[512];

static int launched_hopper(const char *kernel, const uint32_t grid[3], const uint32_t block[3],
                           uint32_t shared, void *const *arguments) {
  (void)grid, (void)arguments;
  snprintf(order, sizeof order, "%s %u %u", kernel, block[0], shared);
  return 0;
}

/* The level that a model is opened at; "" where it is not. */
static const char *level_on(const char *cap, moec_model **m) {
  moec_open_options o;
  MOEC_INIT(o);
  o.load = MOEC_NONE;
  o.device.device_type = kDLCUDA;
  o.cpu_level = cap;
  if (moec_open_module(&both, &o, m, &err))
    return "";
  moec_layer_info info;
  MOEC_INIT(info);
  OK(moec_get_layer_info(*m, 0, &info, &err));
  return info.level;
}

static const stub_machine hopper = {1, 9, 0, 12080, 232448, 0};
static const stub_machine blackwell = {1, 10, 0, 12080, 232448, 0};

static void expect_level(const stub_machine *machine, const char *cap, const char *level) {
  moec_model *m = NULL;
  reset(machine);
  const char *got = level_on(cap, &m);
  if (strcmp(got, level))
    fprintf(stderr, "level \"%s\", not \"%s\": %s\n", got, level, err.message);
  CHECK(!strcmp(got, level));
  moec_close(m);
  CHECK(!used() && !held());
}

static void test_levels(void) {
  moec_model *m = NULL;
  const stub_machine turing = {1, 7, 5, 12080, 65536, 0}, little = {1, 9, 0, 12080, 101376, 0};
  setenv("MOEC_CPU", "x86-64-v3", 1); /* of CPUs alone */
  expect_level(NULL, NULL, "sm_80");  /* a device 8.0 */
  expect_level(&hopper, NULL, "sm_90a");
  expect_level(&blackwell, NULL, "sm_80"); /* by PTX: code of sm_90a runs on 9.0 alone */
  expect_level(&hopper, "sm_80", "sm_80");
  expect_level(&hopper, "sm_90a", "sm_90a");
  expect_level(&little, NULL, "sm_80"); /* too little shared memory for the better one */
  unsetenv("MOEC_CPU");
  reset(NULL);
  CHECK(!*level_on("sm_90a", &m));
  CHECK(strstr(err.message, "(compute capability 8.0), but got a library with sm_90a for level "
                            "sm_90a"));
  CHECK(!*level_on("x86-64-v4", &m));
  CHECK(strstr(err.message, "expected a level of the library (sm_80, sm_90a) for a CUDA device, "
                            "but got \"x86-64-v4\""));
  reset(&turing);
  CHECK(!*level_on(NULL, &m) && err.code == MOEC_E_ARCH);
  CHECK(strstr(err.message, "but got a library with sm_80, compute_80, sm_90a"));
  /* A driver that refuses the better code; one that has no memory for it is said. */
  reset(&hopper);
  fail("cuModuleLoadData", 209, 0, 0);
  CHECK(!strcmp(level_on(NULL, &m), "sm_80"));
  CHECK(calls("cuModuleLoadData") == 2);
  moec_close(m);
  fail("cuModuleLoadData", 2, 0, 0);
  CHECK(!*level_on(NULL, &m) && err.code == MOEC_E_DEVICE_MEMORY);
  /* The launches of a level are those of its kernels, with the call kernels of its image. */
  const stub_hooks hooks = {NULL, launched_hopper, NULL, NULL};
  reset(&hopper);
  hook(&hooks);
  CHECK(!strcmp(level_on(NULL, &m), "sm_90a"));
  CHECK(calls("cuModuleGetFunction") == 4 && calls("cuFuncLoad") == 4);
  set_weights(m);
  moec_context *c = NULL;
  OK(moec_context_create(m, NULL, &c, &err));
  uint16_t *x = (uint16_t *)device_memory(H * 2), *y = (uint16_t *)device_memory(H * 2);
  tensor tx, ty;
  moec_call call;
  MOEC_INIT(call);
  call.x = on_device(make2(&tx, x, BF16, 1, H), 0);
  call.y = on_device(make2(&ty, y, BF16, 1, H), 0);
  OK(moec_run(c, 0, &call, &err));
  CHECK(!strcmp(order, "hopper_up 384 204800"));
  order[0] = 0;
  device_free((uintptr_t)x), device_free((uintptr_t)y);
  moec_context_destroy(c);
  moec_close(m);
  CHECK(!used() && !held());
}

/* With a driver that is older than tensor maps. */
static int test_without_maps(void) {
  expect_level(&hopper, NULL, "sm_80");
  moec_model *m = NULL;
  CHECK(!*level_on("sm_90a", &m) && err.code == MOEC_E_DRIVER_OLD);
  CHECK(strstr(err.message, "which makes the tensor maps of level sm_90a, but got one without "
                            "cuTensorMapEncodeTiled"));
  return finish("cuda old");
}

/* ---- weights and workspaces: what is refused is freed, and the rest goes on ---- */

static void test_memory(void) {
  moec_model *m = NULL;
  moec_context *c = NULL;
  const stub_machine tight = {1, 8, 0, 12080, 166912, 100000};
  reset(&tight);
  OK(open_on(0, &m));
  set_weights(m); /* 65536 bytes */
  const size_t before = used();
  CHECK(before == 4096 + 40960 + 20480);
  moec_context_options o;
  MOEC_INIT(o);
  o.max_tokens = 1 << 20;
  FAILS(moec_context_create(m, &o, &c, &err), DEVICE_MEMORY,
        "to hold the workspace of max_tokens = "
        "1048576, but got none: "
        "34464 of its 100000 bytes are free");
  CHECK(!c && used() == before);
  o.max_tokens = 4;
  OK(moec_context_create(m, &o, &c, &err)); /* the model is usable again */
  moec_context_destroy(c);
  CHECK(used() == before);
  uint64_t size = 0;
  OK(moec_workspace_size(m, &o, &size, &err));
  CHECK(size % 256 == 0);
  o.workspace = device_memory(size);
  o.workspace_bytes = size;
  OK(moec_context_create(m, &o, &c, &err));
  moec_context_destroy(c);
  o.workspace = (char *)o.workspace + 64;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "an address aligned to 256 bytes");
  device_free((uintptr_t)((char *)o.workspace - 64));
  o.workspace = NULL;
  moec_executor *pool = NULL;
  OK(moec_pool_create(NULL, &pool, &err));
  o.executor = pool;
  FAILS(moec_context_create(m, &o, &c, &err), ARGUMENT, "executor: expected NULL for a GPU");
  moec_pool_destroy(pool);
  moec_close(m);
  CHECK(!used() && !held());

  /* Weights that do not fit, at a set and while copying. */
  const stub_machine tiny = {1, 8, 0, 12080, 166912, 60000};
  reset(&tiny);
  OK(open_on(0, &m));
  float value[E * H] = {0};
  tensor t;
  FAILS(moec_set_weight(m, 0, "router", -1, make2(&t, value, F32, E, H), 0, &err), DEVICE_MEMORY,
        "expected 65536 bytes on CUDA device 0 to hold the weights of a layer");
  reset(NULL);
  fail("cuMemcpyHtoD_v2", 700, 0, 0);
  FAILS(moec_set_weight(m, 0, "router", -1, make2(&t, value, F32, E, H), 0, &err), LAUNCH,
        "expected to copy weights on CUDA device 0, but got: the driver reports "
        "CUDA_ERROR_ILLEGAL_ADDRESS (700)");
  FAILS(moec_set_weight(m, 0, "router", -1, on_device(make2(&t, value, F32, E, H), 0), 0, &err),
        DEVICE, "expected memory of the CPU, but got memory of CUDA device 0");
  OK(moec_set_weight(m, 0, "router", -1, make2(&t, value, F32, E, H), 0, &err));

  /* What was set can be read back, part by part. */
  float *gate = random_values(E * F * H, 1, 1), *up = random_values(E * F * H, 1, 1);
  float *back = (float *)malloc(sizeof(float) * E * F * H);
  OK(moec_set_weight(m, 0, "up", -1, make(&t, up, F32, E, F, H), 0, &err));
  OK(moec_set_weight(m, 0, "gate", -1, make(&t, gate, F32, E, F, H), 0, &err));
  OK(moec_get_weight(m, 0, "gate", make(&t, back, F32, E, F, H), &err));
  CHECK(!memcmp(back, gate, sizeof(float) * E * F * H));
  OK(moec_get_weight(m, 0, "up", make(&t, back, F32, E, F, H), &err));
  CHECK(!memcmp(back, up, sizeof(float) * E * F * H));
  CHECK(used() == 65536);
  OK(moec_release_weights(m, 0, &err));
  CHECK(!used());
  free(gate), free(up), free(back);
  moec_close(m);
  CHECK(!used() && !held());
}

/* ---- calls ---- */

static int64_t rows;
static uint64_t *report; /* the status word of the context */

static int launched(const char *kernel, const uint32_t grid[3], const uint32_t block[3],
                    uint32_t shared, void *const *arguments) {
  (void)block, (void)shared;
  snprintf(order + strlen(order), sizeof order - strlen(order), "%s(%u) ", kernel, grid[0]);
  if (!strcmp(kernel, "layer_up"))
    rows += **(int64_t *const *)(arguments + 2);
  if (!strcmp(kernel, "call_in"))
    report = **(uint64_t **const *)(arguments + 13);
  return 0;
}

static void test_calls(void) {
  moec_model *m = NULL;
  moec_context *c = NULL;
  const stub_machine two = {2, 8, 6, 12080, 101376, 0};
  const stub_hooks hooks = {NULL, launched, NULL, NULL};
  reset(&two);
  hook(&hooks);
  OK(open_on(1, &m));
  moec_context_options o;
  MOEC_INIT(o);
  o.max_tokens = 8;
  OK(moec_context_create(m, &o, &c, &err));
  enum { T = 20 };
  uint16_t *x = (uint16_t *)device_memory(T * H * 2), *y = (uint16_t *)device_memory(T * H * 2);
  int64_t *ids = (int64_t *)device_memory(T * K * 8);
  float *w = (float *)device_memory(T * K * 4), *logits = (float *)device_memory(T * E * 4);
  int32_t *counts = (int32_t *)device_memory((E + 1) * 4);
  tensor tx, ty, ti, tw, tc, tl;
  moec_call call;
  MOEC_INIT(call);
  call.x = on_device(make2(&tx, x, BF16, T, H), 1);
  call.y = on_device(make2(&ty, y, BF16, T, H), 1);
  FAILS(moec_run(c, 0, &call, &err), WEIGHTS, "that were never set");
  set_weights(m);
  const int copies = calls("cuMemcpyHtoD_v2") + calls("cuMemcpyDtoH_v2");
  const int allocations = calls("cuMemAlloc_v2");

  /* Chunks of 8; on the caller's stream; nothing is allocated and nothing waits. */
  int stream;
  call.stream = &stream;
  OK(moec_run(c, 0, &call, &err));
  CHECK(!strcmp(order, "layer_up(8) layer_up(8) layer_up(4) ") && rows == T);
  CHECK(stream_of() == &stream);
  CHECK(calls("cuMemcpyHtoD_v2") + calls("cuMemcpyDtoH_v2") == copies);
  CHECK(calls("cuMemAlloc_v2") == allocations && calls("cuMemsetD8_v2") == 2);

  /* So a call can be captured in a graph, with all that it can write: nothing runs then. */
  call.experts_out = on_device(make2(&ti, ids, I64, T, K), 1);
  call.weights_out = on_device(make2(&tw, w, F32, T, K), 1);
  call.logits_out = on_device(make2(&tl, logits, F32, T, E), 1);
  call.counts_out = on_device(make(&tc, counts, I32, E + 1, -1, -1), 1);
  order[0] = 0;
  CHECK(capture(&stream, 2) == 0);
  OK(moec_run(c, 0, &call, &err));
  void *graph = NULL;
  CHECK(end_capture(&stream, &graph) == 0 && graph && !order[0]);
  CHECK(destroy_graph(graph) == 0);
  OK(moec_run(c, 0, &call, &err)); /* logits: route, then experts */
  CHECK(!strncmp(order, "layer_up(8) layer_up(8) call_out(1) call_counts(6) layer_up(8)", 62));
  CHECK(counts[0] == 0 && counts[E] == 0);

  order[0] = 0;
  call.experts_out = call.weights_out = call.logits_out = NULL;
  call.experts = &ti.t;
  call.weights = &tw.t;
  OK(moec_run(c, 0, &call, &err));
  CHECK(!strncmp(order, "call_in(1) layer_up(8) call_counts(6) call_in(1)", 48));
  OK(moec_context_status(c, &err));
  *report = (uint64_t)17 << 32 | 1; /* as the kernel does */
  FAILS(moec_context_status(c, &err), EXPERT_ID, "model.layers.0.mlp: experts[17, 1] of a call");
  OK(moec_context_status(c, &err)); /* once */

  /* No rows, no slots. */
  order[0] = 0;
  memset(y, 0x11, T * H * 2);
  call.experts = make2(&ti, NULL, I64, T, 0);
  call.weights = make2(&tw, NULL, F32, T, 0);
  on_device(&ti.t, 1), on_device(&tw.t, 1);
  OK(moec_run(c, 0, &call, &err));
  CHECK(!order[0] && y[0] == 0 && y[T * H - 1] == 0 && counts[0] == 0);
  call.experts = call.weights = NULL;
  call.x = on_device(make2(&tx, NULL, BF16, 0, H), 1);
  call.y = on_device(make2(&ty, NULL, BF16, 0, H), 1);
  OK(moec_run(c, 0, &call, &err));
  CHECK(!order[0]);

  /* Tensors elsewhere. */
  call.counts_out = NULL;
  call.x = on_device(make2(&tx, x, BF16, T, H), 0);
  call.y = on_device(make2(&ty, y, BF16, T, H), 1);
  FAILS(moec_run(c, 0, &call, &err), DEVICE,
        "x: expected memory of CUDA device 1, but got memory of CUDA device 0");
  call.x = make2(&tx, x, BF16, T, H);
  FAILS(moec_run(c, 0, &call, &err), DEVICE,
        "x: expected memory of CUDA device 1, but got memory "
        "of the CPU");
  call.x = on_device(make2(&tx, x, BF16, T, H), 1);
  call.y = on_device(make2(&ty, y, F32, T, H), 1);
  FAILS(moec_run(c, 0, &call, &err), DTYPE, "but got x bf16, y f32");
  call.y = on_device(make2(&ty, y, BF16, T, H), 1);

  /* A launch that the driver refuses: said once, with kernel and shape; then all is well again. */
  fail("cuLaunchKernel", 719, 1, 0);
  FAILS(moec_run(c, 0, &call, &err), LAUNCH,
        "model.layers.0.mlp: kernel layer_up: expected a launch of 8 x 3 blocks of 128 threads for "
        "T = 20, k = 2, but got: the driver reports CUDA_ERROR_LAUNCH_FAILED (719)");
  OK(moec_context_status(c, &err));
  OK(moec_run(c, 0, &call, &err));
  fail("cuMemcpyDtoH_v2", 700, 0, 0); /* a fault that the device found later */
  FAILS(moec_context_status(c, &err), LAUNCH,
        "the driver reports CUDA_ERROR_ILLEGAL_ADDRESS (700); the last launch was layer_up, 4 x 3 "
        "blocks of 128 threads, T = 20");
  OK(moec_context_status(c, &err));
  fail("cuCtxPushCurrent_v2", 201, 0, 0);
  FAILS(moec_run(c, 0, &call, &err), LAUNCH, "expected to use the device on CUDA device 1");
  OK(moec_run(c, 0, &call, &err)); /* not busy */

  /* Not after fork. */
  const int before = calls("cuLaunchKernel");
  fflush(stderr);
  const pid_t child = fork();
  if (!child) {
    failures = 0;
    moec_model *other = NULL;
    moec_context *second = NULL;
    FAILS(moec_run(c, 0, &call, &err), FORK, "CUDA does not survive it");
    FAILS(moec_context_create(m, NULL, &second, &err), FORK, "a child of fork");
    FAILS(open_on(0, &other), FORK, "forked later");
    moec_context_destroy(c);
    moec_close(m);
    CHECK(calls("cuLaunchKernel") == before && !calls("cuModuleUnload"));
    _exit(failures != 0);
  }
  int status = 1;
  CHECK(waitpid(child, &status, 0) == child && status == 0);
  moec_context_destroy(c);
  moec_close(m);
  device_free((uintptr_t)x), device_free((uintptr_t)y), device_free((uintptr_t)ids);
  device_free((uintptr_t)w), device_free((uintptr_t)logits), device_free((uintptr_t)counts);
  CHECK(!used() && !held());
}

int main(int argc, char **argv) {
  if (argc != 2 && argc != 3)
    return fprintf(stderr, "usage: cuda STUB [old]\n"), 2;
  moec_model *m = NULL;
  void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (driver) /* of this machine: the stub cannot take its place */
    return fprintf(stderr, "skipped: this machine has a CUDA driver\n"), 77;
  FAILS(open_on(0, &m), NO_DRIVER, "expected the CUDA driver (libcuda.so.1), but got: ");
  if (!load_stub(argv[1]))
    return 2;
  if (argc == 3)
    return test_without_maps();
  test_open();
  test_levels();
  test_memory();
  test_calls();
  return finish("cuda");
}
