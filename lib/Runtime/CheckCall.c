/* What a caller hands over: everything is checked before anything is done. */
#include "Call.h"

#include <stdio.h>

static void types_text(uint32_t types, char *text, size_t size) {
  static const char *const names[] = {"f32", "bf16", "f16", "i32", "i64"};
  size_t n = 0;
  text[0] = 0;
  for (int i = 0; i < 5 && n < size; ++i)
    if (types & (1u << i))
      n += (size_t)snprintf(text + n, size - n, "%s%s", n ? " or " : "", names[i]);
}

/* Checks a tensor of shape [d0] (rank 1) or [d0, d1]; -1: any extent. */
static int check(checking *k, const DLTensor *t, const char *name, int32_t rank, int64_t d0,
                 int64_t d1, uint32_t types, bool output, moec_view *v) {
  moec_error *e = k->error;
  const char *w = k->where, *l = k->layer;
  const int64_t want[2] = {d0, d1};
  bool fits = t->ndim == rank && t->shape;
  for (int32_t i = 0; fits && i < rank; ++i)
    fits = want[i] < 0 ? t->shape[i] >= 0 : t->shape[i] == want[i];
  if (!fits) {
    static const char *const letters[2] = {"T", "k"};
    char expected[64], got[96];
    size_t n = 0;
    for (int32_t i = 0; i < rank; ++i)
      n += (size_t)(want[i] < 0 ? snprintf(expected + n, sizeof expected - n, "%s%s", i ? ", " : "",
                                           letters[i])
                                : snprintf(expected + n, sizeof expected - n, "%s%lld",
                                           i ? ", " : "", (long long)want[i]));
    n = 0;
    got[0] = 0;
    for (int32_t i = 0; t->shape && i < t->ndim && i < 4; ++i)
      n += (size_t)snprintf(got + n, sizeof got - n, "%s%lld", i ? ", " : "",
                            (long long)t->shape[i]);
    if (t->shape && t->ndim >= 0 && t->ndim <= 4)
      return moec_fail(e, MOEC_E_SHAPE, "%s: %s: %s: expected [%s], but got [%s]", w, l, name,
                       expected, got);
    return moec_fail(e, MOEC_E_SHAPE, "%s: %s: %s: expected [%s], but got rank %d%s", w, l, name,
                     expected, t->ndim, t->shape ? "" : " without a shape");
  }
  v->dtype = moec_dtype(t->dtype);
  const uint32_t type = v->dtype == MOEC_DT_F32    ? F32
                        : v->dtype == MOEC_DT_BF16 ? BF16
                        : v->dtype == MOEC_DT_F16  ? F16
                        : v->dtype == MOEC_DT_I32  ? I32
                        : v->dtype == MOEC_DT_I64  ? I64
                                                   : 0;
  if (!(type & types)) {
    char expected[48], got[24];
    types_text(types, expected, sizeof expected);
    moec_dtype_text(t->dtype, got);
    return moec_fail(e, MOEC_E_DTYPE, "%s: %s: %s: expected %s, but got %s%s", w, l, name, expected,
                     got, type == F16 ? "; f16 activations are not built yet" : "");
  }
  int r = moec_check_device(t, k->device, w, name, e);
  if (r)
    return r;
  const int64_t rows = rank == 2 ? t->shape[0] : 1, width = t->shape[rank - 1];
  const int64_t size = moec_dtype_bytes(v->dtype);
  v->stride = width;
  v->data = NULL;
  if (!rows || !width)
    return 0;
  if (t->strides) {
    if (width > 1 && t->strides[rank - 1] != 1)
      return moec_fail(
          e, MOEC_E_STRIDE,
          "%s: %s: %s: expected a contiguous last dimension (stride 1), but got stride "
          "%lld",
          w, l, name, (long long)t->strides[rank - 1]);
    if (rows > 1) {
      v->stride = t->strides[0];
      if (v->stride < width)
        return moec_fail(e, MOEC_E_STRIDE,
                         "%s: %s: %s: expected a row stride of at least %lld, but got %lld", w, l,
                         name, (long long)width, (long long)v->stride);
    }
  }
  if (!t->data)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: %s: expected data, but got NULL", w, l, name);
  v->data = (char *)t->data + t->byte_offset;
  if ((uintptr_t)v->data % (uintptr_t)size)
    return moec_fail(e, MOEC_E_ARGUMENT,
                     "%s: %s: %s: expected an address aligned to %lld bytes, but got %p", w, l,
                     name, (long long)size, (void *)v->data);
  uint64_t bytes;
  if (__builtin_mul_overflow((uint64_t)(rows - 1), (uint64_t)v->stride, &bytes) ||
      __builtin_add_overflow(bytes, (uint64_t)width, &bytes) ||
      __builtin_mul_overflow(bytes, (uint64_t)size, &bytes) || bytes > (uint64_t)INT64_MAX)
    return moec_fail(
        e, MOEC_E_SHAPE,
        "%s: %s: %s: expected a tensor that fits in memory, but got %lld rows of stride "
        "%lld",
        w, l, name, (long long)rows, (long long)v->stride);
  region *g = &k->regions[k->count++];
  g->name = name;
  g->begin = (uintptr_t)v->data;
  g->end = g->begin + bytes;
  g->width = (uint64_t)(width * size);
  g->step = (uint64_t)(v->stride * size);
  g->output = output;
  return 0;
}

