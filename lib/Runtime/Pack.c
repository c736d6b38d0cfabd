/* The packer: see moe/Runtime/Pack.h.

   Both formats are a transpose of 32-bit units (f32: one value; bf16: two neighbours in k), 32
   lanes wide. The fast path reads blocks of 8 rows and writes 32-byte pieces of panel rows.
 */
#include "moe/Runtime/Pack.h"

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

bool moec_has_avx2(void);

#define AVX2 __attribute__((target("avx2,fma,f16c")))

/* ---- sizes ---- */

int64_t moec_pack_panel_rows(int32_t parts) { return parts == 2 ? 16 : 32; }

int32_t moec_pack_layout(const char *name) {
  return !strcmp(name, "panel32-1")    ? MOEC_PANEL32
         : !strcmp(name, "vector32-1") ? MOEC_VECTOR32
                                       : -1;
}

/* cols as they are stored. */
static int64_t padded(int32_t layout, int64_t cols) {
  return layout == MOEC_VECTOR32 ? cols : (cols + 31) / 32 * 32;
}

uint64_t moec_pack_expert_bytes(int32_t layout, int32_t dtype, int32_t parts, int64_t rows,
                                int64_t cols) {
  uint64_t lanes = (uint64_t)moec_pack_panel_rows(parts);
  uint64_t panels = ((uint64_t)rows + lanes - 1) / lanes, bytes;
  if (cols > INT64_MAX - 31)
    return UINT64_MAX;
  uint64_t kp = (uint64_t)padded(layout, cols);
  if (rows < 0 || cols < 0 ||
      __builtin_mul_overflow(kp, (uint64_t)(dtype == MOEC_DT_F32 ? 128 : 64), &bytes) ||
      __builtin_mul_overflow(bytes, panels, &bytes) || bytes > (uint64_t)INT64_MAX)
    return UINT64_MAX;
  return bytes;
}

uint64_t moec_pack_tensor_bytes(int32_t layout, int32_t dtype, int64_t experts, int32_t parts,
                                int64_t rows, int64_t cols) {
  uint64_t one = moec_pack_expert_bytes(layout, dtype, parts, rows, cols), bytes;
  if (one == UINT64_MAX || experts < 0 || __builtin_mul_overflow(one, (uint64_t)experts, &bytes) ||
      bytes > (uint64_t)INT64_MAX - 4095)
    return UINT64_MAX;
  return (bytes + 4095) / 4096 * 4096;
}

uint64_t moec_pack_hash(const void *data, size_t bytes) { return XXH3_64bits(data, bytes); }

/* ---- one value ---- */

static uint32_t half_to_float_bits(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
  if (e == 31)
    return sign | 0x7f800000u | m << 13;
  if (e)
    return sign | (e + 112) << 23 | m << 13;
  if (!m)
    return sign;
  e = 113;
  while (!(m & 1024)) { /* a subnormal: normal in f32 */
    m <<= 1;
    --e;
  }
  return sign | e << 23 | (m & 1023) << 13;
}

static uint16_t float_bits_to_bf16(uint32_t b) {
  if ((b & 0x7fffffffu) > 0x7f800000u)
    return (uint16_t)(b >> 16 | 0x40); /* NaN stays NaN */
  return (uint16_t)((b + 0x7fffu + (b >> 16 & 1)) >> 16);
}

static uint32_t read_bits(const void *data, int32_t dtype, int64_t i) {
  if (dtype == MOEC_DT_F32)
    return ((const uint32_t *)data)[i];
  uint16_t h = ((const uint16_t *)data)[i];
  return dtype == MOEC_DT_BF16 ? (uint32_t)h << 16 : half_to_float_bits(h);
}

/* The value's bits in the packed format; *bad is set if it is not finite there. */
static uint32_t convert(const moec_pack_source *s, int64_t row, int64_t col, int32_t to,
                        bool *bad) {
  uint32_t b = read_bits(s->data, s->dtype, row * s->row_stride + col * s->col_stride);
  if (to == MOEC_DT_F32) {
    *bad |= (b & 0x7f800000u) == 0x7f800000u;
    return b;
  }
  uint16_t h = s->dtype == MOEC_DT_BF16 ? (uint16_t)(b >> 16) : float_bits_to_bf16(b);
  *bad |= (h & 0x7f80u) == 0x7f80u;
  return h;
}

