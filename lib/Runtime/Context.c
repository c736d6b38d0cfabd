#include "Call.h"

#include <stdlib.h>

enum { DEFAULT_TOKENS = 512, MOST_LANES = 65536, STAGE_SPIN_NS = 100000 };

/* ---- sizes ---- */

typedef struct {
  int64_t max_tokens;
  int32_t lanes;
  uint64_t ids, weights, offsets, logits, scratch, scratch_bytes, more,
      total; /* byte offsets, sizes */
} plan;

static uint64_t aligned(const moec_model *m, uint64_t bytes) {
  const uint64_t unit = m->target->alignment;
  return (bytes + unit - 1) / unit * unit;
}

static int make_plan(const char *w, const moec_model *model, const moec_context_options *options,
                     plan *p, moec_error *error) {
  if (!model)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: model: expected a pointer, but got NULL", w);
  memset(p, 0, sizeof *p);
  p->max_tokens = DEFAULT_TOKENS;
  p->lanes = 1;
  if (options) {
    int r = moec_check_struct(options, sizeof *options, w, "options", error);
    if (r)
      return r;
    if (options->max_tokens < 0)
      return moec_fail(error, MOEC_E_ARGUMENT, "%s: max_tokens: expected 0 or more, but got %lld",
                       w, (long long)options->max_tokens);
    if (options->max_tokens)
      p->max_tokens = options->max_tokens;
    const moec_executor *x = options->executor;
    if (x && !model->target->has_lanes)
      return moec_fail(error, MOEC_E_ARGUMENT,
                       "%s: executor: expected NULL for a GPU, but got an executor", w);
    if (x) {
      r = moec_check_struct(x, sizeof *x, w, "executor", error);
      if (r)
        return r;
      if (!x->run)
        return moec_fail(error, MOEC_E_ARGUMENT,
                         "%s: executor.run: expected a function, but got "
                         "NULL",
                         w);
      if (x->lanes < 1 || x->lanes > MOST_LANES)
        return moec_fail(error, MOEC_E_ARGUMENT, "%s: executor.lanes: expected 1 to %d, but got %d",
                         w, MOST_LANES, x->lanes);
      if (x->gang != 0 && x->gang != 1)
        return moec_fail(error, MOEC_E_ARGUMENT, "%s: executor.gang: expected 0 or 1, but got %d",
                         w, x->gang);
      p->lanes = x->lanes;
    }
  }
  int64_t rows = 0, experts = 0, routed = 0;
  for (int32_t i = 0; i < model->layer_count; ++i) {
    const moec_layer_state *s = &model->layers[i];
    const moec_layer_code *c = s->desc->code;
    const int64_t k = moec_slots_of(c);
    if (p->max_tokens > (INT32_MAX - 64) / k)
      return moec_fail(error, MOEC_E_ARGUMENT,
                       "%s: max_tokens: expected at most %lld (max_tokens x K below 2^31), but got "
                       "%lld",
                       w, (long long)((INT32_MAX - 64) / k), (long long)p->max_tokens);
    const int64_t r = moec_rows_of(c, p->max_tokens);
    rows = r > rows ? r : rows;
    experts = c->E > experts ? c->E : experts;
    routed = !c->kind && c->E > routed ? c->E : routed;
    /* workspace_bytes grows with tokens, with tokens x slots and with lanes, so these cover every
       chunk: all tokens with as many slots as there are rows for, and one token with E slots. */
    const int64_t shapes[2][2] = {{p->max_tokens, (r + p->max_tokens - 1) / p->max_tokens}, {1, r}};
    for (int32_t j = 0; j < s->level->entry_count; ++j)
      for (int n = 0; n < 2; ++n) {
        uint64_t b = s->level->entries[j].workspace_bytes(shapes[n][0], shapes[n][1], p->lanes);
        p->scratch_bytes = b > p->scratch_bytes ? b : p->scratch_bytes;
      }
  }
  p->weights = p->ids + aligned(model, (uint64_t)rows * 4);
  p->offsets = p->weights + aligned(model, (uint64_t)rows * 4);
  p->logits = p->offsets + aligned(model, (uint64_t)(experts + 1) * 4);
  p->scratch = p->logits + aligned(model, (uint64_t)p->max_tokens * (uint64_t)routed * 4);
  p->more = p->scratch + aligned(model, p->scratch_bytes);
  p->total = p->more + aligned(model, model->target->more_bytes);
  return 0;
}

int moec_workspace_size(const moec_model *model, const moec_context_options *options,
                        uint64_t *bytes, moec_error *error) {
  static const char w[] = "moec_workspace_size";
  plan p;
  if (!bytes)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: bytes: expected a pointer, but got NULL", w);
  *bytes = 0;
  int r = make_plan(w, model, options, &p, error);
  if (r)
    return r;
  *bytes = p.total;
  return moec_succeed(error);
}

/* ---- create, destroy ---- */

int moec_context_create(moec_model *model, const moec_context_options *options, moec_context **out,
                        moec_error *error) {
  static const char w[] = "moec_context_create";
  if (!out)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: context: expected a pointer, but got NULL", w);
  *out = NULL;
  plan p;
  int r = make_plan(w, model, options, &p, error);
  if (r)
    return r;
  char *workspace = options ? options->workspace : NULL;
  const moec_target *target = model->target;
  if (workspace && (uintptr_t)workspace % target->alignment)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: workspace: expected an address aligned to %u bytes, but got %p", w,
                     target->alignment, (void *)workspace);
  if (workspace && options->workspace_bytes < p.total)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: workspace_bytes: expected at least %llu, but got "
                     "%llu",
                     w, (unsigned long long)p.total, (unsigned long long)options->workspace_bytes);
  moec_context *c = aligned_alloc(64, sizeof *c);
  if (!c)
    return moec_fail(error, MOEC_E_MEMORY, "%s: expected memory, but got none", w);
  memset(c, 0, sizeof *c);
  if (!workspace) {
    c->owned_bytes = p.total;
    if ((r = target->allocate(model, p.total, p.max_tokens, &c->owned, w, error))) {
      free(c);
      return r;
    }
    workspace = c->owned;
  }
  moec_watch_forks();
  atomic_fetch_add(&model->references, 1);
  c->model = model;
  c->lanes = p.lanes;
  if (options && options->executor)
    c->executor = *options->executor;
  c->forks = moec_fork_generation();
  c->max_tokens = p.max_tokens;
  c->ids = (int32_t *)(void *)(workspace + p.ids);
  c->weights = (float *)(void *)(workspace + p.weights);
  c->offsets = (int32_t *)(void *)(workspace + p.offsets);
  c->logits = (float *)(void *)(workspace + p.logits);
  c->scratch = workspace + p.scratch;
  c->scratch_bytes = p.scratch_bytes;
  /* More lanes than CPUs: whoever polls keeps another lane from arriving. */
  c->spin_ns = p.lanes > 1 && p.lanes <= moec_cpus_allowed() ? STAGE_SPIN_NS : 0;
  if ((r = target->attach(c, workspace + p.more, w, error))) {
    moec_context_destroy(c);
    return r;
  }
  *out = c;
  return moec_succeed(error);
}

void moec_context_destroy(moec_context *context) {
  if (!context)
    return;
  if (context->owned)
    context->model->target->release(context->model, context->owned, context->owned_bytes);
  moec_close(context->model);
  free(context);
}

int moec_context_status(moec_context *context, moec_error *error) {
  if (!context)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "moec_context_status: context: expected a pointer, but "
                     "got NULL");
  return context->model->target->status(context, error);
}
