/* A call on a GPU: everything is enqueued on the caller's stream, nothing waits for the device. */
#include "Cuda.h"

/* ---- launches ---- */

/* The launcher that generated code and the functions below start kernels by. A grid without blocks,
   which the driver would refuse, is nothing to do (no slots: only the shared expert). After a
   failure the rest of the call is left out. */
static void start(void *self, const moec_gpu_launch *launch) {
  moec_context *c = self;
  moec_gpu_call *g = &c->gpu;
  if (g->failure || !launch->grid[0] || !launch->grid[1] || !launch->grid[2])
    return;
  const struct moec_gpu *gpu = c->model->gpu;
  g->failure = gpu->cuda->launch(gpu->kernels[launch->kernel], launch->grid[0], launch->grid[1],
                                 launch->grid[2], launch->block[0], launch->block[1],
                                 launch->block[2], launch->shared_bytes, g->stream,
                                 (void **)(uintptr_t)launch->arguments, NULL);
  g->kernel = launch->name;
  g->grid[0] = launch->grid[0];
  g->grid[1] = launch->grid[1];
  g->block = launch->block[0];
}

/* The launcher's tensor maps: host work alone, so a captured call may do it. */
static void make_map(void *self, const moec_gpu_map *view, void *map) {
  moec_context *c = self;
  moec_gpu_call *g = &c->gpu;
  if (g->failure)
    return;
  const moec_cuda_driver *cuda = c->model->gpu->cuda;
  static const uint32_t steps[5] = {1, 1, 1, 1, 1};
  /* 0, 32, 64 and 128 bytes are 0, 1, 2 and 3; what is out of bounds is zero. */
  const int swizzle = view->swizzle == 128 ? 3 : view->swizzle / 32;
  g->kernel = "tensor map";
  g->grid[0] = g->grid[1] = g->block = 0;
  g->failure =
      cuda->encode_map
          ? cuda->encode_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, (uint32_t)view->rank,
                             (void *)(uintptr_t)view->base, view->sizes, view->strides, view->box,
                             steps, 0, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, 0)
          : CUDA_ERROR_NOT_SUPPORTED;
}

/* One of the kernels of CallKernels.cpp. */
static void start_call_kernel(moec_context *c, int32_t kernel, uint32_t blocks, void **arguments) {
  const moec_gpu_kernel *k = &c->model->module->kernels[kernel];
  const moec_gpu_launch launch = {
      k->name, kernel, k->shared_bytes, {blocks, 1, 1}, {k->threads, 1, 1}, arguments};
  start(c, &launch);
}

static uint32_t blocks_of(const moec_context *c, int32_t kernel, int32_t rows) {
  const uint32_t threads = c->model->module->kernels[kernel].threads;
  return ((uint32_t)rows + threads - 1) / threads;
}

/* ---- a call ---- */

int moec_cuda_attach(moec_context *c, void *more, const char *where, moec_error *error) {
  c->gpu.launcher.self = c;
  c->gpu.launcher.launch = start;
  c->gpu.launcher.map = make_map;
  c->gpu.status = more;
  c->frame.ticket = (uint32_t *)more + 2;
  c->gpu.layer = "no layer";
  c->gpu.kernel = "no kernel";
  int r = moec_cuda_enter(c->model, where, error);
  if (r)
    return r;
  const int code = c->model->gpu->cuda->fill((uintptr_t)more, 0xff, 2 * sizeof(uint64_t));
  r = code ? moec_cuda_fail(c->model, code, where, "clear the status", 0, error) : 0;
  moec_cuda_leave(c->model);
  return r;
}

int moec_cuda_begin(moec_context *c, const moec_job *job) {
  moec_gpu_call *g = &c->gpu;
  const int r = moec_cuda_enter(c->model, job->check->where, job->check->error);
  if (r)
    return r;
  g->stream = job->call->stream;
  g->failure = 0;
  g->layer = job->layer->desc->name;
  g->T = job->t->T;
  c->frame.launcher = &g->launcher;
  return 0;
}

void moec_cuda_clear(moec_context *c, void *to, int64_t step, int64_t width, int64_t rows) {
  moec_gpu_call *g = &c->gpu;
  if (g->failure || !width || !rows)
    return;
  g->kernel = "memset";
  g->grid[0] = (uint32_t)rows;
  g->grid[1] = 1;
  g->block = 1;
  g->failure = c->model->gpu->cuda->fill_rows((uintptr_t)to, (size_t)step, 0, (size_t)width,
                                              (size_t)rows, g->stream);
}

