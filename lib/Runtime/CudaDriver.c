#include "Cuda.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

/* PTX of compute_80 is that of CUDA 11.0. */
enum { LEAST_VERSION = 11000 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static moec_cuda_driver driver;
static bool loaded;
static uint32_t loaded_forks; /* fork generation in which the driver was started */

/* Under the mutex. The library stays loaded for ever: it has threads. */
static int load(const char *where, moec_error *error) {
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char *cause = dlerror();
    return moec_fail(error, MOEC_E_NO_DRIVER,
                     "%s: expected the CUDA driver (libcuda.so.1), but got: %s", where,
                     cause ? cause : "no reason");
  }
  moec_cuda_driver d;
  memset(&d, 0, sizeof d);
  const char *missing = NULL;
#define MOEC_CUDA_FIND(text, name, arguments)                                                      \
  *(void **)(void *)&d.name = dlsym(library, text);                                                \
  if (!d.name)                                                                                     \
    missing = text;
  MOEC_CUDA_FUNCTIONS(MOEC_CUDA_FIND)
#undef MOEC_CUDA_FIND
  *(void **)(void *)&d.function_load = dlsym(library, "cuFuncLoad");
  *(void **)(void *)&d.encode_map = dlsym(library, "cuTensorMapEncodeTiled");
  int version = 0;
  if (d.version)
    (void)d.version(&version);
  if (missing || version < LEAST_VERSION)
    return moec_fail(error, MOEC_E_DRIVER_OLD,
                     "%s: expected a driver for CUDA 11.0 or later, but got one for CUDA %d.%d%s%s",
                     where, version / 1000, version % 1000 / 10, missing ? " without " : "",
                     missing ? missing : "");
  const int code = d.init(0);
  if (code) {
    char text[80];
    moec_cuda_text(&d, code, text);
    return moec_fail(error, MOEC_E_NO_DEVICE,
                     "%s: expected a CUDA device, but got: the driver reports %s", where, text);
  }
  moec_watch_forks();
  driver = d;
  loaded = true;
  loaded_forks = moec_fork_generation();
  return 0;
}

int moec_cuda_load(const moec_cuda_driver **out, const char *where, moec_error *error) {
  pthread_mutex_lock(&mutex);
  int r = loaded ? 0 : load(where, error);
  if (!r && loaded_forks != moec_fork_generation())
    r = moec_fail(error, MOEC_E_FORK,
                  "%s: expected the process that started the CUDA driver, but got a child that was "
                  "forked later; open the model before anything else, or start the child by exec",
                  where);
  pthread_mutex_unlock(&mutex);
  *out = &driver;
  return r;
}

void moec_cuda_text(const moec_cuda_driver *cuda, int code, char text[80]) {
  const char *name = NULL;
  if (cuda->error_name(code, &name) || !name)
    name = "error";
  snprintf(text, 80, "%.60s (%d)", name, code);
}