/* ---- the plain path: any strides, any edge ---- */

typedef struct {
  uint32_t *panel;        /* of the lanes' panel */
  int32_t lane;           /* first lane */
  int64_t row, row_count; /* source rows of these lanes; fewer than `lanes` at the end */
  int32_t lanes;
} strip;

/* Units u0 ... u1-1 of a strip; rows and k that do not exist become zero. */
static bool pack_plain(const strip *t, int32_t to, int64_t cols, int64_t u0, int64_t u1,
                       const moec_pack_source *s) {
  bool bad = false;
  for (int64_t u = u0; u < u1; ++u)
    for (int32_t l = 0; l < t->lanes; ++l) {
      uint32_t unit = 0;
      if (l < t->row_count) {
        if (to == MOEC_DT_F32) {
          if (u < cols)
            unit = convert(s, t->row + l, u, to, &bad);
        } else {
          if (2 * u < cols)
            unit = convert(s, t->row + l, 2 * u, to, &bad);
          if (2 * u + 1 < cols)
            unit |= convert(s, t->row + l, 2 * u + 1, to, &bad) << 16;
        }
      }
      t->panel[u * 32 + t->lane + l] = unit;
    }
  return bad;
}

/* ---- the fast path: AVX2 ---- */

AVX2 static inline __m256i nonfinite_f32(__m256i v) {
  const __m256i e = _mm256_set1_epi32(0x7f800000);
  return _mm256_cmpeq_epi32(_mm256_and_si256(v, e), e);
}
AVX2 static inline __m256i nonfinite_bf16(__m256i v) {
  const __m256i e = _mm256_set1_epi16(0x7f80);
  return _mm256_cmpeq_epi16(_mm256_and_si256(v, e), e);
}

/* 8 values as f32 bits. */
AVX2 static inline __m256i load_f32(const void *data, int32_t dtype, int64_t i) {
  if (dtype == MOEC_DT_F32)
    return _mm256_loadu_si256((const __m256i *)((const uint32_t *)data + i));
  __m128i h = _mm_loadu_si128((const __m128i *)((const uint16_t *)data + i));
  if (dtype == MOEC_DT_BF16)
    return _mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
  return _mm256_castps_si256(_mm256_cvtph_ps(h));
}

/* f32 bits rounded to bf16, in the low half of each 32-bit element. NaN is found by the caller
   before: rounding may turn it into a number. */
AVX2 static inline __m256i round_bf16(__m256i v) {
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(v, 16), _mm256_set1_epi32(1));
  v = _mm256_add_epi32(v, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  return _mm256_srli_epi32(v, 16);
}

/* 8 units of one row, from column i (f32) or 2i (bf16). */
AVX2 static inline __m256i load_units(const void *data, int32_t from, int32_t to, int64_t i,
                                      __m256i *bad) {
  if (to == MOEC_DT_F32) {
    __m256i v = load_f32(data, from, i);
    *bad = _mm256_or_si256(*bad, nonfinite_f32(v));
    return v;
  }
  __m256i v;
  if (from == MOEC_DT_BF16) {
    v = _mm256_loadu_si256((const __m256i *)((const uint16_t *)data + 2 * i));
  } else {
    __m256i a = load_f32(data, from, 2 * i), b = load_f32(data, from, 2 * i + 8);
    *bad = _mm256_or_si256(*bad, _mm256_or_si256(nonfinite_f32(a), nonfinite_f32(b)));
    v = _mm256_permute4x64_epi64(_mm256_packus_epi32(round_bf16(a), round_bf16(b)), 0xd8);
  }
  *bad = _mm256_or_si256(*bad, nonfinite_bf16(v));
  return v;
}

AVX2 static inline void transpose8(__m256i r[8]) {
  __m256i a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    a[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
  }
}

/* Units of a row read before the next rows: several neighbouring cache lines, and both the lines of
   8 rows and the panel rows written stay in the first-level cache. */
enum { BLOCK = 64 };

/* Rows are contiguous (col_stride 1) and the strip is full: units 0 ... units-1, a multiple of 8.
 */
