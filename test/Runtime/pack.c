/* The packer against the layout's formula, written out here once more; unpack is its inverse. */
#include "moe/Runtime/Pack.h"

#ifdef PLAIN /* the path of a machine without AVX2 */
#include "../../lib/Runtime/Pack.c"
bool moec_has_avx2(void) { return false; }
#endif
#include "helpers.h"

static uint16_t half_round(float f) { /* exact for the values used here */
  static const float table[] = {
      0.0f, 1.0f, -0.5f, 65504.0f, 6.103515625e-05f, 5.9604644775390625e-08f};
  static const uint16_t codes[] = {0, 0x3c00, 0xb800, 0x7bff, 0x0400, 0x0001};
  for (int i = 0; i < 6; ++i)
    if (table[i] == f)
      return codes[i];
  return 0x7e00;
}

static void put(void *data, int dtype, int64_t i, float v) {
  if (dtype == MOEC_DT_F32)
    ((float *)data)[i] = v;
  else
    ((uint16_t *)data)[i] = dtype == MOEC_DT_BF16 ? bf16_round(v) : half_round(v);
}

static float value(int dtype, int64_t i) {
  static const float halves[] = {
      0.0f, 1.0f, -0.5f, 65504.0f, 6.103515625e-05f, 5.9604644775390625e-08f};
  if (dtype == MOEC_DT_F16)
    return halves[(i * 7 + i / 5) % 6];
  float v = uniform();
  return dtype == MOEC_DT_BF16 ? bf16_value(bf16_round(v)) : v;
}

/* The bits at (part, row, k) of an expert, by the words of Pack.h. */
static uint32_t bits_at(const char *expert, int to, int parts, int part, int64_t cols, int64_t row,
                        int64_t k) {
  int64_t kp = (cols + 31) / 32 * 32, panel, lane;
  if (parts == 2) {
    panel = row / 16;
    lane = row % 16 + 16 * part;
  } else {
    panel = row / 32;
    lane = row % 32;
  }
  uint32_t b = 0;
  if (to == MOEC_DT_F32)
    memcpy(&b, expert + panel * kp * 32 * 4 + (k * 32 + lane) * 4, 4);
  else
    memcpy(&b, expert + panel * kp * 32 * 2 + ((k / 2) * 64 + lane * 2 + k % 2) * 2, 2);
  return b;
}

static uint32_t bits_of(float v, int to) {
  uint32_t b;
  if (to == MOEC_DT_BF16)
    return bf16_round(v);
  memcpy(&b, &v, 4);
  return b;
}

