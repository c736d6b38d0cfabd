/* A model that is being opened: shared by Model.c and the files that do one part of it each. */
#ifndef MOEC_RUNTIME_OPEN_H
#define MOEC_RUNTIME_OPEN_H

#include "Internal.h"

#include <limits.h>
#include <sys/stat.h>

typedef struct {
  const char *where;   /* function the user called */
  const char *weights; /* folder, as the user or DIR names it */
  int weights_fd;      /* -1: MOEC_NONE */
  int32_t load, verify;
  const moec_level_info *cap; /* NULL: none */
  moec_error *error;
  DLDevice device;
  const char *gpu_cap; /* NULL: none */
} opening;

/* ---- files of a folder (Folder.c) ---- */

/* Opens a regular file of the folder by plain name. On failure returns -1 and has set *code. */
int moec_open_member(int folder, const char *path, const char *name, const char *where,
                     struct stat *st, moec_error *error, int *code);
/* All `bytes` at `offset`; 0, an errno, or -1 at the end of the file. */
int moec_read_all(int fd, void *to, uint64_t bytes, uint64_t offset);
/* The name of the one lib*.so in the folder. */
int moec_find_library(const char *where, const char *dir, int fd, char name[NAME_MAX + 1],
                      moec_error *e);
/* A file that ends early would kill the process inside dlopen (SIGBUS), so its extent is checked.
 */
int moec_check_elf(const char *where, const char *path, const char *name, int fd, uint64_t size,
                   moec_error *e);

/* ---- generated code (Code.c) ---- */

int moec_check_module(const opening *o, const moec_module *m);
/* Takes a name of a level, of the user's, for the highest that may run. */
int moec_read_cap(opening *o, const char *name, const char *source);
/* That of the model, if its target has chosen one. */
int moec_choose_level(const opening *o, const moec_model *m, moec_layer_state *layer);

/* ---- weights of one layer (LayerWeights.c) ---- */

int moec_load_layer(const opening *o, moec_layer_state *layer);
/* MOEC_NONE: every matrix, and every row of the router, has to come by moec_set_weight. */
int moec_expect_weights(const opening *o, moec_layer_state *layer);

#endif
