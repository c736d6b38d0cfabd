#include "Internal.h"

#include "moe/Runtime/Pack.h"

#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef struct {
  const char *where;   /* function the user called */
  const char *weights; /* folder, as the user or DIR names it */
  int weights_fd;      /* -1: MOEC_NONE */
  int32_t load, verify;
  const moec_level_info *cap; /* NULL: none */
  moec_error *error;
  DLDevice device;
} opening;

/* ---- formats ---- */

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

/* ---- members of a folder ---- */

static bool is_plain(const char *name) {
  return *name && !strchr(name, '/') && strcmp(name, ".") && strcmp(name, "..");
}

/* The path behind a descriptor; false if the system does not tell. */
static bool path_of(int fd, char path[PATH_MAX]) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, PATH_MAX - 1);
  if (n <= 0)
    return false;
  path[n] = 0;
  return true;
}

static bool inside(const char *path, const char *folder, size_t n) {
  return !strncmp(path, folder, n) && path[n] == '/';
}

/* A symlink may lead to a file of the same folder, or, in a snapshot of a Hugging Face cache, to a
   blob of the same repository. */
static bool link_allowed(int folder, int fd) {
  char root[PATH_MAX], path[PATH_MAX];
  if (!path_of(folder, root) || !path_of(fd, path))
    return false;
  if (inside(path, root, strlen(root)))
    return true;
  char *snapshots = strstr(root, "/snapshots/");
  if (!snapshots)
    return false;
  size_t n = (size_t)(snapshots - root);
  return inside(path, root, n) && !strncmp(path + n, "/blobs/", 7);
}

/* Opens a regular file of the folder by plain name. On failure returns -1 and has set *code. */
static int open_member(int folder, const char *path, const char *name, const char *where,
                       struct stat *st, moec_error *error, int *code) {
  if (!is_plain(name)) {
    *code = moec_fail(error, MOEC_E_PATH, "%s: %s: expected a plain file name, but got \"%s\"",
                      where, path, name);
    return -1;
  }
  int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  int fd = openat(folder, name, flags | O_NOFOLLOW);
  bool link = fd < 0 && errno == ELOOP;
  if (link)
    fd = openat(folder, name, flags);
  if (fd < 0 || fstat(fd, st)) {
    *code = moec_fail(error, errno == ENOMEM ? MOEC_E_MEMORY : MOEC_E_IO,
                      "%s: %s/%s: expected a readable file, but got: %s", where, path, name,
                      strerrordesc_np(errno));
  } else if (!S_ISREG(st->st_mode)) {
    *code = moec_fail(error, MOEC_E_PATH, "%s: %s/%s: expected a regular file, but got %s", where,
                      path, name, S_ISDIR(st->st_mode) ? "a folder" : "a special file");
  } else if (link && !link_allowed(folder, fd)) {
    *code = moec_fail(error, MOEC_E_PATH,
                      "%s: %s/%s: expected a file of the folder, but got a link that leaves it",
                      where, path, name);
  } else {
    return fd;
  }
  if (fd >= 0)
    close(fd);
  return -1;
}

/* All `bytes` at `offset`; 0, an errno, or -1 at the end of the file. */
static int read_all(int fd, void *to, uint64_t bytes, uint64_t offset) {
  while (bytes) {
    size_t step = bytes < (64u << 20) ? (size_t)bytes : 64u << 20;
    ssize_t n = pread(fd, to, step, (off_t)offset);
    if (n < 0 && errno == EINTR)
      continue;
    if (n <= 0)
      return n ? errno : -1;
    to = (char *)to + n;
    offset += (uint64_t)n;
    bytes -= (uint64_t)n;
  }
  return 0;
}

/* ---- weights of one layer ---- */

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
  int r = size < 2 * MOEC_PAGE ? -1 : read_all(fd, &head, 9, 0);
  if (!r)
    r = read_all(fd, id, sizeof *id, MOEC_PAGE);
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

