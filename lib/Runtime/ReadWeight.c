#include "Internal.h"

#include "moe/Runtime/Pack.h"

static int check_layer(const moec_model *model, int32_t layer, const char *where,
                       moec_error *error) {
  if (!model)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: model: expected a pointer, but got NULL", where);
  if (layer < 0 || layer >= model->layer_count)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: layer: expected 0 to %d, but got %d", where,
                     model->layer_count - 1, layer);
  return 0;
}

/* The packed matrix that `role` is, or is half of; -1: none. *part: -1 all of it, else 0 | 1. */
static int32_t find_matrix(const moec_layer_code *c, const char *role, int32_t *part) {
  const bool half = !strcmp(role, "gate") || !strcmp(role, "up");
  for (int32_t i = 0; i < c->weight_count; ++i) {
    const moec_weight_desc *d = &c->weights[i];
    const bool matrix =
        !strcmp(d->role, "gate_up") || !strcmp(d->role, "up") || !strcmp(d->role, "down");
    if (matrix && !strcmp(d->role, role)) {
      *part = -1;
      return i;
    }
    if (half && !strcmp(d->role, "gate_up")) {
      *part = role[0] == 'u';
      return i;
    }
  }
  return -1;
}

int moec_get_weight(const moec_model *model, int32_t layer, const char *role, DLTensor *dst,
                    moec_error *error) {
  static const char w[] = "moec_get_weight";
  int r = check_layer(model, layer, w, error);
  if (r)
    return r;
  if (!role || !dst || !dst->data || !dst->shape)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", w,
                     role ? "dst" : "role");
  const moec_layer_state *s = &model->layers[layer];
  const moec_layer_code *c = s->desc->code;
  const char *name = s->desc->name;
  int32_t part = -1;
  const int32_t at = find_matrix(c, role, &part);
  if (at < 0)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s: role: expected gate_up, gate, up or down, but got \"%.64s\"", w, name,
                     role);
  r = moec_check_device(dst, moec_host, w, "dst", error);
  if (r)
    return r;
  const moec_weight_desc *d = &c->weights[at];
  const int32_t parts = (int32_t)d->parts;
  const int64_t rows = d->rows * (part < 0 ? parts : 1);
  const int32_t lead = dst->ndim - 2; /* 1: [E, rows, cols]; 0: [rows, cols] of the one expert */
  if ((lead != 1 && (lead || d->experts != 1)) || (lead && dst->shape[0] != d->experts) ||
      dst->shape[lead] != rows || dst->shape[lead + 1] != d->cols)
    return moec_fail(error, MOEC_E_SHAPE,
                     "%s: %s: %s: expected [%lld, %lld, %lld], but got another shape of rank %d", w,
                     name, role, (long long)d->experts, (long long)rows, (long long)d->cols,
                     dst->ndim);
  const int32_t to = moec_dtype(dst->dtype);
  if (to != MOEC_DT_F32 && to != MOEC_DT_BF16) {
    char type[24];
    moec_dtype_text(dst->dtype, type);
    return moec_fail(error, MOEC_E_DTYPE, "%s: %s: %s: expected f32 or bf16, but got %s", w, name,
                     role, type);
  }
  const int64_t size = moec_dtype_bytes(to);
  char *data = (char *)dst->data + dst->byte_offset;
  if ((uintptr_t)data % (uintptr_t)size)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s: %s: expected an address aligned to %lld bytes, but got %p", w, name,
                     role, (long long)size, (void *)data);
  const unsigned char *have = s->have[at];
  for (int64_t i = 0; i < d->experts * parts; ++i)
    if (!s->weights[at] || (have && !have[i] && (part < 0 || i % parts == part)))
      return moec_fail(error, MOEC_E_WEIGHTS,
                       "%s: %s: %s: expected weights that were set, but got none for expert %lld",
                       w, name, role, (long long)(i / parts));
  int64_t stride[3] = {rows * d->cols, d->cols, 1};
  for (int32_t i = 0; i < dst->ndim && dst->strides; ++i)
    stride[i + 1 - lead] = dst->strides[i];

  const int32_t format = moec_format_dtype(d->format);
  const uint64_t step = moec_pack_expert_bytes(MOEC_PANEL32, format, parts, d->rows, d->cols);
  moec_model *m = (moec_model *)(uintptr_t)model; /* borrowing changes nothing of it */
  for (int64_t e = 0; e < d->experts; ++e) {
    const char *place = (const char *)s->weights[at] + (uint64_t)e * step;
    void *piece;
    if ((r = m->target->borrow(m, place, step, &piece, w, error)))
      return r;
    for (int32_t p = 0; p < parts; ++p) {
      if (part >= 0 && p != part)
        continue;
      const int64_t row0 = part < 0 ? p * d->rows : 0;
      moec_unpack_strided(MOEC_PANEL32, piece, format, parts, p, d->rows, d->cols,
                          data + (e * stride[0] + row0 * stride[1]) * size, to, stride[1],
                          stride[2]);
    }
    if ((r = m->target->give_back(m, place, step, piece, false, w, error)))
      return r;
  }
  return moec_succeed(error);
}

int moec_release_weights(moec_model *model, int32_t layer, moec_error *error) {
  static const char w[] = "moec_release_weights";
  int r = check_layer(model, layer, w, error);
  if (r)
    return r;
  moec_layer_state *s = &model->layers[layer];
  const moec_layer_code *c = s->desc->code;
  if (c->weight_count && !s->have[0])
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: %s: expected a model opened with MOEC_NONE, but got one with files", w,
                     s->desc->name);
  model->target->drop(model, s);
  s->missing = 0;
  for (int32_t i = 0; i < c->weight_count; ++i) {
    s->weights[i] = NULL;
    s->missing += moec_forget_weight(s, i);
  }
  return moec_succeed(error);
}
