/* moec/module.h: what generated code exports and what the runtime hands to it. C99 and C++17.
   Layout is part of the ABI (MOEC_ABI major.minor): fields are only appended. */
#ifndef MOEC_MODULE_H
#define MOEC_MODULE_H
#include <stddef.h>
#include <stdint.h>

#define MOEC_MAX_STAGES 8
#define MOEC_COUNTERS 16

/* One call of one entry. Generated code reads it by fixed offsets (static_asserts in lib/Runtime
 * and a test in lib/Target/CPU hold them). */
typedef struct moec_frame {
  void *workspace;            /*   0: 64-byte aligned, workspace_bytes() long */
  const void *const *weights; /*   8: packed tensors in the order of moec_layer_code.weights */
  const void *x;              /*  16: [T,H] */
  int64_t x_stride;           /*  24: elements between rows */
  void *y;                    /*  32: [T,H] */
  int64_t y_stride;           /*  40: elements between rows */
  int64_t tokens;             /*  48: T of this chunk */
  int64_t slots;              /*  56: k, ids per token */
  int32_t *experts; /*  64: [T,k] compact; read by `experts`, written by `route` and `forward` */
  float *expert_weights; /*  72: [T,k] compact; same */
  float *logits;         /*  80: [T,E]; written by `route`, NULL for the others */
  int64_t logits_stride; /*  88: elements between rows */
  int32_t *offsets;      /*  96: [E+1] first sorted row of each expert; written by the sort */
  int64_t accumulate;    /* 104: 0 or 1: y += result */
  int64_t lanes;         /* 112: lanes the workspace was planned for */
  int64_t routed_only;   /* 120: 0 or 1: without shared expert and factor of the sum */
  /* 128: counter i at [8*i] (one cache line each), zero at entry */
  int64_t counters[MOEC_COUNTERS * 8];
  /* Since 1.1 of the interface: */
  const void *router_x;    /* 1152: [T,H], read by the router instead of x; of x's type */
  int64_t router_x_stride; /* 1160: elements between rows */
  const struct moec_gpu_launcher *launcher; /* 1168: code of a GPU: where its kernels start */
  /* Since 1.3: */
  uint32_t *ticket; /* 1176: on the device, of the context: all ones at first, then zero between
                       launches; blocks of a launch find out by it which of them is last */
} moec_frame;

typedef void (*moec_stage_fn)(moec_frame *, int32_t lane, int32_t lanes);

enum { MOEC_ENTRY_FORWARD = 0, MOEC_ENTRY_ROUTE = 1, MOEC_ENTRY_EXPERTS = 2 };
enum { MOEC_DT_F32 = 0, MOEC_DT_BF16 = 1, MOEC_DT_F16 = 2 };

typedef struct moec_entry {
  int32_t kind;             /* MOEC_ENTRY_... */
  int32_t x_dtype, y_dtype; /* MOEC_DT_... (y ignored by route) */
  int32_t stage_count;
  const moec_stage_fn *stages;
  uint64_t (*workspace_bytes)(int64_t tokens, int64_t slots, int64_t lanes);
} moec_entry;

typedef struct moec_level_code {
  const char *level; /* "x86-64-v3", "x86-64-v4" */
  int32_t rank; /* higher is better; the runtime picks the highest it can run and the cap allows */
  int32_t entry_count;
  const moec_entry *entries;
} moec_level_code;

typedef struct moec_weight_desc {     /* one packed tensor */
  const char *role;                   /* "router", "gate_up", "down" */
  const char *format;                 /* "f32", "bf16" */
  const char *layout;                 /* "panel32-1"; biases and scales "vector32-1" */
  int64_t experts, parts, rows, cols; /* [E][parts][Nout][Kin] */
  uint64_t bytes;                     /* multiple of 4096 */
} moec_weight_desc;

typedef struct moec_layer_code { /* shared by equal layers */
  int32_t kind;                  /* 0 MoE, 1 dense FFN */
  int32_t compute;               /* MOEC_DT_F32 | MOEC_DT_BF16 */
  int64_t H, F, E, K, S, W;
  uint32_t needs, reserved;
  uint64_t active_flops; /* per token */
  int32_t weight_count, level_count;
  const moec_weight_desc *weights;
  const moec_level_code *levels;
} moec_layer_code;

typedef struct moec_layer_desc {
  const char *name; /* "model.layers.3.mlp" */
  const char *file; /* "model.layers.3.mlp.safetensors" */
  int32_t index, reserved;
  const moec_layer_code *code;
  uint8_t id[32]; /* BLAKE3 of the layer's attributes, formats and layouts: must equal the weight
                     file's */
} moec_layer_desc;

