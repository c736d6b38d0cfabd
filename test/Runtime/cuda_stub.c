#include "cuda_stub.h"

#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
enum { OUT_OF_MEMORY = 2, INVALID_VALUE = 1, NO_DEVICE = 100, NOT_FOUND = 500, MOST = 64 };
enum { STREAM_CAPTURE_UNSUPPORTED = 900 };

typedef struct {
  uint64_t begin;
  size_t bytes;
} block;

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static stub_machine machine = {1, 8, 0, 12080, 166912, 0};
static stub_hooks hooks;
static struct {
  char name[64];
  int calls, code, after, lasting;
} functions[MOST];
static block blocks[4096];
static int block_count, retained, pushed, modules;
static size_t used;
static char kernel[256];
static void *stream, *capturing; /* the stream whose launches are captured */

/* Under the mutex. */
static int place_of(const char *name) {
  int i = 0;
  while (i < MOST - 1 && functions[i].name[0] && strcmp(functions[i].name, name))
    ++i;
  snprintf(functions[i].name, sizeof functions[i].name, "%s", name);
  return i;
}

/* Counts a call; what it shall return. */
static int enter(const char *name) {
  /* What waits, or changes memory out of order, ends a capture. */
  static const char *const unsafe[] = {"cuMemAlloc_v2",     "cuMemFree_v2",  "cuMemcpyHtoD_v2",
                                       "cuMemcpyDtoH_v2",   "cuMemsetD8_v2", "cuModuleLoadData",
                                       "cuModuleUnload",    "cuFuncLoad",    "cuCtxSynchronize",
                                       "cuFuncSetAttribute"};
  for (size_t i = 0; capturing && i < sizeof unsafe / sizeof *unsafe; ++i)
    if (!strcmp(unsafe[i], name))
      return STREAM_CAPTURE_UNSUPPORTED;
  pthread_mutex_lock(&mutex);
  const int i = place_of(name);
  ++functions[i].calls;
  int code = 0;
  if (functions[i].code && functions[i].after-- <= 0) {
    code = functions[i].code;
    if (!functions[i].lasting)
      functions[i].code = 0;
  }
  pthread_mutex_unlock(&mutex);
  return code;
}

API void stub_reset(const stub_machine *m) {
  static const stub_machine normal = {1, 8, 0, 12080, 166912, 0};
  machine = m ? *m : normal;
  memset(functions, 0, sizeof functions);
  memset(&hooks, 0, sizeof hooks);
  kernel[0] = 0;
  stream = NULL;
}
API void stub_hook(const stub_hooks *h) { hooks = *h; }
API void stub_fail(const char *function, int code, int after, int lasting) {
  const int i = place_of(function);
  functions[i].code = code;
  functions[i].after = after;
  functions[i].lasting = lasting;
}
API int stub_calls(const char *function) { return functions[place_of(function)].calls; }
API size_t stub_used(void) { return used; }
API int stub_open(void) { return retained + pushed + modules; }
API const char *stub_kernel(void) { return kernel; }
API void *stub_stream(void) { return stream; }

/* For programs that cannot call the functions above. */
__attribute__((constructor)) static void read_environment(void) {
  const char *memory = getenv("MOEC_STUB_MEMORY"), *arch = getenv("MOEC_STUB_ARCH");
  if (arch && sscanf(arch, "%d.%d", &machine.major, &machine.minor) == 2 && machine.major >= 9)
    machine.shared = 232448;
  if (memory)
    machine.memory = (size_t)strtoull(memory, NULL, 10);
}
static void load_executor(void) {
  static bool done;
  char path[1024];
  const char *both = getenv("MOEC_STUB_EXECUTOR"), *colon = both ? strchr(both, ':') : NULL;
  if (done || !colon)
    return;
  done = true;
  snprintf(path, sizeof path, "%.*s", (int)(colon - both), both);
  void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  bool (*load)(const char *) = NULL;
  const stub_hooks *(*get)(void) = NULL;
  if (library) {
    *(void **)(void *)&load = dlsym(library, "moe_simt_load");
    *(void **)(void *)&get = dlsym(library, "moe_simt_hooks");
  }
  if (!load || !get || !load(colon + 1)) {
    fprintf(stderr, "cuda_stub: expected MOEC_STUB_EXECUTOR to load, but got: %s\n",
            library ? "kernels that do not" : dlerror());
    abort();
  }
  hooks = *get();
}

#define ENTER(name)                                                                                \
  const int failure_ = enter(name);                                                                \
  if (failure_)                                                                                    \
  return failure_

/* ---- devices ---- */

