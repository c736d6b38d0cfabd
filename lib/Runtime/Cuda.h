/* The CUDA driver, loaded at run time: declarations of our own, so that neither building nor
   running moec needs CUDA. Names and signatures are those of cuda.h. */
#ifndef MOEC_RUNTIME_CUDA_H
#define MOEC_RUNTIME_CUDA_H

#include "Call.h"

enum {
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NO_DEVICE = 100,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_IMAGE = 200,
  CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
  CUDA_ERROR_INVALID_PTX = 218,
  CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222,
  CUDA_ERROR_JIT_COMPILATION_DISABLED = 223,
  CUDA_ERROR_NOT_SUPPORTED = 801,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9,
  CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
  CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
};

/* X(name in the library, name here, arguments); every function returns 0 or a number of cuda.h. */
#define MOEC_CUDA_FUNCTIONS(X)                                                                     \
  X("cuInit", init, (unsigned flags))                                                              \
  X("cuDriverGetVersion", version, (int *version))                                                 \
  X("cuGetErrorName", error_name, (int code, const char **name))                                   \
  X("cuDeviceGetCount", device_count, (int *count))                                                \
  X("cuDeviceGet", device_get, (int *device, int ordinal))                                         \
  X("cuDeviceGetName", device_name, (char *name, int length, int device))                          \
  X("cuDeviceGetAttribute", device_attribute, (int *value, int attribute, int device))             \
  X("cuDevicePrimaryCtxRetain", retain, (void **context, int device))                              \
  X("cuDevicePrimaryCtxRelease_v2", release, (int device))                                         \
  X("cuCtxPushCurrent_v2", push, (void *context))                                                  \
  X("cuCtxPopCurrent_v2", pop, (void **context))                                                   \
  X("cuModuleLoadData", module_load, (void **module, const void *image))                           \
  X("cuModuleUnload", module_unload, (void *module))                                               \
  X("cuModuleGetFunction", module_function, (void **function, void *module, const char *name))     \
  X("cuFuncSetAttribute", function_set, (void *function, int attribute, int value))                \
  X("cuMemAlloc_v2", allocate, (uint64_t *memory, size_t bytes))                                   \
  X("cuMemFree_v2", free, (uint64_t memory))                                                       \
  X("cuMemGetInfo_v2", memory_info, (size_t *unused, size_t *total))                               \
  X("cuMemcpyHtoD_v2", to_device, (uint64_t to, const void *from, size_t bytes))                   \
  X("cuMemcpyDtoH_v2", to_host, (void *to, uint64_t from, size_t bytes))                           \
  X("cuMemsetD8_v2", fill, (uint64_t to, unsigned char value, size_t bytes))                       \
  X("cuMemsetD2D8Async", fill_rows,                                                                \
    (uint64_t to, size_t step, unsigned char value, size_t width, size_t rows, void *stream))      \
  X("cuLaunchKernel", launch,                                                                      \
    (void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by, unsigned bz,    \
     unsigned shared, void *stream, void **arguments, void **extra))

typedef struct {
#define MOEC_CUDA_MEMBER(text, name, arguments) int(*name) arguments;
  MOEC_CUDA_FUNCTIONS(MOEC_CUDA_MEMBER)
#undef MOEC_CUDA_MEMBER
  /* NULL where the driver is older: */
  int (*function_load)(void *function); /* cuFuncLoad, since 12.4 */
  /* cuTensorMapEncodeTiled, since 12.0: as old as drivers for devices that need it */
  int (*encode_map)(void *map, int type, uint32_t rank, void *base, const uint64_t *sizes,
                    const uint64_t *strides, const uint32_t *box, const uint32_t *steps,
                    int interleave, int swizzle, int promotion, int fill);
} moec_cuda_driver;

/* A model on a device. */
struct moec_gpu {
  const moec_cuda_driver *cuda;
  int device;     /* the driver's handle */
  void *context;  /* its primary context: the one that torch and others use */
  void *module;   /* the image that was loaded */
  void **kernels; /* as in moec_module.kernels; those of other levels are NULL */
  int32_t call_in, call_out, call_counts; /* places of these kernels */
  uint32_t forks;                         /* fork generation in which it was opened */
};

/* The driver. E-NO-DRIVER, E-NO-DEVICE, E-DRIVER-OLD, E-FORK. */
int moec_cuda_load(const moec_cuda_driver **out, const char *where, moec_error *error);

/* "CUDA_ERROR_OUT_OF_MEMORY (2)" */
void moec_cuda_text(const moec_cuda_driver *cuda, int code, char text[80]);

/* Makes the model's context the thread's. E-FORK in a child of the process that opened it. */
int moec_cuda_enter(const moec_model *m, const char *where, moec_error *error);
void moec_cuda_leave(const moec_model *m);

/* An allocation or copy failed: E-DEVICE-MEMORY or E-LAUNCH. */
int moec_cuda_fail(const moec_model *m, int code, const char *where, const char *what,
                   uint64_t bytes, moec_error *error);

/* CudaRun.c */
int moec_cuda_attach(moec_context *, void *more, const char *where, moec_error *);
int moec_cuda_begin(moec_context *, const moec_job *);
void moec_cuda_clear(moec_context *, void *to, int64_t step, int64_t width, int64_t rows);
void moec_cuda_take(moec_context *, const moec_job *, int64_t first, int64_t rows);
void moec_cuda_run(moec_context *, const moec_entry *);
void moec_cuda_give(moec_context *, const moec_job *, int64_t first, int64_t rows);
int moec_cuda_end(moec_context *, const moec_job *, int result);
int moec_cuda_status(moec_context *, moec_error *);

#endif
