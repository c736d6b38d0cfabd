/* Generated code: the tables of a module are checked, a level is chosen. */
#include "Open.h"

#include "moe/Runtime/Pack.h"

#include <stdio.h>

int moec_check_module(const opening *o, const moec_module *m) {
  moec_error *e = o->error;
  const char *w = o->where;
  if (m->abi >> 16 != MOEC_ABI >> 16 || (m->abi & 0xffff) > (MOEC_ABI & 0xffff))
    return moec_fail(e, MOEC_E_ABI,
                     "%s: expected code of ABI %u.0 to %u.%u, but got %u.%u; compile the model "
                     "again with this version, or update libmoec",
                     w, MOEC_ABI >> 16, MOEC_ABI >> 16, MOEC_ABI & 0xffff, m->abi >> 16,
                     m->abi & 0xffff);
  const size_t least = offsetof(moec_module, image_count); /* of 1.0 */
  if (m->struct_size < least || m->layer_count < 0 || !m->name || (m->layer_count && !m->layers))
    return moec_fail(e, MOEC_E_ABI, "%s: expected a module of %zu bytes, but got %zu", w, least,
                     m->struct_size);
  for (int32_t i = 0; i < m->layer_count; ++i) {
    const moec_layer_desc *d = &m->layers[i];
    const moec_layer_code *c = d->code;
    if (!d->name || !d->file || !c || c->H < 1 || c->F < 1 || c->E < 1 || c->E > INT32_MAX / 4 ||
        c->K < 0 || (!c->kind && (c->K < 1 || c->K > c->E)) || c->weight_count < 0 ||
        c->weight_count > MOEC_MAX_WEIGHTS || c->level_count < 1)
      return moec_fail(e, MOEC_E_ABI,
                       "%s: layer %d: expected a well-formed table, but got sizes "
                       "that no layer has",
                       w, i);
    if (c->needs & ~(uint32_t)MOEC_ROUTER_X)
      return moec_fail(e, MOEC_E_UNSUPPORTED,
                       "%s: %s: expected a layer that needs at most x and router_x, but got one "
                       "that needs inputs 0x%x; this version of the runtime does not hand them on",
                       w, d->name, c->needs);
    for (int32_t j = 0; j < c->weight_count; ++j) {
      const moec_weight_desc *t = &c->weights[j];
      const int32_t layout = moec_pack_layout(t->layout);
      if (layout < 0)
        return moec_fail(e, MOEC_E_LAYOUT,
                         "%s: %s: %s: expected layout panel32-1 or vector32-1, but got \"%s\"", w,
                         d->name, t->role, t->layout);
      if (layout == MOEC_VECTOR32 && (t->cols != 1 || moec_format_dtype(t->format) != MOEC_DT_F32))
        return moec_fail(e, MOEC_E_LAYOUT,
                         "%s: %s: %s: expected a vector in f32, but got %lld columns in %s", w,
                         d->name, t->role, (long long)t->cols, t->format);
      if (moec_format_dtype(t->format) < 0)
        return moec_fail(e, MOEC_E_LAYOUT,
                         "%s: %s: %s: expected format f32 or bf16, but got \"%s\"", w, d->name,
                         t->role, t->format);
      if (t->experts < 1 || t->rows < 1 || t->cols < 1 || (t->parts != 1 && t->parts != 2) ||
          t->bytes != moec_weight_packed_bytes(t))
        return moec_fail(e, MOEC_E_LAYOUT, "%s: %s: %s: expected %llu packed bytes, but got %llu",
                         w, d->name, t->role, (unsigned long long)moec_weight_packed_bytes(t),
                         (unsigned long long)t->bytes);
    }
  }
  return 0;
}

static void list_levels(const moec_layer_code *c, char *text, size_t size) {
  size_t n = 0;
  text[0] = 0;
  for (int32_t i = 0; i < c->level_count && n < size; ++i)
    n += (size_t)snprintf(text + n, size - n, "%s%s", i ? ", " : "", c->levels[i].level);
}