API int cuInit(unsigned flags) {
  ENTER("cuInit");
  load_executor();
  return flags ? INVALID_VALUE : machine.devices ? 0 : NO_DEVICE;
}
API int cuDriverGetVersion(int *version) {
  ENTER("cuDriverGetVersion");
  *version = machine.version;
  return 0;
}
API int cuGetErrorName(int code, const char **name) {
  *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : code == NO_DEVICE   ? "CUDA_ERROR_NO_DEVICE"
          : code == 700         ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == 719         ? "CUDA_ERROR_LAUNCH_FAILED"
                                : NULL;
  return *name ? 0 : INVALID_VALUE;
}
API int cuDeviceGetCount(int *count) {
  ENTER("cuDeviceGetCount");
  *count = machine.devices;
  return 0;
}
API int cuDeviceGet(int *device, int ordinal) {
  ENTER("cuDeviceGet");
  *device = 40 + ordinal; /* handles are no ordinals */
  return ordinal < machine.devices ? 0 : 101;
}
API int cuDeviceGetName(char *name, int length, int device) {
  ENTER("cuDeviceGetName");
  snprintf(name, (size_t)length, "Stub %d", device - 40);
  return 0;
}
API int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  (void)device;
  *bytes = machine.memory;
  return 0;
}
API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  ENTER("cuDeviceGetAttribute");
  if (device < 40 || device >= 40 + machine.devices)
    return 101;
  /* Clock and processors, clock and bus of the memory: those of an A100, but little L2. */
  const int table[][2] = {{75, machine.major}, {76, machine.minor}, {97, machine.shared},
                          {13, 1410000},       {16, 108},           {36, 1215000},
                          {37, 5120},          {38, 1 << 20}};
  for (size_t i = 0; i < sizeof table / sizeof *table; ++i)
    if (table[i][0] == attribute) {
      *value = table[i][1];
      return 0;
    }
  return INVALID_VALUE;
}
API int cuDevicePrimaryCtxRetain(void **context, int device) {
  ENTER("cuDevicePrimaryCtxRetain");
  *context = &machine;
  ++retained;
  return device >= 40 ? 0 : INVALID_VALUE;
}
API int cuDevicePrimaryCtxRelease_v2(int device) {
  ENTER("cuDevicePrimaryCtxRelease_v2");
  --retained;
  return device >= 40 ? 0 : INVALID_VALUE;
}
API int cuCtxPushCurrent_v2(void *context) {
  ENTER("cuCtxPushCurrent_v2");
  if (context != &machine)
    return 201;
  __atomic_add_fetch(&pushed, 1, __ATOMIC_SEQ_CST);
  return 0;
}
API int cuCtxPopCurrent_v2(void **context) {
  ENTER("cuCtxPopCurrent_v2");
  *context = &machine;
  __atomic_sub_fetch(&pushed, 1, __ATOMIC_SEQ_CST);
  return 0;
}

/* ---- code ---- */

typedef struct {
  const char *data;
  size_t bytes;
} module;

API int cuModuleLoadData(void **out, const void *image) {
  ENTER("cuModuleLoadData");
  if (!pushed)
    return 201;
  module *m = malloc(sizeof *m);
  m->data = image;
  if (memcmp(image, ELFMAG, SELFMAG)) {
    m->bytes = strlen(image);
  } else {
    Elf64_Ehdr header;
    memcpy(&header, image, sizeof header);
    m->bytes = header.e_shoff + (size_t)header.e_shnum * header.e_shentsize;
  }
  *out = m;
  ++modules;
  return 0;
}
API int cuModuleUnload(void *m) {
  ENTER("cuModuleUnload");
  free(m);
  --modules;
  return 0;
}
/* A function is its name, kept for as long as the process. */
static struct kept {
  struct kept *next;
  char name[];
} *names;
API int cuModuleGetFunction(void **function, void *from, const char *name) {
  ENTER("cuModuleGetFunction");
  const module *m = from;
  const size_t n = strlen(name);
  for (size_t i = 0; i + n <= m->bytes; ++i)
    if (!memcmp(m->data + i, name, n) && (!i || m->data[i - 1] < '0' || m->data[i - 1] == '.')) {
      struct kept *k = malloc(sizeof *k + n + 1);
      if (!k)
        return OUT_OF_MEMORY;
      pthread_mutex_lock(&mutex);
      k->next = names;
      names = k;
      pthread_mutex_unlock(&mutex);
      *function = memcpy(k->name, name, n + 1);
      return 0;
    }
  return NOT_FOUND;
}
API int cuFuncSetAttribute(void *function, int attribute, int value) {
  ENTER("cuFuncSetAttribute");
  return function && attribute == 8 && value <= machine.shared ? 0 : INVALID_VALUE;
}
API int cuFuncLoad(void *function) {
  ENTER("cuFuncLoad");
  return function ? 0 : INVALID_VALUE;
}

/* ---- memory ---- */

