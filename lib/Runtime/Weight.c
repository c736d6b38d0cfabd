#include "Internal.h"

#include "moe/Runtime/Pack.h"

#include <stdio.h>

/* What a role of the user means for a layer: which packed tensor and which part of it. */
typedef struct {
  int32_t weight; /* index in the layer's table */
  int32_t part;   /* 0 | 1, -1: both parts, one below the other */
  bool by_row;    /* the router: "expert" is a row of its one matrix */
} target;

/* The names of the two parts of a weight that has them. */
static const struct {
  const char *role, *parts[2];
} part_names[] = {
    {"gate_up", {"gate", "up"}},
    {"gate_up_bias", {"gate_bias", "up_bias"}},
    {"shared_gate_up", {"shared_gate_proj", "shared_up_proj"}},
};
enum { PART_NAMES = sizeof part_names / sizeof *part_names };

static bool find_role(const moec_layer_code *c, const char *role, target *t) {
  for (int32_t i = 0; i < c->weight_count; ++i) {
    const moec_weight_desc *w = &c->weights[i];
    t->weight = i;
    t->by_row = false;
    if (!strcmp(role, w->role)) {
      t->part = w->parts == 2 ? -1 : 0;
      t->by_row = !strcmp(role, "router");
      return true;
    }
    for (int n = 0; n < PART_NAMES; ++n)
      for (int32_t p = 0; w->parts == 2 && p < 2; ++p)
        if (!strcmp(w->role, part_names[n].role) && !strcmp(role, part_names[n].parts[p])) {
          t->part = p;
          return true;
        }
  }
  return false;
}

static void roles_text(const moec_layer_code *c, char *text, size_t size) {
  size_t n = 0;
  text[0] = 0;
  for (int32_t i = 0; i < c->weight_count && n < size; ++i) {
    const moec_weight_desc *w = &c->weights[i];
    n += (size_t)snprintf(text + n, size - n, "%s%s", i ? ", " : "", w->role);
    for (int k = 0; k < PART_NAMES && n < size; ++k)
      if (w->parts == 2 && !strcmp(w->role, part_names[k].role))
        n += (size_t)snprintf(text + n, size - n, ", %s, %s", part_names[k].parts[0],
                              part_names[k].parts[1]);
  }
}

static void shape_text(const DLTensor *t, char *text, size_t size) {
  size_t n = (size_t)snprintf(text, size, "[");
  for (int32_t i = 0; i < t->ndim && n < size; ++i)
    n += (size_t)snprintf(text + n, size - n, "%s%lld", i ? ", " : "", (long long)t->shape[i]);
  if (n < size)
    snprintf(text + n, size - n, "]");
}