AVX2 static inline __attribute__((always_inline)) bool transpose_strip(const strip *t, int32_t from,
                                                                       int32_t to, int64_t units,
                                                                       const moec_pack_source *s) {
  __m256i bad = _mm256_setzero_si256();
  const int64_t size = from == MOEC_DT_F32 ? 4 : 2;
  for (int64_t u = 0; u < units; u += BLOCK)
    for (int32_t g = 0; g < t->lanes; g += 8)
      for (int64_t v = u; v < units && v < u + BLOCK; v += 8) {
        __m256i r[8];
        for (int l = 0; l < 8; ++l)
          r[l] = load_units((const char *)s->data + (t->row + g + l) * s->row_stride * size, from,
                            to, v, &bad);
        transpose8(r);
        for (int i = 0; i < 8; ++i)
          _mm256_storeu_si256((__m256i *)(t->panel + (v + i) * 32 + t->lane + g), r[i]);
      }
  return !_mm256_testz_si256(bad, bad);
}

/* The lanes are contiguous (row_stride 1: a transposed source) and the strip is full. */
AVX2 static inline __attribute__((always_inline)) bool
copy_strip(const strip *t, int32_t from, int32_t to, int64_t units, const moec_pack_source *s) {
  __m256i bad = _mm256_setzero_si256();
  for (int64_t u = 0; u < units; ++u)
    for (int32_t g = 0; g < t->lanes; g += 8) {
      __m256i v;
      if (to == MOEC_DT_F32) {
        v = load_f32(s->data, from, u * s->col_stride + t->row + g);
        bad = _mm256_or_si256(bad, nonfinite_f32(v));
      } else {
        __m256i a = load_f32(s->data, from, 2 * u * s->col_stride + t->row + g);
        __m256i b = load_f32(s->data, from, (2 * u + 1) * s->col_stride + t->row + g);
        bad = _mm256_or_si256(bad, _mm256_or_si256(nonfinite_f32(a), nonfinite_f32(b)));
        v = _mm256_or_si256(round_bf16(a), _mm256_slli_epi32(round_bf16(b), 16));
        bad = _mm256_or_si256(bad, nonfinite_bf16(v));
      }
      _mm256_storeu_si256((__m256i *)(t->panel + u * 32 + t->lane + g), v);
    }
  return !_mm256_testz_si256(bad, bad);
}

/* One copy of the loops per pair of types. */
#define EACH_PAIR(function)                                                                        \
  switch (s->dtype << 8 | to) {                                                                    \
  case MOEC_DT_F32 << 8 | MOEC_DT_F32:                                                             \
    return function(t, MOEC_DT_F32, MOEC_DT_F32, units, s);                                        \
  case MOEC_DT_F32 << 8 | MOEC_DT_BF16:                                                            \
    return function(t, MOEC_DT_F32, MOEC_DT_BF16, units, s);                                       \
  case MOEC_DT_BF16 << 8 | MOEC_DT_F32:                                                            \
    return function(t, MOEC_DT_BF16, MOEC_DT_F32, units, s);                                       \
  case MOEC_DT_BF16 << 8 | MOEC_DT_BF16:                                                           \
    return function(t, MOEC_DT_BF16, MOEC_DT_BF16, units, s);                                      \
  case MOEC_DT_F16 << 8 | MOEC_DT_F32:                                                             \
    return function(t, MOEC_DT_F16, MOEC_DT_F32, units, s);                                        \
  default:                                                                                         \
    return function(t, MOEC_DT_F16, MOEC_DT_BF16, units, s);                                       \
  }
AVX2 static bool transpose_any(const strip *t, int32_t to, int64_t units,
                               const moec_pack_source *s){EACH_PAIR(transpose_strip)} AVX2
    static bool copy_any(const strip *t, int32_t to, int64_t units,
                         const moec_pack_source *s){EACH_PAIR(copy_strip)}

/* ---- matrices ---- */

