/* moe/Runtime/Pack.h: the one packer of weights. C and C++; internal to moec (not installed).

   Used by moec_set_weight, and linked statically into the compiler for `moec compile` and
   `moec pack`. Allocates nothing, starts no thread; different row ranges of a matrix (multiples of
   moec_pack_panel_rows) may be packed by different threads at once.

   Layout "panel32-1" of a weight [experts][parts][rows][cols] (rows: output columns of the layer,
   cols: the reduction k):
     Kp         cols rounded up to a multiple of 32
     panel      32 lanes x Kp. parts = 1: lane l of panel p is row 32p + l.
                parts = 2: lanes 0-15 are rows 16p ... 16p+15 of part 0, lanes 16-31 the same rows
                of part 1 (gate and up side by side)
     f32        element (k, lane) at byte (k * 32 + lane) * 4 of the panel
     bf16       element (k, lane) at byte ((k / 2) * 64 + lane * 2 + k % 2) * 2
     padding    k >= cols and rows that do not exist are zero
     expert e   begins at e * panels * panel bytes; the tensor's size is rounded up to 4096

   Layout "vector32-1" of a vector per expert (a bias, a scale), [experts][parts][rows][1], always
   f32: the panels of panel32-1 with Kp = 1, so that a panel is the 32 values that stand beside a
   panel of the matrix with the same rows. */
#ifndef MOE_RUNTIME_PACK_H
#define MOE_RUNTIME_PACK_H
#include <stddef.h>
#include <stdint.h>

#include "moec/module.h" /* MOEC_DT_F32, MOEC_DT_BF16, MOEC_DT_F16 */

#ifdef __cplusplus
extern "C" {
#endif

/* Element (row, col) of a source matrix is data[row * row_stride + col * col_stride]; strides in
   elements, of any sign. */
typedef struct moec_pack_source {
  const void *data;
  int32_t dtype; /* MOEC_DT_F32 | MOEC_DT_BF16 | MOEC_DT_F16 */
  int64_t row_stride, col_stride;
} moec_pack_source;

enum { MOEC_PANEL32, MOEC_VECTOR32 };

/* The layout of a name ("panel32-1"), or -1. */
int32_t moec_pack_layout(const char *name);

/* Rows of one part in a panel: 32 or 16. */
int64_t moec_pack_panel_rows(int32_t parts);

/* Bytes of one expert (all parts), and of the whole tensor (rounded up to 4096). dtype: F32 | BF16;
   parts: 1 | 2. UINT64_MAX if the size does not fit 63 bits. */
uint64_t moec_pack_expert_bytes(int32_t layout, int32_t dtype, int32_t parts, int64_t rows,
                                int64_t cols);
uint64_t moec_pack_tensor_bytes(int32_t layout, int32_t dtype, int64_t experts, int32_t parts,
                                int64_t rows, int64_t cols);

/* Packs rows row0 ... row1-1 of one part of one expert, `source` being the whole matrix
   [rows][cols] of that part, into `expert`, the expert's packed memory (4-byte aligned). Values are
   rounded to nearest even. If row0 is a multiple of moec_pack_panel_rows, and row1 is too or equals
   rows, the padding of these panels' lanes is written as well; else only the lanes of the rows are.
   Returns -1, or row * cols + col of the first value that is not finite in the packed format (the
   packed bytes are then of no use). */
int64_t moec_pack(int32_t layout, void *expert, int32_t dtype, int32_t parts, int32_t part,
                  int64_t rows, int64_t cols, int64_t row0, int64_t row1,
                  const moec_pack_source *source);

/* The same check without packing. */
int64_t moec_pack_scan(int32_t dtype, int64_t rows, int64_t cols, const moec_pack_source *source);

/* The inverse: one part of one expert as f32 [rows][cols], compact. */
void moec_unpack(int32_t layout, const void *expert, int32_t dtype, int32_t parts, int32_t part,
                 int64_t rows, int64_t cols, float *out);

/* The same into f32 or bf16 elements with any strides (in elements); f32 to bf16 is rounded. */
void moec_unpack_strided(int32_t layout, const void *expert, int32_t dtype, int32_t parts,
                         int32_t part, int64_t rows, int64_t cols, void *out, int32_t to,
                         int64_t row_stride, int64_t col_stride);

/* XXH3, 64 bits, seed 0: the hash of every tensor in a packed file. */
uint64_t moec_pack_hash(const void *data, size_t bytes);

#ifdef __cplusplus
}
#endif
#endif