/* Puts the entries of the layer's level where calls find them. */
static int check_entries(const opening *o, moec_layer_state *layer) {
  for (int32_t i = 0; i < layer->level->entry_count; ++i) {
    const moec_entry *en = &layer->level->entries[i];
    if (en->kind < 0 || en->kind > 2 || en->x_dtype < 0 || en->x_dtype > 1 ||
        (en->kind != MOEC_ENTRY_ROUTE && (en->y_dtype < 0 || en->y_dtype > 1)) ||
        en->stage_count < 1 || en->stage_count > MOEC_MAX_STAGES)
      return moec_fail(o->error, MOEC_E_ABI,
                       "%s: %s: expected a well-formed entry, but got entry %d", o->where,
                       layer->desc->name, i);
    layer->entry[en->kind][en->x_dtype][en->kind == MOEC_ENTRY_ROUTE ? 0 : en->y_dtype] = en;
  }
  return 0;
}

int moec_choose_level(const opening *o, const moec_model *m, moec_layer_state *layer) {
  const moec_layer_code *c = layer->desc->code;
  if (m->level) {
    for (int32_t i = 0; i < c->level_count; ++i)
      if (!strcmp(c->levels[i].level, m->level))
        layer->level = &c->levels[i];
    if (!layer->level)
      return moec_fail(o->error, MOEC_E_ABI, "%s: %s: expected entries of level %s, but got none",
                       o->where, layer->desc->name, m->level);
    return check_entries(o, layer);
  }
  const char *lacks = NULL, *lacking = NULL;
  int32_t best = 0;
  for (int32_t i = 0; i < c->level_count; ++i) {
    const moec_level_info *info = moec_find_level(c->levels[i].level);
    if (!info || !info->built || (o->cap && info->rank > o->cap->rank))
      continue;
    /* A level that is no faster here than the one below it is taken only when it is asked for. */
    const char *missing = moec_missing_feature(info);
    if (!missing && !(o->cap && o->cap->rank == info->rank) && c->level_count > 1)
      missing = moec_slow_feature(info);
    if (missing) {
      lacks = missing;
      lacking = info->name;
    } else if (info->rank > best) {
      best = info->rank;
      layer->level = &c->levels[i];
    }
  }
  char have[128];
  list_levels(c, have, sizeof have);
  if (o->cap && layer->level && strcmp(layer->level->level, o->cap->name))
    return moec_fail(o->error, MOEC_E_ISA,
                     "%s: %s: expected a library with level %s, but got one with: %s", o->where,
                     layer->desc->name, o->cap->name, have);
  if (!layer->level && lacks)
    return moec_fail(o->error, MOEC_E_ISA,
                     "%s: expected a CPU with %s for level %s, but got one without", o->where,
                     lacks, lacking);
  if (!layer->level)
    return moec_fail(
        o->error, MOEC_E_ISA,
        "%s: %s: expected a level that this runtime knows%s%s, but got a library with: "
        "%s",
        o->where, layer->desc->name, o->cap ? ", up to " : "", o->cap ? o->cap->name : "", have);
  return check_entries(o, layer);
}

int moec_read_cap(opening *o, const char *name, const char *source) {
  if (!name || !*name)
    return 0;
  const moec_level_info *level = moec_find_level(name);
  if (!level)
    return moec_fail(o->error, MOEC_E_ISA,
                     "%s: %s: expected x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, but got "
                     "\"%s\"",
                     o->where, source, name);
  if (!level->built)
    return moec_fail(
        o->error, MOEC_E_ISA,
        "%s: %s: expected x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, but got %s, a level for "
        "which this version generates no code",
        o->where, source, name);
  const char *missing = moec_missing_feature(level);
  if (missing)
    return moec_fail(o->error, MOEC_E_ISA,
                     "%s: %s: expected a CPU with %s for level %s, but got one without", o->where,
                     source, missing, name);
  if (!o->cap || level->rank < o->cap->rank)
    o->cap = level;
  return 0;
}
