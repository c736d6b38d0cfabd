#include "Cuda.h"

#include <stdio.h>
#include <stdlib.h>

enum { ALIGNMENT = 256 };

int moec_cuda_enter(const moec_model *m, const char *where, moec_error *error) {
  if (m->gpu->forks != moec_fork_generation())
    return moec_fail(error, MOEC_E_FORK,
                     "%s: expected the process that opened the model, but got a child of fork: "
                     "CUDA does not survive it",
                     where);
  const int code = m->gpu->cuda->push(m->gpu->context);
  return code ? moec_cuda_fail(m, code, where, "use the device", 0, error) : 0;
}

void moec_cuda_leave(const moec_model *m) {
  void *context;
  (void)m->gpu->cuda->pop(&context);
}

int moec_cuda_fail(const moec_model *m, int code, const char *where, const char *what,
                   uint64_t bytes, moec_error *error) {
  const moec_cuda_driver *cuda = m->gpu->cuda;
  char text[80];
  if (code == CUDA_ERROR_OUT_OF_MEMORY) {
    size_t unused = 0, total = 0;
    (void)cuda->memory_info(&unused, &total);
    return moec_fail(error, MOEC_E_DEVICE_MEMORY,
                     "%s: expected %llu bytes on CUDA device %d to %s, but got none: %llu of its "
                     "%llu bytes are free",
                     where, (unsigned long long)bytes, m->device.device_id, what,
                     (unsigned long long)unused, (unsigned long long)total);
  }
  moec_cuda_text(cuda, code, text);
  return moec_fail(error, MOEC_E_LAUNCH,
                   "%s: expected to %s on CUDA device %d, but got: the driver reports %s", where,
                   what, m->device.device_id, text);
}

/* ---- code ---- */

static void list_images(const moec_module *m, int32_t first, int32_t count, char *text,
                        size_t size) {
  size_t n = 0;
  text[0] = 0;
  for (int32_t i = first; i < first + count && n < size; ++i)
    n += (size_t)snprintf(text + n, size - n, "%s%s%d%s", i > first ? ", " : "",
                          m->images[i].kind == MOEC_IMAGE_PTX ? "compute_" : "sm_",
                          m->images[i].arch, m->images[i].kind == MOEC_IMAGE_EXACT ? "a" : "");
}

/* Machine code runs on its own major version from its minor version on, that for an architecture
   with all its features on no other; PTX on everything newer. */
static bool fits(const moec_gpu_image *image, int arch) {
  switch (image->kind) {
  case MOEC_IMAGE_EXACT:
    return image->arch == arch;
  case MOEC_IMAGE_CUBIN:
    return image->arch / 10 == arch / 10 && image->arch <= arch;
  default:
    return image->kind == MOEC_IMAGE_PTX && image->arch <= arch;
  }
}

/* The best image of the level that the driver takes: newest machine code first, then the newest
   PTX. */
static int load_image(moec_model *m, const moec_gpu_level *level, bool wanted, int arch,
                      const char *where, moec_error *error) {
  const moec_module *module = m->module;
  struct moec_gpu *gpu = m->gpu;
  char have[160], text[80] = "";
  if (wanted)
    list_images(module, level->first_image, level->image_count, have, sizeof have);
  else
    list_images(module, 0, module->image_count, have, sizeof have);
  static const int32_t kinds[] = {MOEC_IMAGE_EXACT, MOEC_IMAGE_CUBIN, MOEC_IMAGE_PTX};
  int refusal = 0;
  for (int32_t k = 0; k < 3; ++k)
    for (int a = arch; a > 0; --a)
      for (int32_t i = 0; i < level->image_count; ++i) {
        const moec_gpu_image *image = &module->images[level->first_image + i];
        if (image->kind != kinds[k] || image->arch != a || !fits(image, arch))
          continue;
        const int code = gpu->cuda->module_load(&gpu->module, image->data);
        if (!code)
          return 0;
        gpu->module = NULL;
        if (code == CUDA_ERROR_OUT_OF_MEMORY)
          return moec_cuda_fail(m, code, where, "load the kernels", image->bytes, error);
        refusal = code;
      }
  if (!refusal)
    return moec_fail(error, MOEC_E_ARCH,
                     "%s: expected code for CUDA device %d (compute capability %d.%d), but got a "
                     "library with %s%s%s",
                     where, m->device.device_id, arch / 10, arch % 10, have,
                     wanted ? " for level " : "", wanted ? level->level : "");
  moec_cuda_text(gpu->cuda, refusal, text);
  if (refusal == CUDA_ERROR_UNSUPPORTED_PTX_VERSION || refusal == CUDA_ERROR_INVALID_PTX)
    return moec_fail(error, MOEC_E_DRIVER_OLD,
                     "%s: expected a driver that takes %s, but got: it reports %s", where, have,
                     text);
  return moec_fail(error, MOEC_E_ARCH,
                   "%s: expected a device that takes one of %s, but got: the driver reports %s",
                   where, have, text);
}

