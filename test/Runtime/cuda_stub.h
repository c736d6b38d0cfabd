/* A CUDA driver that is none, for tests: device memory is host memory, launches are recorded or
   handed to a function. Built as a library with the SONAME of the real one, so that whoever loads
   it first makes it the process's driver. In the environment of programs that know nothing of it:
   MOEC_STUB_MEMORY=bytes of the device, MOEC_STUB_ARCH=9.0, MOEC_STUB_EXECUTOR=library:kernels.mlir
   (the SIMT executor, which then runs what is launched). */
#ifndef MOEC_TEST_CUDA_STUB_H
#define MOEC_TEST_CUDA_STUB_H
#include <stddef.h>
#include <stdint.h>

#include "moec/module.h"

typedef struct {
  int devices, major, minor, version, shared;
  size_t memory; /* bytes; 0: without limit */
} stub_machine;

typedef struct {
  /* Memory that exists from now on, or (bytes = 0) no longer. */
  void (*memory)(uint64_t begin, size_t bytes);
  /* Runs a kernel; 0 or a CUDA error. */
  int (*launch)(const char *kernel, const uint32_t grid[3], const uint32_t block[3],
                uint32_t shared, void *const *arguments);
  /* Bytes of every argument of a kernel, so that a captured launch can keep them. */
  const uint32_t *(*sizes)(const char *kernel, uint32_t *count);
  /* Fills the 128 bytes of a tensor map; 0 or a CUDA error. */
  int (*map)(const moec_gpu_map *view, void *map);
} stub_hooks;

void stub_reset(const stub_machine *machine); /* NULL: one device 8.0; forgets hooks and failures */
void stub_hook(const stub_hooks *hooks);
/* The call number `after` (0: the next) of `function` returns `code`, and so do later ones, if
   `lasting`. */
void stub_fail(const char *function, int code, int after, int lasting);
int stub_calls(const char *function); /* since stub_reset */
size_t stub_used(void);               /* bytes allocated now */
int stub_open(void);                  /* contexts retained, pushed and modules loaded now */
const char *stub_kernel(void);        /* of the last launch */
void *stub_stream(void);              /* of the last launch or memset */
#endif