API int cuMemAlloc_v2(uint64_t *memory, size_t bytes) {
  ENTER("cuMemAlloc_v2");
  if (!bytes)
    return INVALID_VALUE;
  pthread_mutex_lock(&mutex);
  void *p = NULL;
  if ((!machine.memory || used + bytes <= machine.memory) && block_count < 4096 &&
      !posix_memalign(&p, 256, bytes)) {
    memset(p, 0xff, bytes); /* NaN, and no valid id */
    blocks[block_count].begin = (uintptr_t)p;
    blocks[block_count++].bytes = bytes;
    used += bytes;
  }
  pthread_mutex_unlock(&mutex);
  if (!p)
    return OUT_OF_MEMORY;
  *memory = (uintptr_t)p;
  if (hooks.memory)
    hooks.memory(*memory, bytes);
  return 0;
}
API int cuMemFree_v2(uint64_t memory) {
  ENTER("cuMemFree_v2");
  pthread_mutex_lock(&mutex);
  int i = 0;
  while (i < block_count && blocks[i].begin != memory)
    ++i;
  const bool found = i < block_count;
  if (found) {
    used -= blocks[i].bytes;
    blocks[i] = blocks[--block_count];
    free((void *)(uintptr_t)memory);
  }
  pthread_mutex_unlock(&mutex);
  if (found && hooks.memory)
    hooks.memory(memory, 0);
  return found ? 0 : INVALID_VALUE;
}
API int cuMemGetInfo_v2(size_t *unused, size_t *total) {
  ENTER("cuMemGetInfo_v2");
  *total = machine.memory;
  *unused = machine.memory > used ? machine.memory - used : 0;
  return 0;
}

/* ---- captured calls ---- */

typedef struct node {
  struct node *next;
  char kernel[256]; /* empty: a memset */
  uint32_t grid[3], threads[3], shared;
  _Alignas(64) unsigned char arguments[32][128]; /* a tensor map is the largest */
  void *places[32];
  uint64_t to;
  size_t step, width, rows;
  unsigned char value;
} node;
typedef struct {
  node *first, **last;
} graph;
static graph *captured;

static node *append(void) {
  node *n = aligned_alloc(64, sizeof *n);
  memset(n, 0, sizeof *n);
  *captured->last = n;
  captured->last = &n->next;
  return n;
}

/* Device addresses have to be inside of one allocation. */
static bool exists(uint64_t begin, size_t bytes) {
  bool good = false;
  pthread_mutex_lock(&mutex);
  for (int i = 0; i < block_count; ++i)
    good |= begin >= blocks[i].begin && begin + bytes <= blocks[i].begin + blocks[i].bytes;
  pthread_mutex_unlock(&mutex);
  return good;
}
API int cuMemcpyHtoD_v2(uint64_t to, const void *from, size_t bytes) {
  ENTER("cuMemcpyHtoD_v2");
  if (!pushed || !exists(to, bytes))
    return INVALID_VALUE;
  memcpy((void *)(uintptr_t)to, from, bytes);
  return 0;
}
API int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
  ENTER("cuMemcpyDtoH_v2");
  if (!pushed || !exists(from, bytes))
    return INVALID_VALUE;
  memcpy(to, (const void *)(uintptr_t)from, bytes);
  return 0;
}
API int cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
  ENTER("cuMemsetD8_v2");
  if (!pushed || !exists(to, bytes))
    return INVALID_VALUE;
  memset((void *)(uintptr_t)to, value, bytes);
  return 0;
}
API int cuMemsetD2D8Async(uint64_t to, size_t step, unsigned char value, size_t width, size_t rows,
                          void *on) {
  ENTER("cuMemsetD2D8Async");
  if (!pushed || !rows || step < width || !exists(to, (rows - 1) * step + width))
    return INVALID_VALUE;
  stream = on;
  if (capturing && capturing == on) {
    node *n = append();
    n->to = to, n->step = step, n->value = value, n->width = width, n->rows = rows;
    return 0;
  }
  for (size_t i = 0; i < rows; ++i)
    memset((char *)(uintptr_t)to + i * step, value, width);
  return 0;
}

/* ---- launches ---- */

API int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                       unsigned bz, unsigned shared, void *on, void **arguments, void **extra) {
  ENTER("cuLaunchKernel");
  if (!pushed || !function || extra || !x || !y || !z || bx * by * bz > 1024 ||
      shared > (unsigned)machine.shared)
    return INVALID_VALUE;
  snprintf(kernel, sizeof kernel, "%s", (const char *)function);
  stream = on;
  const uint32_t grid[3] = {x, y, z}, threads[3] = {bx, by, bz};
  if (capturing && capturing == on) {
    node *n = append();
    memcpy(n->kernel, kernel, sizeof n->kernel);
    memcpy(n->grid, grid, sizeof grid);
    memcpy(n->threads, threads, sizeof threads);
    n->shared = shared;
    uint32_t count = 0;
    const uint32_t *sizes = hooks.sizes ? hooks.sizes(kernel, &count) : NULL;
    for (uint32_t i = 0; i < count && i < 32; ++i) {
      if (sizes[i] > sizeof n->arguments[i])
        return INVALID_VALUE;
      memcpy(n->arguments[i], arguments[i], sizes[i]);
      n->places[i] = n->arguments[i];
    }
    return count > 32 ? INVALID_VALUE : 0;
  }
  return hooks.launch ? hooks.launch(kernel, grid, threads, shared, arguments) : 0;
}