static int find_kernels(moec_model *m, const moec_gpu_level *level, const char *where,
                        moec_error *error) {
  const moec_module *module = m->module;
  struct moec_gpu *gpu = m->gpu;
  const moec_cuda_driver *cuda = gpu->cuda;
  int most = 0;
  (void)cuda->device_attribute(&most, CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
                               gpu->device);
  gpu->kernels = calloc((size_t)module->kernel_count + 1, sizeof *gpu->kernels);
  if (!gpu->kernels)
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected memory, but got none", where);
  gpu->call_in = gpu->call_out = gpu->call_counts = -1;
  for (int32_t i = level->first_kernel; i < level->first_kernel + level->kernel_count; ++i) {
    const moec_gpu_kernel *k = &module->kernels[i];
    if (k->shared_bytes > (uint32_t)most)
      return moec_fail(error, MOEC_E_ARCH,
                       "%s: expected a device with %u bytes of shared memory for a block (kernel "
                       "%s), but got CUDA device %d with %d",
                       where, k->shared_bytes, k->name, m->device.device_id, most);
    int code = cuda->module_function(&gpu->kernels[i], gpu->module, k->name);
    /* Up to 48 KiB needs no permission. */
    if (!code && k->shared_bytes > 48 * 1024)
      code = cuda->function_set(gpu->kernels[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                (int)k->shared_bytes);
    /* Drivers load code late, which must not happen in a captured call. */
    if (!code && cuda->function_load)
      code = cuda->function_load(gpu->kernels[i]);
    if (code) {
      char what[128];
      snprintf(what, sizeof what, "load kernel %.100s", k->name);
      return moec_cuda_fail(m, code, where, what, 0, error);
    }
    gpu->call_in = strcmp(k->name, "call_in") ? gpu->call_in : i;
    gpu->call_out = strcmp(k->name, "call_out") ? gpu->call_out : i;
    gpu->call_counts = strcmp(k->name, "call_counts") ? gpu->call_counts : i;
  }
  if (gpu->call_in < 0 || gpu->call_out < 0 || gpu->call_counts < 0)
    return moec_fail(error, MOEC_E_ABI,
                     "%s: expected kernels call_in, call_out and call_counts, but got a library "
                     "without",
                     where);
  return 0;
}

static int load_level(moec_model *m, const moec_gpu_level *level, bool wanted, int arch,
                      const char *where, moec_error *error) {
  struct moec_gpu *gpu = m->gpu;
  if (level->needs & ~(uint32_t)MOEC_GPU_MAPS)
    return moec_fail(error, MOEC_E_ABI,
                     "%s: level %s: expected needs of at most 0x%x, but got 0x%x", where,
                     level->level, MOEC_GPU_MAPS, level->needs);
  if ((level->needs & MOEC_GPU_MAPS) && !gpu->cuda->encode_map)
    return moec_fail(error, MOEC_E_DRIVER_OLD,
                     "%s: expected a driver for CUDA 12.0 or later, which makes the tensor maps of "
                     "level %s, but got one without cuTensorMapEncodeTiled",
                     where, level->level);
  int r = load_image(m, level, wanted, arch, where, error);
  if (!r)
    r = find_kernels(m, level, where, error);
  if (!r)
    m->level = level->level;
  return r;
}

/* What load_level has loaded, for the next level. */
static void unload_level(struct moec_gpu *gpu) {
  if (gpu->module)
    (void)gpu->cuda->module_unload(gpu->module);
  gpu->module = NULL;
  free(gpu->kernels);
  gpu->kernels = NULL;
}

/* The best level that the device and the driver can run, or the one that the user wants. */
static int choose_level(moec_model *m, const char *cap, int arch, const char *where,
                        moec_error *error) {
  const moec_module *module = m->module;
  /* Of code before 1.3: one level, whose tensor maps came with 1.2. */
  const moec_gpu_level only = {module->layer_count ? module->layers[0].code->levels[0].level : "",
                               0,
                               (module->abi & 0xffff) >= 2 ? MOEC_GPU_MAPS : 0,
                               0,
                               module->image_count,
                               0,
                               module->kernel_count};
  const moec_gpu_level *levels = &only;
  int32_t count = 1;
  if (module->struct_size >= sizeof *module && module->gpu_level_count > 0) {
    levels = module->gpu_levels;
    count = module->gpu_level_count;
  }
  int r = -1;
  for (int32_t i = count; r && i-- > 0;) {
    if (cap && strcmp(levels[i].level, cap))
      continue;
    unload_level(m->gpu);
    r = load_level(m, &levels[i], cap != NULL, arch, where, error);
    /* Another level may do without what this one lacks. */
    if (r && r != MOEC_E_ARCH && r != MOEC_E_DRIVER_OLD)
      return r;
  }
  if (r >= 0)
    return r;
  char have[160];
  size_t n = 0;
  have[0] = 0;
  for (int32_t i = 0; i < count && n < sizeof have; ++i)
    n += (size_t)snprintf(have + n, sizeof have - n, "%s%s", i ? ", " : "", levels[i].level);
  return moec_fail(error, MOEC_E_ARCH,
                   "%s: cpu_level: expected a level of the library (%s) for a CUDA device, but got "
                   "\"%s\"",
                   where, have, cap);
}

static int cuda_open(moec_model *m, const char *cap, const char *where, moec_error *error) {
  if (!moec_has_images(m->module))
    return moec_fail(error, MOEC_E_ARCH,
                     "%s: expected a library with code for GPUs, but got one for CPUs; compile the "
                     "model with --target cuda",
                     where);
  const moec_cuda_driver *cuda;
  int r = moec_cuda_load(&cuda, where, error);
  if (r)
    return r;
  int count = 0, device = 0, major = 0, minor = 0;
  (void)cuda->device_count(&count);
  if (m->device.device_id < 0 || m->device.device_id >= count)
    return moec_fail(error, MOEC_E_NO_DEVICE,
                     "%s: device: expected CUDA device 0 to %d, but got CUDA device %d", where,
                     count - 1, m->device.device_id);
  struct moec_gpu *gpu = calloc(1, sizeof *gpu);
  if (!gpu)
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected memory, but got none", where);
  gpu->cuda = cuda;
  gpu->forks = moec_fork_generation();
  int code = cuda->device_get(&device, m->device.device_id);
  gpu->device = device;
  if (!code)
    code = cuda->device_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device);
  if (!code)
    code = cuda->device_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device);
  if (!code)
    code = cuda->retain(&gpu->context, device);
  m->gpu = gpu; /* from here on `close` cleans up */
  if (code) {
    gpu->context = NULL;
    return moec_cuda_fail(m, code, where, "start a context", 0, error);
  }
  if ((r = moec_cuda_enter(m, where, error)))
    return r;
  r = choose_level(m, cap, major * 10 + minor, where, error);
  moec_cuda_leave(m);
  return r;
}