/* ---- a GPU's code (since 1.1) ----

   The entries of a level "sm_80" have one stage, which enqueues kernels through frame->launcher:
   grids, blocks and arguments follow from the frame alone. The kernels of all entries of a level
   are in one image, which the module has once per architecture. */

/* One kernel launch. `arguments` are the addresses of the arguments' values, as cuLaunchKernel
   takes them; they are valid during the call only. */
typedef struct moec_gpu_launch {
  const char *name;       /*  0: name of the kernel */
  int32_t kernel;         /*  8: its place in moec_module.kernels */
  uint32_t shared_bytes;  /* 12: dynamic shared memory of a block */
  uint32_t grid[3];       /* 16 */
  uint32_t block[3];      /* 28 */
  void *const *arguments; /* 40 */
} moec_gpu_launch;

/* A view of bf16 in global memory, of which the TMA unit copies boxes. Dimensions from the
   innermost on; a box may reach beyond the sizes, where it is zero. */
typedef struct moec_gpu_map {
  const void *base;      /*   0: 16-byte aligned */
  uint64_t sizes[5];     /*   8: elements */
  uint64_t strides[4];   /*  48: bytes between neighbours in dimensions 1 to 4, multiples of 16 */
  uint32_t box[5];       /*  80: elements */
  int32_t rank, swizzle; /* 100: 1 to 5; 104: bytes, 0, 32, 64 or 128 */
} moec_gpu_map;

/* Where launches go: the driver, or the executor of the tests. A failure is remembered by `self`:
   generated code has nothing to decide after one. */
typedef struct moec_gpu_launcher {
  void *self;                                                /* 0 */
  void (*launch)(void *self, const moec_gpu_launch *launch); /* 8 */
  /* Since 1.2: fills the 128 bytes (64-byte aligned) that a kernel takes by value as a tensor map.
   */
  void (*map)(void *self, const moec_gpu_map *view, void *map); /* 16 */
} moec_gpu_launcher;

/* MOEC_IMAGE_EXACT since 1.3 */
enum { MOEC_IMAGE_CUBIN = 0, MOEC_IMAGE_PTX = 1, MOEC_IMAGE_EXACT = 2 };
typedef struct moec_gpu_image {
  int32_t kind;     /* MOEC_IMAGE_CUBIN: machine code of `arch` and later minor versions;
                       MOEC_IMAGE_PTX: text for it and everything newer, ending in a zero byte;
                       MOEC_IMAGE_EXACT: machine code of `arch` alone (sm_90a) */
  int32_t arch;     /* compute capability: 80 is 8.0 */
  const void *data; /* 8-byte aligned */
  uint64_t bytes;
} moec_gpu_image;

typedef struct moec_gpu_kernel {
  const char *name;
  uint32_t threads, shared_bytes; /* of a block; the same in every launch */
} moec_gpu_kernel;

/* What runs the entries of a level of this name (moec_level_code.level). */
enum { MOEC_GPU_MAPS = 1 };
typedef struct moec_gpu_level {
  const char *level; /* "sm_80" */
  int32_t rank;   /* higher is better; the runtime takes the best that the device and driver can */
  uint32_t needs; /* MOEC_GPU_MAPS: launches make tensor maps */
  int32_t first_image, image_count; /* in moec_module.images */
  int32_t first_kernel,
      kernel_count; /* in moec_module.kernels; launches count from its beginning */
} moec_gpu_level;

struct moec_module {
  size_t struct_size;
  uint32_t abi, reserved;     /* MOEC_ABI the module was built for */
  const char *name, *version; /* model name; moec's version */
  int32_t layer_count, reserved2;
  const moec_layer_desc *layers;
  /* Since 1.1, all zero in code for the CPU: */
  int32_t image_count, kernel_count;
  const moec_gpu_image *images;
  const moec_gpu_kernel *kernels;
  /* Since 1.3, by rising rank; without it there is one level, which has everything: */
  int32_t gpu_level_count, reserved3;
  const moec_gpu_level *gpu_levels;
};

/* First tensor of every weight file, at file offset 4096. Little endian. */
typedef struct moec_id_tensor {
  char role[24];
  char dtype[8];
  uint64_t offset, bytes, xxh3;
} moec_id_tensor; /* offset from file start */
typedef struct moec_id_block {
  char magic[8];                 /* "MOECPACK" */
  uint32_t schema, tensor_count; /* schema 1 */
  uint8_t id[32];
  uint64_t file_bytes;
  char layout[32];
  moec_id_tensor tensors[16];
  uint8_t zero[4096 - 8 - 8 - 32 - 8 - 32 - 16 * 56];
} moec_id_block;
#endif
