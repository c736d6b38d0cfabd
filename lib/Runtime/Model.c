/* A model: opened, asked what it is, closed. */
#include "Open.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

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
    if (device.device_type == kDLCUDA) {
      o->device = device;
      o->gpu_cap = options->cpu_level;
    } else if (device.device_id != 0)
      return moec_fail(e, MOEC_E_NO_DEVICE, "%s: device: expected CPU 0, but got CPU %d", w,
                       device.device_id);
    o->load = options->load;
    o->verify = options->verify;
    *weights = options->weights;
    if (device.device_type == kDLCUDA) /* MOEC_CPU is none of its business */
      return 0;
    r = moec_read_cap(o, options->cpu_level, "cpu_level");
    if (r)
      return r;
  }
  return moec_read_cap(o, getenv("MOEC_CPU"), "MOEC_CPU");
}

/* Takes over `handle`, which is closed on failure. */
static int open_checked(opening *o, const moec_module *module, void *handle, moec_model **out) {
  moec_error *e = o->error;
  int r = moec_check_module(o, module);
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
    r = m->target->open(m, o->gpu_cap, o->where, e);
  o->weights_fd = -1;
  if (!r && o->load != MOEC_NONE) {
    o->weights_fd = open(o->weights, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (o->weights_fd < 0)
      r = moec_fail(e, MOEC_E_IO, "%s: expected the folder of weights %s, but got: %s", o->where,
                    o->weights, strerrordesc_np(errno));
  }
  for (int32_t i = 0; !r && i < m->layer_count; ++i) {
    m->layers[i].desc = &module->layers[i];
    r = moec_choose_level(o, m, &m->layers[i]);
    if (!r && o->load == MOEC_NONE)
      r = moec_expect_weights(o, &m->layers[i]);
    else if (!r && !(r = moec_load_layer(o, &m->layers[i])))
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
  opening o = {"moec_open_module", NULL, -1, MOEC_MAP, 0, NULL, error, moec_host, NULL};
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

int moec_open(const char *dir, const moec_open_options *options, moec_model **out,
              moec_error *error) {
  opening o = {"moec_open", NULL, -1, MOEC_MAP, 0, NULL, error, moec_host, NULL};
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
  r = moec_find_library(o.where, dir, folder, name, error);
  if (!r) {
    struct stat st;
    int fd = moec_open_member(folder, dir, name, o.where, &st, error, &r);
    if (fd >= 0) {
      r = moec_check_elf(o.where, dir, name, fd, (uint64_t)st.st_size, error);
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