static bool overlaps(const region *a, const region *b) {
  if (a->begin >= b->end || b->begin >= a->end)
    return false;
  if (a->step != b->step)
    return true; /* rows that interleave without meeting are told apart at equal strides only */
  const uintptr_t low = a->begin < b->begin ? a->begin : b->begin;
  const region *first = a->begin == low ? a : b, *second = first == a ? b : a;
  const uint64_t shift = (second->begin - low) % a->step;
  return shift < first->width || shift + second->width > a->step;
}

static int check_overlaps(const checking *k) {
  for (int32_t i = 0; i < k->count; ++i)
    for (int32_t j = 0; j < k->count; ++j)
      if (i != j && k->regions[i].output && (j > i || !k->regions[j].output) &&
          overlaps(&k->regions[i], &k->regions[j]))
        return moec_fail(k->error, MOEC_E_OVERLAP,
                         "%s: %s: %s: expected memory of its own, but got memory that %s uses too",
                         k->where, k->layer, k->regions[i].name, k->regions[j].name);
  return 0;
}

static int refuse(const checking *k, const char *what, const char *why) {
  return moec_fail(k->error, MOEC_E_ARGUMENT, "%s: %s: %s: expected NULL, but got a tensor: %s",
                   k->where, k->layer, what, why);
}

int moec_check_call(checking *k, const moec_layer_code *code, const moec_call *call, tensors *t) {
  moec_error *e = k->error;
  const char *w = k->where, *l = k->layer;
  if (call->flags & ~(uint32_t)(MOEC_ROUTED_ONLY | MOEC_ACCUMULATE | MOEC_SKIP_FOREIGN))
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: flags: expected bits 0x7, but got 0x%x", w, l,
                     call->flags);
  if (call->stream && k->device.device_type == kDLCPU)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: stream: expected NULL on the CPU, but got %p", w,
                     l, call->stream);
  static const char given[] = "with experts given the router is skipped";
  if (!call->x)
    return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: x: expected a tensor, but got NULL", w, l);
  static const char unneeded[] = "the layer does not need it";
  const bool reads_router_x = (code->needs & MOEC_ROUTER_X) && !call->experts;
  if (call->router_x && !reads_router_x)
    return refuse(k, "router_x", call->experts ? given : unneeded);
  if (!call->router_x && reads_router_x)
    return moec_fail(e, MOEC_E_NEEDS,
                     "%s: %s: router_x: expected a tensor, but got NULL: the router of this layer "
                     "does not read x",
                     w, l);
  if (call->token_ids)
    return refuse(k, "token_ids", unneeded);
  if (call->token_types)
    return refuse(k, "token_types", unneeded);
  if (call->sequences)
    return refuse(k, "sequences", unneeded);
  if (call->state)
    return refuse(k, "state", unneeded);
  if (call->state_out)
    return refuse(k, "state_out", "the layer carries no router state");
  if (!call->experts != !call->weights)
    return moec_fail(e, MOEC_E_ARGUMENT,
                     "%s: %s: expected experts and weights together, but got %s alone", w, l,
                     call->experts ? "experts" : "weights");
  static const char dense[] = "the layer is dense, it has no router";
  const char *no_router = code->kind ? dense : call->experts ? given : NULL;
  if (code->kind && call->experts)
    return refuse(k, "experts", dense);
  if (no_router && call->experts_out)
    return refuse(k, "experts_out", no_router);
  if (no_router && call->weights_out)
    return refuse(k, "weights_out", no_router);
  if (no_router && call->logits_out)
    return refuse(k, "logits_out", no_router);
  if (code->kind && call->counts_out)
    return refuse(k, "counts_out", dense);
  if (!call->y) {
    if (no_router)
      return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: y: expected a tensor, but got NULL: %s", w, l,
                       no_router);
    if (!call->experts_out && !call->weights_out && !call->logits_out && !call->counts_out)
      return moec_fail(e, MOEC_E_ARGUMENT, "%s: %s: expected y or a router output, but got neither",
                       w, l);
  }
  int r = check(k, call->x, "x", 2, -1, code->H, F32 | BF16, false, &t->x);
  if (r)
    return r;
  const int64_t T = t->T = call->x->shape[0];
  /* Of x's type: there is one code for both. */
  const uint32_t x_type = t->x.dtype == MOEC_DT_F32 ? F32 : BF16;
  if (call->router_x &&
      (r = check(k, call->router_x, "router_x", 2, T, code->H, x_type, false, &t->router_x)))
    return r;
  t->k = moec_slots_of(code);
  if (call->experts) {
    if ((r = check(k, call->experts, "experts", 2, T, -1, I32 | I64, false, &t->experts)))
      return r;
    t->k = call->experts->shape[1];
    r = check(k, call->weights, "weights", 2, T, t->k, F32 | BF16 | F16, false, &t->weights);
    if (r)
      return r;
  }
  if (call->y && (r = check(k, call->y, "y", 2, T, code->H, F32 | BF16, true, &t->y)))
    return r;
  if (call->experts_out && (r = check(k, call->experts_out, "experts_out", 2, T, code->K, I32 | I64,
                                      true, &t->experts_out)))
    return r;
  if (call->weights_out &&
      (r = check(k, call->weights_out, "weights_out", 2, T, code->K, F32, true, &t->weights_out)))
    return r;
  if (call->logits_out &&
      (r = check(k, call->logits_out, "logits_out", 2, T, code->E, F32, true, &t->logits_out)))
    return r;
  if (call->counts_out &&
      (r = check(k, call->counts_out, "counts_out", 1, code->E + 1, 0, I32, true, &t->counts_out)))
    return r;
  return check_overlaps(k);
}
