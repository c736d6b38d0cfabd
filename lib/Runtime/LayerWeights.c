/* Weights of one layer: from a packed file, or to be set. */
#include "Open.h"

#include "moe/Runtime/Pack.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

int moec_format_dtype(const char *format) {
  if (!strcmp(format, "f32"))
    return MOEC_DT_F32;
  if (!strcmp(format, "bf16"))
    return MOEC_DT_BF16;
  return -1;
}

uint64_t moec_weight_packed_bytes(const moec_weight_desc *w) {
  return moec_pack_tensor_bytes(moec_pack_layout(w->layout), moec_format_dtype(w->format),
                                w->experts, (int32_t)w->parts, w->rows, w->cols);
}

uint64_t moec_layer_bytes(const moec_layer_code *code) {
  uint64_t sum = 0;
  for (int32_t i = 0; i < code->weight_count; ++i)
    sum += code->weights[i].bytes;
  return sum;
}

int moec_layer_arena(moec_layer_state *layer) {
  const moec_layer_code *code = layer->desc->code;
  if (layer->memory && !layer->mapped)
    return 0;
  size_t bytes = (size_t)moec_layer_bytes(code);
  unsigned char *arena = moec_map_memory(bytes), *next = arena;
  if (!arena)
    return -1;
  for (int32_t i = 0; i < code->weight_count; ++i) {
    if (layer->weights[i])
      memcpy(next, layer->weights[i], (size_t)code->weights[i].bytes);
    layer->weights[i] = next;
    next += code->weights[i].bytes;
  }
  moec_unmap_memory(layer->memory, layer->memory_bytes);
  layer->memory = arena;
  layer->memory_bytes = bytes;
  layer->mapped = false;
  return 0;
}

static void hex32(const uint8_t id[32], char text[17]) {
  for (int i = 0; i < 8; ++i)
    snprintf(text + 2 * i, 3, "%02x", id[i]);
}

/* Checks the head of a packed file against the code and finds each weight's place. */
static int check_head(const opening *o, const moec_layer_desc *desc, int fd, uint64_t size,
                      moec_id_block *id, int32_t place[MOEC_MAX_WEIGHTS]) {
  moec_error *e = o->error;
  const char *w = o->where, *dir = o->weights, *file = desc->file;
  const moec_layer_code *code = desc->code;
  struct {
    uint64_t header;
    char brace;
  } head = {0, 0};
  int r = size < 2 * MOEC_PAGE ? -1 : moec_read_all(fd, &head, 9, 0);
  if (!r)
    r = moec_read_all(fd, id, sizeof *id, MOEC_PAGE);
  if (r > 0)
    return moec_fail(e, MOEC_E_IO, "%s: %s/%s: expected to read its head, but got: %s", w, dir,
                     file, strerrordesc_np(r));
  if (r < 0)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected at least 8192 bytes, but got %llu: the file is truncated",
                     w, dir, file, (unsigned long long)size);
  if (head.header != MOEC_PAGE - 8 || head.brace != '{' || memcmp(id->magic, "MOECPACK", 8))
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected a file packed by moec (id block at byte 4096), but got "
                     "another; pack the checkpoint with moec pack",
                     w, dir, file);
  if (id->schema != 1)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected schema 1, but got %u: packed by a later version", w, dir,
                     file, id->schema);
  if (id->file_bytes != size)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected %llu bytes, but got %llu: the file is %s", w, dir, file,
                     (unsigned long long)id->file_bytes, (unsigned long long)size,
                     size < id->file_bytes ? "truncated" : "longer than written");
  if (memcmp(id->id, desc->id, 32)) {
    char want[17], got[17];
    hex32(desc->id, want);
    hex32(id->id, got);
    return moec_fail(e, MOEC_E_WEIGHTS,
                     "%s: %s/%s: expected weights packed for this code (id %s), but got id %s; "
                     "pack the checkpoint for this library",
                     w, dir, file, want, got);
  }
  id->layout[sizeof id->layout - 1] = 0;
  if (strcmp(id->layout, "panel32-1"))
    return moec_fail(e, MOEC_E_LAYOUT, "%s: %s/%s: expected layout panel32-1, but got \"%s\"", w,
                     dir, file, id->layout);
  if (id->tensor_count != (uint32_t)code->weight_count)
    return moec_fail(e, MOEC_E_LAYOUT, "%s: %s/%s: expected %d tensors, but got %u", w, dir, file,
                     code->weight_count, id->tensor_count);
  for (int32_t i = 0; i < code->weight_count; ++i) {
    const moec_weight_desc *d = &code->weights[i];
    const moec_id_tensor *t = NULL;
    for (uint32_t j = 0; j < id->tensor_count && !t; ++j)
      if (!strncmp(id->tensors[j].role, d->role, sizeof t->role)) {
        t = &id->tensors[j];
        place[i] = (int32_t)j;
      }
    if (!t)
      return moec_fail(e, MOEC_E_LAYOUT, "%s: %s/%s: expected a tensor \"%s\", but got none", w,
                       dir, file, d->role);
    const char *dtype = moec_format_dtype(d->format) == MOEC_DT_F32 ? "F32" : "BF16";
    if (strncmp(t->dtype, dtype, sizeof t->dtype) || t->bytes != d->bytes)
      return moec_fail(e, MOEC_E_LAYOUT,
                       "%s: %s/%s: %s: expected %s, %llu bytes, but got %.8s, %llu bytes", w, dir,
                       file, d->role, dtype, (unsigned long long)d->bytes, t->dtype,
                       (unsigned long long)t->bytes);
    if (t->offset < 2 * MOEC_PAGE || t->offset % MOEC_PAGE || t->offset > size ||
        t->bytes > size - t->offset)
      return moec_fail(e, MOEC_E_FILE_FORMAT,
                       "%s: %s/%s: %s: expected a place inside the file at a multiple of 4096, but "
                       "got byte %llu",
                       w, dir, file, d->role, (unsigned long long)t->offset);
  }
  return 0;
}