/* form: 0 rows contiguous, 1 transposed, 2 no unit stride, 3 rows backwards, 4 row stride > cols */
static void matrix(int from, int to, int parts, int64_t rows, int64_t cols, int form) {
  int64_t rs = cols, cs = 1, first = 0;
  if (form == 1)
    rs = 1, cs = rows;
  if (form == 2)
    rs = 2 * cols + 1, cs = 2;
  if (form == 3)
    rs = -cols, first = (rows - 1) * cols;
  if (form == 4)
    rs = cols + 5;
  size_t n = (size_t)((rows + 1) * (2 * cols + 6));
  char *data = (char *)malloc(n * 4 * (size_t)parts);
  float *values = (float *)malloc((size_t)(parts * rows * cols) * 4);
  float *back = (float *)malloc((size_t)(rows * cols) * 4);
  memset(data, 0xff, n * 4 * (size_t)parts); /* NaN wherever nothing belongs to the matrix */
  size_t bytes = moec_pack_expert_bytes(MOEC_PANEL32, to, parts, rows, cols);
  char *packed = (char *)malloc(bytes + 64);
  memset(packed, 0x5a, bytes + 64);
  moec_pack_source source[2];
  for (int p = 0; p < parts; ++p) {
    char *base = data + n * 4 * (size_t)p;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c) {
        float v = values[(p * rows + r) * cols + c] = value(from, r * cols + c);
        put(base, from, first + r * rs + c * cs, v);
      }
    source[p].data = base + first * (from == MOEC_DT_F32 ? 4 : 2);
    source[p].dtype = from;
    source[p].row_stride = rs;
    source[p].col_stride = cs;
    CHECK(moec_pack_scan(to, rows, cols, &source[p]) == -1);
    CHECK(moec_pack(MOEC_PANEL32, packed, to, parts, p, rows, cols, 0, rows, &source[p]) == -1);
  }
  int64_t per = moec_pack_panel_rows(parts), kp = (cols + 31) / 32 * 32;
  int64_t wrong = 0;
  for (int p = 0; p < parts; ++p) {
    for (int64_t r = 0; r < (rows + per - 1) / per * per; ++r)
      for (int64_t k = 0; k < kp; ++k) {
        uint32_t want = r < rows && k < cols ? bits_of(values[(p * rows + r) * cols + k], to) : 0;
        wrong += bits_at(packed, to, parts, p, cols, r, k) != want;
      }
    moec_unpack(MOEC_PANEL32, packed, to, parts, p, rows, cols, back);
    for (int64_t i = 0; i < rows * cols; ++i) {
      float want = values[p * rows * cols + i];
      wrong += back[i] != (to == MOEC_DT_BF16 ? bf16_value(bf16_round(want)) : want);
    }
  }
  if (wrong)
    fprintf(stderr, "from %d to %d parts %d rows %d cols %d form %d: %d wrong\n", from, to, parts,
            (int)rows, (int)cols, form, (int)wrong);
  CHECK(!wrong);
  for (int i = 0; i < 64; ++i)
    CHECK(packed[bytes + (size_t)i] == 0x5a); /* nothing behind the expert */

  /* The same in pieces: by whole panels, then one row alone. */
  char *pieces = (char *)malloc(bytes);
  memset(pieces, 0x33, bytes);
  for (int p = 0; p < parts; ++p)
    for (int64_t r = 0; r < rows; r += per)
      CHECK(moec_pack(MOEC_PANEL32, pieces, to, parts, p, rows, cols, r,
                      r + per < rows ? r + per : rows, &source[p]) == -1);
  CHECK(!memcmp(pieces, packed, bytes));
  int64_t row = rows / 2;
  put((char *)(uintptr_t)source[0].data, from, row * rs, 1.0f);
  CHECK(moec_pack(MOEC_PANEL32, pieces, to, parts, 0, rows, cols, row, row + 1, &source[0]) == -1);
  CHECK(bits_at(pieces, to, parts, 0, cols, row, 0) == bits_of(1.0f, to));
  int64_t changed = 0;
  for (size_t i = 0; i < bytes; i += 2)
    changed += memcmp(pieces + i, packed + i, 2) != 0;
  CHECK(changed <= 2); /* one element */

  /* NaN and infinity are found, and where. */
  if (from != MOEC_DT_F16) {
    int64_t r = rows - 1, c = cols - 1;
    put((char *)(uintptr_t)source[0].data, from, r * rs + c * cs, INFINITY);
    CHECK(moec_pack_scan(to, rows, cols, &source[0]) == r * cols + c);
    CHECK(moec_pack(MOEC_PANEL32, pieces, to, parts, 0, rows, cols, 0, rows, &source[0]) ==
          r * cols + c);
    uint32_t nan = 0x7fffffff; /* rounding carries this one into the sign */
    if (from == MOEC_DT_F32)
      memcpy((char *)(uintptr_t)source[0].data, &nan, 4);
    if (from == MOEC_DT_BF16) {
      uint16_t h = 0x7fff;
      memcpy((char *)(uintptr_t)source[0].data, &h, 2);
    }
    CHECK(moec_pack_scan(to, rows, cols, &source[0]) == 0);
    CHECK(moec_pack(MOEC_PANEL32, pieces, to, parts, 0, rows, cols, 0, rows, &source[0]) == 0);
  }
  free(pieces);
  free(packed);
  free(back);
  free(values);
  free(data);
}

/* A vector of one expert: 32 lanes beside each panel of the matrix with the same rows. */
static void vector(int from, int parts, int64_t rows, int64_t stride) {
  const int64_t per = moec_pack_panel_rows(parts), panels = (rows + per - 1) / per;
  float data[2 * 96], want[2][96], packed[6 * 32 + 1], back[96];
  CHECK(moec_pack_expert_bytes(MOEC_VECTOR32, MOEC_DT_F32, parts, rows, 1) ==
        (uint64_t)panels * 128);
  for (int i = 0; i < 6 * 32 + 1; ++i)
    packed[i] = -77;
  moec_pack_source s = {data, from, stride, 1};
  for (int p = 0; p < parts; ++p) {
    for (int64_t r = 0; r < rows; ++r) {
      want[p][r] = value(from, r + p);
      put(data, from, r * stride, want[p][r]);
    }
    CHECK(moec_pack(MOEC_VECTOR32, packed, MOEC_DT_F32, parts, p, rows, 1, 0, rows, &s) == -1);
    moec_unpack(MOEC_VECTOR32, packed, MOEC_DT_F32, parts, p, rows, 1, back);
    CHECK(!memcmp(back, want[p], (size_t)rows * sizeof(float)));
  }
  for (int p = 0; p < parts; ++p)
    for (int64_t r = 0; r < panels * per; ++r)
      CHECK(packed[r / per * 32 + 16 * p + r % per] == (r < rows ? want[p][r] : 0));
  CHECK(packed[panels * 32] == -77);
  if (from != MOEC_DT_F16) {
    put(data, from, (rows - 1) * stride, INFINITY);
    CHECK(moec_pack(MOEC_VECTOR32, packed, MOEC_DT_F32, parts, 0, rows, 1, 0, rows, &s) ==
          rows - 1);
  }
}