static int load_layer(const opening *o, moec_layer_state *layer) {
  const moec_layer_desc *desc = layer->desc;
  const moec_layer_code *code = desc->code;
  moec_error *e = o->error;
  const char *w = o->where, *dir = o->weights, *file = desc->file;
  struct stat st;
  int r = 0;
  int fd = open_member(o->weights_fd, dir, file, w, &st, e, &r);
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
      int n = read_all(fd, (void *)(uintptr_t)layer->weights[i], t->bytes, t->offset);
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

/* MOEC_NONE: every matrix, and every row of the router, has to come by moec_set_weight. */
static int expect_weights(const opening *o, moec_layer_state *layer) {
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

/* ---- generated code ---- */

static int check_module(const opening *o, const moec_module *m) {
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

/* Code of a GPU has one level; which image of it runs is the target's to find out. */
static int choose_level(const opening *o, const moec_module *module, moec_layer_state *layer) {
  const moec_layer_code *c = layer->desc->code;
  if (moec_has_images(module)) {
    layer->level = &c->levels[0];
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

static int read_cap(opening *o, const char *name, const char *source) {
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

/* ---- open, close ---- */

static void release(moec_model *m) {
  if (!m || atomic_fetch_sub(&m->references, 1) != 1)
    return;
  for (int32_t i = 0; m->layers && i < m->layer_count; ++i) {
    m->target->drop(m, &m->layers[i]);
    for (int32_t j = 0; j < MOEC_MAX_WEIGHTS; ++j)
      free(m->layers[i].have[j]);
  }
  free(m->layers);
  m->target->close(m);
  if (m->handle)
    dlclose(m->handle);
  free(m);
}

void moec_close(moec_model *model) { release(model); }

static int check_options(opening *o, const moec_open_options *options, const char **weights) {
  moec_error *e = o->error;
  const char *w = o->where;
  if (options) {
    int r = moec_check_struct(options, sizeof *options, w, "options", e);
    if (r)
      return r;
    if (options->load < MOEC_MAP || options->load > MOEC_NONE)
      return moec_fail(e, MOEC_E_ARGUMENT,
                       "%s: load: expected MOEC_MAP, MOEC_COPY or MOEC_NONE, but got %d", w,
                       options->load);
    if (options->verify != 0 && options->verify != 1)
      return moec_fail(e, MOEC_E_ARGUMENT, "%s: verify: expected 0 or 1, but got %d", w,
                       options->verify);
    const DLDevice device = options->device;
    if ((int)device.device_type != 0 && device.device_type != kDLCPU &&
        device.device_type != kDLCUDA)
      return moec_fail(e, MOEC_E_UNSUPPORTED,
                       "%s: device: expected the CPU or a CUDA device, but got device type %d", w,
                       (int)device.device_type);
    if (device.device_type == kDLCUDA && options->cpu_level)
      return moec_fail(e, MOEC_E_ARGUMENT,
                       "%s: cpu_level: expected NULL for a CUDA device, but got \"%s\"", w,
                       options->cpu_level);
    if (device.device_type == kDLCUDA)
      o->device = device;
    else if (device.device_id != 0)
      return moec_fail(e, MOEC_E_NO_DEVICE, "%s: device: expected CPU 0, but got CPU %d", w,
                       device.device_id);
    o->load = options->load;
    o->verify = options->verify;
    *weights = options->weights;
    r = read_cap(o, options->cpu_level, "cpu_level");
    if (r)
      return r;
  }
  return o->device.device_type == kDLCUDA ? 0 : read_cap(o, getenv("MOEC_CPU"), "MOEC_CPU");
}

/* Takes over `handle`, which is closed on failure. */
static int open_checked(opening *o, const moec_module *module, void *handle, moec_model **out) {
  moec_error *e = o->error;
  int r = check_module(o, module);
  moec_model *m = r ? NULL : calloc(1, sizeof *m);
  if (!m) {
    if (handle)
      dlclose(handle);
    return r ? r : moec_fail(e, MOEC_E_MEMORY, "%s: expected memory, but got none", o->where);
  }
  atomic_store(&m->references, 1);
  m->device = o->device;
  m->target = o->device.device_type == kDLCUDA ? &moec_cuda_target : &moec_cpu_target;
  m->module = module;
  m->handle = handle;
  m->layer_count = module->layer_count;
  m->layers = calloc((size_t)m->layer_count + 1, sizeof *m->layers);
  if (!m->layers)
    r = moec_fail(e, MOEC_E_MEMORY, "%s: expected memory, but got none", o->where);
  if (!r)
    r = m->target->open(m, o->where, e);
  o->weights_fd = -1;
  if (!r && o->load != MOEC_NONE) {
    o->weights_fd = open(o->weights, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (o->weights_fd < 0)
      r = moec_fail(e, MOEC_E_IO, "%s: expected the folder of weights %s, but got: %s", o->where,
                    o->weights, strerrordesc_np(errno));
  }
  for (int32_t i = 0; !r && i < m->layer_count; ++i) {
    m->layers[i].desc = &module->layers[i];
    r = choose_level(o, module, &m->layers[i]);
    if (!r && o->load == MOEC_NONE)
      r = expect_weights(o, &m->layers[i]);
    else if (!r && !(r = load_layer(o, &m->layers[i])))
      r = m->target->place(m, &m->layers[i], o->where, e);
  }
  if (o->weights_fd >= 0)
    close(o->weights_fd);
  if (r) {
    release(m);
    return r;
  }
  *out = m;
  return moec_succeed(e);
}

int moec_open_module(const moec_module *module, const moec_open_options *options, moec_model **out,
                     moec_error *error) {
  opening o = {"moec_open_module", NULL, -1, MOEC_MAP, 0, NULL, error, moec_host};
  if (out)
    *out = NULL;
  if (!out || !module)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", o.where,
                     out ? "module" : "model");
  int r = check_options(&o, options, &o.weights);
  if (r)
    return r;
  if (!o.weights && o.load != MOEC_NONE)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: expected options.weights (a folder) or load = MOEC_NONE, but got neither",
                     o.where);
  return open_checked(&o, module, NULL, out);
}

/* A file that ends early would kill the process inside dlopen (SIGBUS), so its extent is checked.
 */
static int check_elf(const char *where, const char *path, const char *name, int fd, uint64_t size,
                     moec_error *e) {
  Elf64_Ehdr h;
  if (size < sizeof h || read_all(fd, &h, sizeof h, 0) || memcmp(h.e_ident, ELFMAG, SELFMAG) ||
      h.e_type != ET_DYN)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected a shared library, but got another file", where, path,
                     name);
  if (h.e_ident[EI_CLASS] != ELFCLASS64 || h.e_machine != EM_X86_64)
    return moec_fail(e, MOEC_E_ISA, "%s: %s/%s: expected code for x86-64, but got machine %u",
                     where, path, name, h.e_machine);
  bool whole = h.e_phentsize == sizeof(Elf64_Phdr) && h.e_phoff <= size &&
               (uint64_t)h.e_phnum * sizeof(Elf64_Phdr) <= size - h.e_phoff && h.e_shoff <= size &&
               (uint64_t)h.e_shnum * h.e_shentsize <= size - h.e_shoff;
  for (int i = 0; whole && i < h.e_phnum; ++i) {
    Elf64_Phdr p;
    whole = !read_all(fd, &p, sizeof p, h.e_phoff + (uint64_t)i * sizeof p) && p.p_offset <= size &&
            p.p_filesz <= size - p.p_offset;
  }
  if (!whole)
    return moec_fail(e, MOEC_E_FILE_FORMAT,
                     "%s: %s/%s: expected a whole shared library, but got %llu bytes of it: the "
                     "file is truncated",
                     where, path, name, (unsigned long long)size);
  return 0;
}

/* The name of the one lib*.so in the folder. */
static int find_library(const char *where, const char *dir, int fd, char name[NAME_MAX + 1],
                        moec_error *e) {
  int copy = dup(fd);
  DIR *d = copy < 0 ? NULL : fdopendir(copy);
  if (!d) {
    int cause = errno;
    if (copy >= 0)
      close(copy);
    return moec_fail(e, MOEC_E_IO, "%s: %s: expected to list the folder, but got: %s", where, dir,
                     strerrordesc_np(cause));
  }
  int found = 0;
  for (struct dirent *entry; (entry = readdir(d));) {
    size_t n = strlen(entry->d_name);
    if (n > 6 && !strncmp(entry->d_name, "lib", 3) && !strcmp(entry->d_name + n - 3, ".so")) {
      ++found;
      memcpy(name, entry->d_name, n + 1);
    }
  }
  closedir(d);
  if (found != 1)
    return moec_fail(e, MOEC_E_PATH,
                     "%s: %s: expected exactly one library lib*.so, but got %d; is it a folder "
                     "written by moec compile?",
                     where, dir, found);
  return 0;
}

int moec_open(const char *dir, const moec_open_options *options, moec_model **out,
              moec_error *error) {
  opening o = {"moec_open", NULL, -1, MOEC_MAP, 0, NULL, error, moec_host};
  if (out)
    *out = NULL;
  if (!out || !dir)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", o.where,
                     out ? "dir" : "model");
  int r = check_options(&o, options, &o.weights);
  if (r)
    return r;
  char path[PATH_MAX], weights[PATH_MAX], name[NAME_MAX + 1], symbol[NAME_MAX + 32];
  int folder = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0)
    return moec_fail(error, MOEC_E_IO,
                     "%s: %s: expected a folder written by moec compile, but got: "
                     "%s",
                     o.where, dir, strerrordesc_np(errno));
  r = find_library(o.where, dir, folder, name, error);
  if (!r) {
    struct stat st;
    int fd = open_member(folder, dir, name, o.where, &st, error, &r);
    if (fd >= 0) {
      r = check_elf(o.where, dir, name, fd, (uint64_t)st.st_size, error);
      close(fd);
    }
  }
  close(folder);
  if (r)
    return r;
  if (snprintf(path, sizeof path, "%s/%s", dir, name) >= (int)sizeof path ||
      snprintf(weights, sizeof weights, "%s/weights", dir) >= (int)sizeof weights)
    return moec_fail(error, MOEC_E_PATH, "%s: expected a shorter path, but got %zu bytes", o.where,
                     strlen(dir));
  if (!o.weights)
    o.weights = weights;
  void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char *cause = dlerror();
    return moec_fail(error, MOEC_E_IO, "%s: %s: expected a library that loads, but got: %s",
                     o.where, path, cause ? cause : "no reason");
  }
  snprintf(symbol, sizeof symbol, "%.*s_moec_module", (int)(strlen(name) - 6), name + 3);
  const moec_module *module = dlsym(handle, symbol);
  if (!module) {
    dlclose(handle);
    return moec_fail(error, MOEC_E_ABI, "%s: %s: expected a symbol %s, but got none", o.where, path,
                     symbol);
  }
  return open_checked(&o, module, handle, out);
}

/* ---- what a model is ---- */

int32_t moec_layer_count(const moec_model *model) { return model ? model->layer_count : 0; }

int moec_get_layer_info(const moec_model *model, int32_t layer, moec_layer_info *info,
                        moec_error *error) {
  static const char where[] = "moec_get_layer_info";
  if (!model || !info)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: %s: expected a pointer, but got NULL", where,
                     model ? "info" : "model");
  /* An output: what it holds besides its size does not matter. */
  if (info->struct_size < sizeof *info)
    return moec_fail(error, MOEC_E_ARGUMENT,
                     "%s: info.struct_size: expected at least %zu, but got %zu; fill it with "
                     "MOEC_INIT",
                     where, sizeof *info, info->struct_size);
  if (layer < 0 || layer >= model->layer_count)
    return moec_fail(error, MOEC_E_ARGUMENT, "%s: layer: expected 0 to %d, but got %d", where,
                     model->layer_count - 1, layer);
  const moec_layer_state *s = &model->layers[layer];
  const moec_layer_code *c = s->desc->code;
  size_t size = info->struct_size;
  memset(info, 0, sizeof *info);
  info->struct_size = size;
  info->name = s->desc->name;
  info->index = s->desc->index;
  info->kind = c->kind;
  info->H = c->H;
  info->F = c->F;
  info->E = c->E;
  info->K = c->kind ? 1 : c->K;
  info->S = c->S;
  info->W = c->W;
  info->needs = c->needs;
  info->compute.code = c->compute == MOEC_DT_F32 ? kDLFloat : kDLBfloat;
  info->compute.bits = c->compute == MOEC_DT_F32 ? 32 : 16;
  info->compute.lanes = 1;
  info->format = info->layout = "";
  for (int32_t i = 0; i < c->weight_count; ++i)
    if (strcmp(c->weights[i].role, "router")) {
      info->format = c->weights[i].format;
      info->layout = c->weights[i].layout;
      break;
    }
  info->level = s->level->level;
  info->weight_bytes = moec_layer_bytes(c);
  info->active_flops = c->active_flops;
  return moec_succeed(error);
}