static void cuda_close(moec_model *m) {
  struct moec_gpu *gpu = m->gpu;
  if (!gpu)
    return;
  /* In a child of fork nothing of the driver may be called: what it holds is the parent's. */
  if (gpu->context && gpu->forks == moec_fork_generation()) {
    if (gpu->module && !moec_cuda_enter(m, "moec_close", NULL)) {
      unload_level(gpu);
      moec_cuda_leave(m);
    }
    (void)gpu->cuda->release(gpu->device);
  }
  free(gpu->kernels);
  free(gpu);
  m->gpu = NULL;
}

/* ---- memory ---- */

static int allocate(moec_model *m, uint64_t bytes, uint64_t *memory, const char *where,
                    const char *what, moec_error *error) {
  int r = moec_cuda_enter(m, where, error);
  if (r)
    return r;
  const int code = m->gpu->cuda->allocate(memory, (size_t)bytes);
  if (code)
    *memory = 0;
  r = code ? moec_cuda_fail(m, code, where, what, bytes, error) : 0;
  moec_cuda_leave(m);
  return r;
}

static void give_up(moec_model *m, uint64_t memory) {
  if (!memory || moec_cuda_enter(m, "moec_close", NULL))
    return;
  (void)m->gpu->cuda->free(memory);
  moec_cuda_leave(m);
}