int64_t moec_pack_scan(int32_t dtype, int64_t rows, int64_t cols, const moec_pack_source *s) {
  for (int64_t r = 0; r < rows; ++r) {
    bool bad = false;
    /* Rounding a finite value overflows only from f32 to bf16 and above 0x7f7f7fff; the comparison
       with `limit` covers that and every NaN and infinity. */
    if (s->col_stride == 1 && s->dtype == MOEC_DT_F32) {
      const uint32_t *p = (const uint32_t *)s->data + r * s->row_stride;
      const uint32_t limit = dtype == MOEC_DT_F32 ? 0x7f7fffffu : 0x7f7f7fffu;
      uint32_t any = 0;
      for (int64_t c = 0; c < cols; ++c)
        any |= (p[c] & 0x7fffffffu) > limit;
      bad = any;
    } else if (s->col_stride == 1) {
      const uint16_t *p = (const uint16_t *)s->data + r * s->row_stride;
      const uint16_t limit = s->dtype == MOEC_DT_BF16 ? 0x7f7f : 0x7bff;
      uint16_t any = 0;
      for (int64_t c = 0; c < cols; ++c)
        any = (uint16_t)(any | ((p[c] & 0x7fff) > limit));
      bad = any;
    } else {
      for (int64_t c = 0; c < cols; ++c)
        (void)convert(s, r, c, dtype, &bad);
    }
    for (int64_t c = 0; bad && c < cols; ++c) {
      bool here = false;
      (void)convert(s, r, c, dtype, &here);
      if (here)
        return r * cols + c;
    }
  }
  return -1;
}

int64_t moec_pack(int32_t layout, void *expert, int32_t dtype, int32_t parts, int32_t part,
                  int64_t rows, int64_t cols, int64_t row0, int64_t row1,
                  const moec_pack_source *s) {
  const int64_t lanes = moec_pack_panel_rows(parts);
  const int64_t per_unit = dtype == MOEC_DT_F32 ? 1 : 2;
  const int64_t panel_units = padded(layout, cols) / per_unit;
  const bool fast = moec_has_avx2() && (s->col_stride == 1 || s->row_stride == 1);
  bool bad = false;
  for (int64_t row = row0; row < row1;) {
    const int64_t panel = row / lanes, lane = row % lanes;
    int64_t n = lanes - lane; /* lanes of this strip; those beyond the last row are padding */
    if (n > row1 - row && row1 != rows)
      n = row1 - row;
    strip t = {(uint32_t *)expert + panel * panel_units * 32, (int32_t)(part * 16 + lane), row,
               row1 - row < n ? row1 - row : n, (int32_t)n};
    int64_t done = 0; /* units */
    if (fast && t.row_count == lanes) {
      done = cols / per_unit;
      if (s->col_stride == 1) {
        done = done / 8 * 8;
        bad |= transpose_any(&t, dtype, done, s);
      } else {
        bad |= copy_any(&t, dtype, done, s);
      }
    }
    bad |= pack_plain(&t, dtype, cols, done, panel_units, s);
    row += n;
  }
  if (!bad)
    return -1;
  moec_pack_source rest = *s;
  rest.data = (const char *)s->data + row0 * s->row_stride * (s->dtype == MOEC_DT_F32 ? 4 : 2);
  return row0 * cols + moec_pack_scan(dtype, row1 - row0, cols, &rest);
}

static uint32_t packed_bits(const void *expert, int32_t dtype, int64_t kp, int64_t panel,
                            int64_t lane, int64_t k) {
  if (dtype == MOEC_DT_F32)
    return ((const uint32_t *)expert)[(panel * kp + k) * 32 + lane];
  return (uint32_t)((const uint16_t *)expert)[panel * kp * 32 + k / 2 * 64 + lane * 2 + k % 2]
         << 16;
}

void moec_unpack_strided(int32_t layout, const void *expert, int32_t dtype, int32_t parts,
                         int32_t part, int64_t rows, int64_t cols, void *out, int32_t to,
                         int64_t row_stride, int64_t col_stride) {
  const int64_t lanes = moec_pack_panel_rows(parts), kp = padded(layout, cols);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t panel = r / lanes, lane = r % lanes + part * 16;
    for (int64_t k = 0; k < cols; ++k) {
      const uint32_t b = packed_bits(expert, dtype, kp, panel, lane, k);
      const int64_t at = r * row_stride + k * col_stride;
      if (to == MOEC_DT_F32)
        ((uint32_t *)out)[at] = b;
      else
        ((uint16_t *)out)[at] = float_bits_to_bf16(b);
    }
  }
}

void moec_unpack(int32_t layout, const void *expert, int32_t dtype, int32_t parts, int32_t part,
                 int64_t rows, int64_t cols, float *out) {
  moec_unpack_strided(layout, expert, dtype, parts, part, rows, cols, out, MOEC_DT_F32, cols, 1);
}