int moec_set_weight(moec_model *model, int32_t layer, const char *role, int64_t expert,
                    const DLTensor *src, uint32_t flags, moec_error *error) {
  static const char w[] = "moec_set_weight";
  if (!model || !role || !src)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", w,
                     !model  ? "model"
                     : !role ? "role"
                             : "src");
  if (layer < 0 || layer >= model->layer_count)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: layer: expected 0 to %d, but got %d", w,
                     model->layer_count - 1, layer);
  if (flags & MOEC_BORROW)
    return moec_fail(error, MOEC_E_UNSUPPORTED,
                     "%s: flags: expected 0, but got MOEC_BORROW: borrowed weights (layout rows-1) "
                     "are not built yet",
                     w);
  if (flags)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: flags: expected 0, but got 0x%x", w, flags);
  moec_layer_state *s = &model->layers[layer];
  const moec_layer_code *c = s->desc->code;
  const char *name = s->desc->name;
  char text[320], got[96];
  target t;
  if (!find_role(c, role, &t)) {
    roles_text(c, text, sizeof text);
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: role: expected one of %s, but got \"%.64s\"",
                     w, name, text, role);
  }
  const moec_weight_desc *d = &c->weights[t.weight];
  const int64_t experts = t.by_row ? d->rows : d->experts;
  if (expert < -1 || expert >= experts)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expert: expected -1 to %lld, but got %lld", w,
                     name, (long long)experts - 1, (long long)expert);

  const int32_t layout = moec_pack_layout(d->layout);
  const bool vector = layout == MOEC_VECTOR32;

  /* The matrix of one expert: [rows][cols]; a vector has one column. */
  const int64_t rows = t.by_row ? 1 : d->rows * (t.part < 0 ? 2 : 1), cols = d->cols;
  int r = moec_check_device(src, moec_host, w, "src", error);
  if (r)
    return r;
  if (src->ndim < 1 || src->ndim > 3 || !src->shape)
    return moec_fail(error, MOEC_E_SHAPE, "%s: %s: %s: expected rank 1 to 3, but got rank %d", w,
                     name, role, src->ndim);
  /* Accepted: [rows, cols] or, if it is one row, [cols]; for all experts [E, rows, cols], for the
     router [E, H]; an expert dimension of 1 may stand before or be left out if E = 1. A vector has
     no dimension for its one column: [rows], for all experts [E, rows]. */
  int64_t shape[3] = {experts, rows, cols};
  const int64_t n = expert < 0 ? experts : 1;
  shape[0] = n;
  const int32_t rank = src->ndim;
  int32_t first = -1; /* first of the three dimensions that src has */
  bool fits = false;
  int32_t at[3] = {-1, -1, -1}; /* src's dimension for expert, row, col */
  if (t.by_row) {
    if (rank == 2 && src->shape[0] == n && src->shape[1] == cols) {
      at[0] = 0, at[2] = 1, fits = true;
    } else if (rank == 1 && n == 1 && src->shape[0] == cols) {
      at[2] = 0, fits = true;
    }
  } else {
    const int32_t last = vector ? 2 : 3;
    first = last - rank;
    fits = rank <= last && (vector || rank >= 2 || rows == 1);
    for (int32_t i = 0; i < last && fits; ++i) {
      if (i >= first) {
        at[i] = i - first;
        fits = fits && src->shape[i - first] == shape[i];
      } else {
        fits = fits && shape[i] == 1;
      }
    }
  }
  if (!fits) {
    shape_text(src, got, sizeof got);
    if (t.by_row)
      snprintf(text, sizeof text, "[%lld, %lld]", (long long)n, (long long)cols);
    else if (vector && n == 1)
      snprintf(text, sizeof text, "[%lld]", (long long)rows);
    else if (vector)
      snprintf(text, sizeof text, "[%lld, %lld]", (long long)n, (long long)rows);
    else if (expert < 0)
      snprintf(text, sizeof text, "[%lld, %lld, %lld]", (long long)n, (long long)rows,
               (long long)cols);
    else
      snprintf(text, sizeof text, "[%lld, %lld]", (long long)rows, (long long)cols);
    return moec_fail(error, MOEC_E_SHAPE, "%s: %s: %s: expected %s, but got %s", w, name, role,
                     text, got);
  }
  const int32_t dtype = moec_dtype(src->dtype);
  if (dtype != MOEC_DT_F32 && dtype != MOEC_DT_BF16 && dtype != MOEC_DT_F16) {
    char type[24];
    moec_dtype_text(src->dtype, type);
    return moec_fail(error, MOEC_E_DTYPE, "%s: %s: %s: expected f32, bf16 or f16, but got %s", w,
                     name, role, type);
  }
  const int64_t size = moec_dtype_bytes(dtype);
  const char *data = (const char *)src->data + src->byte_offset;
  if (!src->data)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: %s: expected data, but got NULL", w, name,
                     role);
  if ((uintptr_t)data % (uintptr_t)size)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s: %s: expected an address aligned to %lld bytes, but got %p", w, name,
                     role, (long long)size, (const void *)data);
  int64_t stride[3] = {rows * cols, cols, 1}; /* compact; of a dimension src lacks: not used */
  for (int32_t i = 0; i < 3 && src->strides; ++i)
    if (at[i] >= 0)
      stride[i] = src->strides[at[i]];

  const int32_t format = moec_format_dtype(d->format);
  const int32_t parts = (int32_t)d->parts;
  /* Checked before anything is written: a refused weight leaves the layer as it was. */
  for (int64_t e = 0; e < n; ++e) {
    moec_pack_source m = {data + e * stride[0] * size, dtype, stride[1], stride[2]};
    int64_t bad = moec_pack_scan(format, rows, cols, &m);
    if (bad >= 0)
      return moec_fail(
          error, MOEC_E_NONFINITE,
          "%s: %s: %s: expected finite values in %s, but got NaN or infinity at [%lld, "
          "%lld, %lld] (expert, row, column)",
          w, name, role, d->format, (long long)(expert < 0 ? e : expert), (long long)(bad / cols),
          (long long)(bad % cols));
  }
  const moec_target *device = model->target;
  if ((r = device->arena(model, s, w, error)))
    return r;
  const char *tensor = s->weights[t.weight];
  void *piece;
  if (t.by_row) {
    const int64_t row0 = expert < 0 ? 0 : expert;
    moec_pack_source m = {data - row0 * stride[0] * size, dtype, stride[0], stride[2]};
    if ((r = device->borrow(model, tensor, d->bytes, &piece, w, error)))
      return r;
    (void)moec_pack(layout, piece, format, 1, 0, d->rows, cols, row0, row0 + n, &m);
    if ((r = device->give_back(model, tensor, d->bytes, piece, true, w, error)))
      return r;
    for (int64_t i = row0; s->have[t.weight] && i < row0 + n; ++i) {
      s->missing -= !s->have[t.weight][i];
      s->have[t.weight][i] = 1;
    }
    return moec_succeed(error);
  }
  const uint64_t step = moec_pack_expert_bytes(layout, format, parts, d->rows, cols);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t e = expert < 0 ? i : expert;
    const char *place = tensor + (uint64_t)e * step;
    if ((r = device->borrow(model, place, step, &piece, w, error)))
      return r;
    for (int32_t p = 0; p < parts; ++p) {
      if (t.part >= 0 && p != t.part)
        continue;
      const int64_t skip = t.part < 0 ? p * d->rows * stride[1] : 0;
      moec_pack_source m = {data + (i * stride[0] + skip) * size, dtype, stride[1], stride[2]};
      (void)moec_pack(layout, piece, format, parts, p, d->rows, cols, 0, d->rows, &m);
      if (s->have[t.weight]) {
        s->missing -= !s->have[t.weight][e * parts + p];
        s->have[t.weight][e * parts + p] = 1;
      }
    }
    if ((r = device->give_back(model, place, step, piece, true, w, error)))
      return r;
  }
  return moec_succeed(error);
}