int main(void) {
  static const int64_t rows[] = {1, 16, 23, 32, 33, 96}, cols[] = {1, 7, 32, 40, 130};
  for (int from = 0; from < 3; ++from)
    for (int to = 0; to < 2; ++to)
      for (int parts = 1; parts <= 2; ++parts)
        for (int r = 0; r < 6; ++r)
          for (int c = 0; c < 5; ++c)
            for (int form = 0; form < 5; ++form)
              matrix(from, to, parts, rows[r], cols[c], form);

  /* A value that is finite in f32 but not in bf16. */
  float big[32];
  for (int i = 0; i < 32; ++i)
    big[i] = 1;
  big[5] = 3.4e38f;
  moec_pack_source s = {big, MOEC_DT_F32, 32, 1};
  CHECK(moec_pack_scan(MOEC_DT_F32, 1, 32, &s) == -1);
  CHECK(moec_pack_scan(MOEC_DT_BF16, 1, 32, &s) == 5);
  big[5] = 3.3895e38f; /* rounds to the largest bf16 */
  CHECK(moec_pack_scan(MOEC_DT_BF16, 1, 32, &s) == -1);

  /* In f16, and in a range of rows: the index is that of the whole matrix. */
  static uint16_t half[70 * 40];
  s.data = half;
  s.dtype = MOEC_DT_F16;
  s.row_stride = 40;
  static char expert[5 * 64 * 32 * 4];
  CHECK(moec_pack_scan(MOEC_DT_BF16, 70, 40, &s) == -1);
  half[66 * 40 + 3] = 0xfc00; /* -infinity */
  CHECK(moec_pack_scan(MOEC_DT_BF16, 70, 40, &s) == 66 * 40 + 3);
  CHECK(moec_pack(MOEC_PANEL32, expert, MOEC_DT_F32, 1, 0, 70, 40, 64, 70, &s) == 66 * 40 + 3);
  CHECK(moec_pack(MOEC_PANEL32, expert, MOEC_DT_F32, 1, 0, 70, 40, 0, 64, &s) == -1);

  /* Sizes by hand: 70 rows in parts of 16 are 5 panels of 64 x 32; Mixtral's gate_up. */
  CHECK(moec_pack_expert_bytes(MOEC_PANEL32, MOEC_DT_BF16, 2, 70, 40) == 5 * 64 * 32 * 2);
  CHECK(moec_pack_expert_bytes(MOEC_PANEL32, MOEC_DT_F32, 1, 33, 33) == 2 * 64 * 32 * 4);
  CHECK(moec_pack_tensor_bytes(MOEC_PANEL32, MOEC_DT_F32, 3, 1, 1, 1) == 3 * 32 * 32 * 4);
  CHECK(moec_pack_tensor_bytes(MOEC_PANEL32, MOEC_DT_BF16, 1, 1, 1, 1) == 4096);
  CHECK(moec_pack_tensor_bytes(MOEC_PANEL32, MOEC_DT_BF16, 8, 2, 14336, 4096) ==
        (uint64_t)1879048192);
  CHECK(moec_pack_tensor_bytes(MOEC_PANEL32, MOEC_DT_F32, (int64_t)1 << 40, 1, (int64_t)1 << 40,
                               1) == UINT64_MAX);
  CHECK(moec_pack_tensor_bytes(MOEC_VECTOR32, MOEC_DT_F32, 3, 2, 33, 1) == 4096);
  CHECK(moec_pack_expert_bytes(MOEC_VECTOR32, MOEC_DT_F32, 2, 33, 1) == 3 * 32 * 4);
  CHECK(moec_pack_layout("panel32-1") == MOEC_PANEL32);
  CHECK(moec_pack_layout("vector32-1") == MOEC_VECTOR32);
  CHECK(moec_pack_layout("rows-1") == -1);
  for (int from = 0; from < 3; ++from)
    for (int parts = 1; parts <= 2; ++parts)
      for (int r = 0; r < 6; ++r)
        for (int64_t stride = 1; stride <= 2; ++stride)
          vector(from, parts, rows[r], stride);
  /* XXH3 of nothing, a published constant. */
  CHECK(moec_pack_hash("", 0) == 0x2d06800538d394c2u);
  return finish("pack");
}