static int cuda_arena(moec_model *m, moec_layer_state *layer, const char *where,
                      moec_error *error) {
  const moec_layer_code *code = layer->desc->code;
  if (layer->device_memory)
    return 0;
  const uint64_t bytes = moec_layer_bytes(code);
  int r = allocate(m, bytes, &layer->device_memory, where, "hold the weights of a layer", error);
  if (r)
    return r;
  if ((r = moec_cuda_enter(m, where, error)))
    return r;
  const int failure = m->gpu->cuda->fill(layer->device_memory, 0, (size_t)bytes);
  r = failure ? moec_cuda_fail(m, failure, where, "clear weights", bytes, error) : 0;
  moec_cuda_leave(m);
  uint64_t next = layer->device_memory;
  for (int32_t i = 0; i < code->weight_count; ++i) {
    layer->weights[i] = (const void *)(uintptr_t)next;
    next += code->weights[i].bytes;
  }
  return r;
}

static int cuda_place(moec_model *m, moec_layer_state *layer, const char *where,
                      moec_error *error) {
  const moec_layer_code *code = layer->desc->code;
  const void *host[MOEC_MAX_WEIGHTS];
  memcpy(host, layer->weights, sizeof host);
  const uint64_t bytes = moec_layer_bytes(code);
  int r = allocate(m, bytes, &layer->device_memory, where, "hold the weights of a layer", error);
  if (!r && !(r = moec_cuda_enter(m, where, error))) {
    uint64_t next = layer->device_memory;
    for (int32_t i = 0; !r && i < code->weight_count; ++i) {
      const size_t size = (size_t)code->weights[i].bytes;
      const int failure = m->gpu->cuda->to_device(next, host[i], size);
      if (failure)
        r = moec_cuda_fail(m, failure, where, "copy weights", size, error);
      layer->weights[i] = (const void *)(uintptr_t)next;
      next += size;
    }
    moec_cuda_leave(m);
  }
  /* They live on the device, nowhere twice. */
  moec_unmap_memory(layer->memory, layer->memory_bytes);
  layer->memory = NULL;
  layer->memory_bytes = 0;
  return r;
}

static void cuda_drop(moec_model *m, moec_layer_state *layer) {
  moec_unmap_memory(layer->memory, layer->memory_bytes); /* of an open that failed */
  layer->memory = NULL;
  layer->memory_bytes = 0;
  give_up(m, layer->device_memory);
  layer->device_memory = 0;
}

static int cuda_borrow(moec_model *m, const void *weight, uint64_t bytes, void **host,
                       const char *where, moec_error *error) {
  *host = malloc((size_t)bytes);
  if (!*host)
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected %llu bytes of memory, but got none", where,
                     (unsigned long long)bytes);
  int r = moec_cuda_enter(m, where, error);
  if (!r) {
    const int code = m->gpu->cuda->to_host(*host, (uintptr_t)weight, (size_t)bytes);
    r = code ? moec_cuda_fail(m, code, where, "read weights", bytes, error) : 0;
    moec_cuda_leave(m);
  }
  if (r)
    free(*host);
  return r;
}

static int cuda_give_back(moec_model *m, const void *weight, uint64_t bytes, void *host,
                          bool changed, const char *where, moec_error *error) {
  int r = changed ? moec_cuda_enter(m, where, error) : 0;
  if (!r && changed) {
    const int code = m->gpu->cuda->to_device((uintptr_t)weight, host, (size_t)bytes);
    r = code ? moec_cuda_fail(m, code, where, "copy weights", bytes, error) : 0;
    moec_cuda_leave(m);
  }
  free(host);
  return r;
}

static int cuda_allocate(moec_model *m, uint64_t bytes, int64_t max_tokens, void **memory,
                         const char *where, moec_error *error) {
  uint64_t place = 0;
  char what[64];
  snprintf(what, sizeof what, "hold the workspace of max_tokens = %lld", (long long)max_tokens);
  int r = allocate(m, bytes, &place, where, what, error);
  *memory = (void *)(uintptr_t)place;
  return r;
}

static void cuda_release(moec_model *m, void *memory, uint64_t bytes) {
  (void)bytes;
  give_up(m, (uintptr_t)memory);
}

const moec_target moec_cuda_target = {
    .alignment = ALIGNMENT,
    .has_lanes = false,
    .more_bytes = ALIGNMENT,
    .open = cuda_open,
    .close = cuda_close,
    .place = cuda_place,
    .arena = cuda_arena,
    .drop = cuda_drop,
    .borrow = cuda_borrow,
    .give_back = cuda_give_back,
    .allocate = cuda_allocate,
    .release = cuda_release,
    .attach = moec_cuda_attach,
    .begin = moec_cuda_begin,
    .clear = moec_cuda_clear,
    .take = moec_cuda_take,
    .run = moec_cuda_run,
    .give = moec_cuda_give,
    .end = moec_cuda_end,
    .status = moec_cuda_status,
};