void moec_cuda_take(moec_context *c, const moec_job *job, int64_t first, int64_t rows) {
  const tensors *t = job->t;
  const int64_t id_bytes = moec_dtype_bytes(t->experts.dtype);
  const int64_t weight_bytes = moec_dtype_bytes(t->weights.dtype);
  const void *ids = t->experts.data + first * t->experts.stride * id_bytes;
  const void *weights = t->weights.data + first * t->weights.stride * weight_bytes;
  int64_t id_stride = t->experts.stride, weight_stride = t->weights.stride;
  int32_t wide = id_bytes == 8, type = t->weights.dtype, slots = (int32_t)t->k;
  int32_t count = (int32_t)(rows * t->k), E = (int32_t)job->layer->desc->code->E;
  int32_t skip = (job->call->flags & MOEC_SKIP_FOREIGN) != 0;
  void *arguments[] = {&ids,        &id_stride,    &wide, &weights, &weight_stride, &type,
                       &count,      &slots,        &E,    &skip,    &first,         &c->ids,
                       &c->weights, &c->gpu.status};
  const int32_t kernel = c->model->gpu->call_in;
  start_call_kernel(c, kernel, blocks_of(c, kernel, count), arguments);
}

void moec_cuda_run(moec_context *c, const moec_entry *entry) { entry->stages[0](&c->frame, 0, 1); }

void moec_cuda_give(moec_context *c, const moec_job *job, int64_t first, int64_t rows) {
  const tensors *t = job->t;
  const moec_call *call = job->call;
  int32_t slots = (int32_t)t->k, count = (int32_t)(rows * t->k);
  int32_t E = (int32_t)job->layer->desc->code->E;
  if (call->experts_out || call->weights_out) {
    const int64_t id_bytes = call->experts_out ? moec_dtype_bytes(t->experts_out.dtype) : 4;
    void *ids = NULL, *weights = NULL;
    int64_t id_stride = t->experts_out.stride, weight_stride = t->weights_out.stride;
    int32_t mode = 0;
    if (call->experts_out) {
      ids = t->experts_out.data + first * id_stride * id_bytes;
      mode |= id_bytes == 8 ? 3 : 1;
    }
    if (call->weights_out) {
      weights = t->weights_out.data + first * weight_stride * 4;
      mode |= 4;
    }
    void *arguments[] = {&c->ids,    &c->weights, &count,   &slots,        &ids,
                         &id_stride, &mode,       &weights, &weight_stride};
    const int32_t kernel = c->model->gpu->call_out;
    start_call_kernel(c, kernel, blocks_of(c, kernel, count), arguments);
  }
  if (call->counts_out) {
    void *counts = t->counts_out.data;
    void *arguments[] = {&c->ids, &count, &E, &counts};
    start_call_kernel(c, c->model->gpu->call_counts, (uint32_t)E + 1, arguments);
  }
}

int moec_cuda_end(moec_context *c, const moec_job *job, int result) {
  moec_cuda_leave(c->model);
  const moec_gpu_call *g = &c->gpu;
  if (result || !g->failure)
    return result;
  char text[80];
  moec_cuda_text(c->model->gpu->cuda, g->failure, text);
  return moec_fail(job->check->error, MOEC_E_LAUNCH,
                   "%s: %s: kernel %.80s: expected a launch of %u x %u blocks of %u threads for "
                   "T = %lld, k = %lld, but got: the driver reports %s",
                   job->check->where, job->check->layer, g->kernel, g->grid[0], g->grid[1],
                   g->block, (long long)job->t->T, (long long)job->t->k, text);
}

/* Reads and clears what kernels wrote down. Waits for the device, which the caller promises idle.
 */
int moec_cuda_status(moec_context *c, moec_error *error) {
  static const char w[] = "moec_context_status";
  const moec_cuda_driver *cuda = c->model->gpu->cuda;
  moec_gpu_call *g = &c->gpu;
  int r = moec_cuda_enter(c->model, w, error);
  if (r)
    return r;
  uint64_t status = UINT64_MAX;
  int code = cuda->to_host(&status, (uintptr_t)g->status, sizeof status);
  if (!code && status != UINT64_MAX)
    code = cuda->fill((uintptr_t)g->status, 0xff, sizeof status);
  moec_cuda_leave(c->model);
  if (code) {
    char text[80];
    moec_cuda_text(cuda, code, text);
    return moec_fail(error, MOEC_E_LAUNCH,
                     "%s: %s: expected an idle device without faults, but got: the driver reports "
                     "%s; the last launch was %.80s, %u x %u blocks of %u threads, T = %lld",
                     w, g->layer, text, g->kernel, g->grid[0], g->grid[1], g->block,
                     (long long)g->T);
  }
  if (status != UINT64_MAX)
    return moec_fail(error, MOEC_E_EXPERT_ID,
                     "%s: %s: experts[%lld, %lld] of a call since the last check: expected -1 or "
                     "an expert of the layer, but got another id, which was skipped",
                     w, g->layer, (long long)(status >> 32), (long long)(status & 0xffffffffu));
  return moec_succeed(error);
}