int moec_load_layer(const opening *o, moec_layer_state *layer) {
  const moec_layer_desc *desc = layer->desc;
  const moec_layer_code *code = desc->code;
  moec_error *e = o->error;
  const char *w = o->where, *dir = o->weights, *file = desc->file;
  struct stat st;
  int r = 0;
  int fd = moec_open_member(o->weights_fd, dir, file, w, &st, e, &r);
  if (fd < 0)
    return r;
  uint64_t size = (uint64_t)st.st_size;
  moec_id_block id;
  int32_t place[MOEC_MAX_WEIGHTS];
  r = check_head(o, desc, fd, size, &id, place);
  if (r)
    goto done;
  if (o->load == MOEC_MAP) {
    void *p = mmap(NULL, (size_t)size, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
      r = moec_fail(e, errno == ENOMEM ? MOEC_E_MEMORY : MOEC_E_IO,
                    "%s: %s/%s: expected to map %llu bytes, but got: %s", w, dir, file,
                    (unsigned long long)size, strerrordesc_np(errno));
      goto done;
    }
    /* File systems with large pages in their cache map them as such. A hint, and before a byte is
       touched: what the cache holds already stays as it is. */
    (void)madvise(p, (size_t)size, MADV_HUGEPAGE);
    layer->memory = p;
    layer->memory_bytes = (size_t)size;
    layer->mapped = true;
    for (int32_t i = 0; i < code->weight_count; ++i)
      layer->weights[i] = layer->memory + id.tensors[place[i]].offset;
  } else {
    if (moec_layer_arena(layer)) {
      r = moec_fail(e, MOEC_E_MEMORY, "%s: %s: expected %llu bytes of memory, but got none", w,
                    desc->name, (unsigned long long)moec_layer_bytes(code));
      goto done;
    }
    for (int32_t i = 0; !r && i < code->weight_count; ++i) {
      const moec_id_tensor *t = &id.tensors[place[i]];
      int n = moec_read_all(fd, (void *)(uintptr_t)layer->weights[i], t->bytes, t->offset);
      if (n)
        r = moec_fail(e, MOEC_E_IO, "%s: %s/%s: expected to read %s, but got: %s", w, dir, file,
                      code->weights[i].role,
                      n > 0 ? strerrordesc_np(n) : "the file ends (it was changed meanwhile)");
    }
  }
  for (int32_t i = 0; !r && o->verify && i < code->weight_count; ++i) {
    uint64_t want = id.tensors[place[i]].xxh3;
    uint64_t got = moec_pack_hash(layer->weights[i], (size_t)code->weights[i].bytes);
    if (got != want)
      r = moec_fail(e, MOEC_E_HASH,
                    "%s: %s/%s: %s: expected XXH3 %016llx, but got %016llx: bytes were changed", w,
                    dir, file, code->weights[i].role, (unsigned long long)want,
                    (unsigned long long)got);
  }
done:
  close(fd);
  return r; /* what was mapped belongs to the layer, and goes with the model */
}

/* Pieces in which a weight may come: the matrices of its experts, the rows of a router. */
static int64_t pieces_of(const moec_weight_desc *d) {
  return d->experts * d->parts * (strcmp(d->role, "router") ? 1 : d->rows);
}

int64_t moec_forget_weight(moec_layer_state *layer, int32_t weight) {
  const int64_t n = pieces_of(&layer->desc->code->weights[weight]);
  memset(layer->have[weight], 0, (size_t)n);
  return n;
}

int moec_expect_weights(const opening *o, moec_layer_state *layer) {
  const moec_layer_code *code = layer->desc->code;
  for (int32_t i = 0; i < code->weight_count; ++i) {
    layer->have[i] = calloc((size_t)pieces_of(&code->weights[i]), 1);
    if (!layer->have[i])
      return moec_fail(o->error, MOEC_E_MEMORY, "%s: expected memory for %s, but got none",
                       o->where, layer->desc->name);
    layer->missing += moec_forget_weight(layer, i);
  }
  return 0;
}
