/* moec_run: a call, in chunks of as many tokens as the context has room for. */
#include "Call.h"

/* The codes to run, one after the other; 0 or an error. */
static int find_entries(const checking *k, const moec_layer_state *s, const moec_call *call,
                        const tensors *t, const moec_entry *entries[2]) {
  const int32_t x = t->x.dtype, y = call->y ? t->y.dtype : 0;
  int32_t kinds[2] = {MOEC_ENTRY_FORWARD, -1};
  if (call->experts)
    kinds[0] = MOEC_ENTRY_EXPERTS;
  else if (!call->y)
    kinds[0] = MOEC_ENTRY_ROUTE;
  else if (call->logits_out) /* only `route` writes logits */
    kinds[0] = MOEC_ENTRY_ROUTE, kinds[1] = MOEC_ENTRY_EXPERTS;
  for (int i = 0; i < 2; ++i) {
    entries[i] = NULL;
    if (kinds[i] < 0)
      continue;
    entries[i] = s->entry[kinds[i]][x][kinds[i] == MOEC_ENTRY_ROUTE ? 0 : y];
    if (!entries[i])
      return moec_fail(k->error, MOEC_E_DTYPE,
                       "%s: %s: expected types that the library has code for, but got x %s, y %s",
                       k->where, k->layer, x == MOEC_DT_F32 ? "f32" : "bf16",
                       !call->y           ? "NULL"
                       : y == MOEC_DT_F32 ? "f32"
                                          : "bf16");
  }
  return 0;
}

/* T > 0; k > 0 or a shared expert. */
static int run_chunks(moec_context *c, const moec_job *job) {
  const moec_layer_state *s = job->layer;
  const moec_call *call = job->call;
  const tensors *t = job->t;
  const checking *check = job->check;
  const moec_target *target = c->model->target;
  const moec_layer_code *code = s->desc->code;
  const moec_entry *entries[2];
  int r = find_entries(check, s, call, t, entries);
  if (r)
    return r;
  const int64_t rows = moec_rows_of(code, c->max_tokens);
  int64_t chunk = t->k && rows / t->k < c->max_tokens ? rows / t->k : c->max_tokens;
  for (int i = 0; i < 2; ++i)
    while (entries[i] && chunk &&
           entries[i]->workspace_bytes(chunk < t->T ? chunk : t->T, t->k, c->lanes) >
               c->scratch_bytes)
      chunk /= 2;
  if (!chunk)
    return moec_fail(check->error, MOEC_E_SHAPE,
                     "%s: %s: experts: expected at most %lld ids for a token, but got %lld; a "
                     "context with more max_tokens holds more",
                     check->where, check->layer, (long long)rows, (long long)t->k);
  moec_frame *f = &c->frame;
  f->workspace = c->scratch;
  f->weights = s->weights;
  f->x_stride = t->x.stride;
  f->y_stride = t->y.stride;
  f->slots = t->k;
  f->experts = c->ids;
  f->expert_weights = c->weights;
  f->logits_stride = call->logits_out ? t->logits_out.stride : code->E;
  f->offsets = c->offsets;
  f->accumulate = (call->flags & MOEC_ACCUMULATE) != 0;
  f->routed_only = (call->flags & MOEC_ROUTED_ONLY) != 0;
  f->router_x_stride = t->router_x.stride;
  f->lanes = c->lanes;
  for (int64_t first = 0; first < t->T; first += chunk) {
    const int64_t n = t->T - first < chunk ? t->T - first : chunk;
    f->tokens = n;
    f->x = t->x.data + first * t->x.stride * moec_dtype_bytes(t->x.dtype);
    if (call->router_x)
      f->router_x =
          t->router_x.data + first * t->router_x.stride * moec_dtype_bytes(t->router_x.dtype);
    f->y = call->y ? t->y.data + first * t->y.stride * moec_dtype_bytes(t->y.dtype) : NULL;
    f->logits = NULL;
    if (call->logits_out)
      f->logits = (float *)(void *)t->logits_out.data + first * t->logits_out.stride;
    else if (entries[0]->kind == MOEC_ENTRY_ROUTE)
      f->logits = c->logits;
    if (call->experts)
      target->take(c, job, first, n);
    target->run(c, entries[0]);
    if (entries[1]) {
      f->logits = NULL;
      target->run(c, entries[1]);
    }
    target->give(c, job, first, n);
  }
  return 0;
}

int moec_run(moec_context *c, int32_t layer, const moec_call *call, moec_error *error) {
  checking k = {"moec_run", "", error, moec_host, {{0}}, 0};
  if (!c || !call)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", k.where,
                     c ? "call" : "context");
  int r = moec_check_struct(call, sizeof *call, k.where, "call", error);
  if (r)
    return r;
  if (layer < 0 || layer >= c->model->layer_count)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: layer: expected 0 to %d, but got %d", k.where,
                     c->model->layer_count - 1, layer);
  const moec_layer_state *s = &c->model->layers[layer];
  const moec_layer_code *code = s->desc->code;
  k.layer = s->desc->name;
  k.device = c->model->device;
  tensors t;
  memset(&t, 0, sizeof t);
  if ((r = moec_check_call(&k, code, call, &t)))
    return r;
  if (s->missing)
    return moec_fail(error, MOEC_E_WEIGHTS,
                     "%s: %s: expected all weights, but got %lld matrices that were never set; set "
                     "them with moec_set_weight",
                     k.where, k.layer, (long long)s->missing);
  /* Held by a call of the parent at the time of a fork: nobody holds it in this process. */
  const uint32_t mine = moec_fork_generation() + 1;
  uint32_t holder = 0;
  while (!atomic_compare_exchange_strong(&c->busy, &holder, mine))
    if (holder == mine)
      return moec_fail(error, MOEC_E_BUSY,
                       "%s: %s: expected an idle context, but got one that runs another call; give "
                       "every thread its own",
                       k.where, k.layer);
  const moec_target *target = c->model->target;
  const moec_job job = {s, call, &t, &k};
  if (!(r = target->begin(c, &job))) {
    const int64_t counts = (code->E + 1) * 4, row = code->H * moec_dtype_bytes(t.y.dtype);
    if (call->counts_out)
      target->clear(c, t.counts_out.data, counts, counts, 1);
    const int shared = code->S > 0 && !(call->flags & MOEC_ROUTED_ONLY);
    if (t.T && (t.k || shared))
      r = run_chunks(c, &job);
    else if (t.T && !(call->flags & MOEC_ACCUMULATE)) /* no slots: the empty sum */
      target->clear(c, t.y.data, t.y.stride * moec_dtype_bytes(t.y.dtype), row, t.T);
    r = target->end(c, &job, r);
  }
  atomic_store_explicit(&c->busy, 0, memory_order_release);
  return r ? r : moec_succeed(error);
}
