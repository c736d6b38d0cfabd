/* moe/Target/GPU/Launch.h: how generated host code starts kernels. C and C++; internal to moec. */
#ifndef MOE_TARGET_GPU_LAUNCH_H
#define MOE_TARGET_GPU_LAUNCH_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* One kernel launch. `arguments` are the addresses of the arguments' values, as cuLaunchKernel
   takes them; they are valid during the call only. */
typedef struct moec_gpu_launch {
  const char *name;       /*  0: name of the kernel in its module */
  int32_t kernel;         /*  8: its number in the module */
  uint32_t shared_bytes;  /* 12: dynamic shared memory of a block */
  uint32_t grid[3];       /* 16 */
  uint32_t block[3];      /* 28 */
  void *const *arguments; /* 40 */
} moec_gpu_launch;

/* Where launches go: the driver, or the executor of the tests. A failure is remembered by `self`:
   host code has nothing to decide after one. */
typedef struct moec_gpu_launcher {
  void *self;                                                /* 0 */
  void (*launch)(void *self, const moec_gpu_launch *launch); /* 8 */
} moec_gpu_launcher;

#ifdef __cplusplus
}
#endif
#endif