#ifndef STUB_WITHOUT_MAPS
API int cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *base,
                               const uint64_t *sizes, const uint64_t *strides, const uint32_t *box,
                               const uint32_t *steps, int interleave, int swizzle, int promotion,
                               int fill) {
  ENTER("cuTensorMapEncodeTiled");
  if ((uintptr_t)map % 64 || type != 9 || rank < 1 || rank > 5 || interleave || swizzle < 0 ||
      swizzle > 3 || promotion < 0 || promotion > 3 || fill)
    return INVALID_VALUE;
  moec_gpu_map view = {.base = base, .rank = (int32_t)rank, .swizzle = swizzle ? 16 << swizzle : 0};
  for (uint32_t i = 0; i < rank; ++i) {
    if (steps[i] != 1)
      return INVALID_VALUE;
    view.sizes[i] = sizes[i];
    view.box[i] = box[i];
    if (i)
      view.strides[i - 1] = strides[i - 1];
  }
  memset(map, 0, 128);
  return hooks.map ? hooks.map(&view, map) : 0;
}
#endif

/* ---- streams, graphs and events: a replay launches what was captured; nothing takes time ---- */

API int cuCtxSynchronize(void) {
  ENTER("cuCtxSynchronize");
  return 0;
}
API int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *on) {
  ENTER("cuMemcpyDtoDAsync_v2");
  stream = on;
  return exists(to, bytes) && exists(from, bytes) ? 0 : INVALID_VALUE;
}
API int cuStreamCreate(void **out, unsigned flags) {
  ENTER("cuStreamCreate");
  *out = malloc(1);
  return flags > 1;
}
API int cuStreamBeginCapture_v2(void *on, int mode) {
  ENTER("cuStreamBeginCapture_v2");
  if (capturing || mode > 2)
    return INVALID_VALUE;
  capturing = on;
  captured = calloc(1, sizeof *captured);
  captured->last = &captured->first;
  return 0;
}
API int cuStreamEndCapture(void *on, void **out) {
  ENTER("cuStreamEndCapture");
  const int code = capturing && capturing == on ? 0 : INVALID_VALUE;
  capturing = NULL;
  *out = captured;
  captured = NULL;
  return code;
}
API int cuGraphInstantiateWithFlags(void **exec, void *from, unsigned long long flags) {
  ENTER("cuGraphInstantiateWithFlags");
  *exec = from; /* it lives until the graph is destroyed, which callers do last */
  return from && !flags ? 0 : INVALID_VALUE;
}
API int cuGraphLaunch(void *exec, void *on) {
  ENTER("cuGraphLaunch");
  stream = on;
  int code = exec ? 0 : INVALID_VALUE;
  for (const node *n = exec ? ((const graph *)exec)->first : NULL; n && !code; n = n->next) {
    if (n->kernel[0] && hooks.launch)
      code = hooks.launch(n->kernel, n->grid, n->threads, n->shared, n->places);
    for (size_t i = 0; !n->kernel[0] && i < n->rows; ++i)
      memset((char *)(uintptr_t)n->to + i * n->step, n->value, n->width);
  }
  return code;
}
API int cuGraphExecDestroy(void *exec) { return exec ? 0 : INVALID_VALUE; }
API int cuGraphDestroy(void *from) {
  graph *g = from;
  for (node *n = g ? g->first : NULL, *next; n; n = next) {
    next = n->next;
    free(n);
  }
  free(g);
  return 0;
}
API int cuStreamDestroy_v2(void *on) {
  free(on);
  return 0;
}
API int cuEventDestroy_v2(void *event) {
  free(event);
  return 0;
}
API int cuEventCreate(void **event, unsigned flags) {
  ENTER("cuEventCreate");
  *event = malloc(1);
  return flags > 1;
}
API int cuEventRecord(void *event, void *on) {
  ENTER("cuEventRecord");
  stream = on;
  return event ? 0 : INVALID_VALUE;
}
API int cuEventElapsedTime(float *ms, void *begin, void *end) {
  ENTER("cuEventElapsedTime");
  *ms = 0.125f;
  return begin && end ? 0 : INVALID_VALUE;
}
