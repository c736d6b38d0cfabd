/* moec_open: a folder as moec compile writes it, and every way it can be wrong. argv[1] is
 * libmock.so.
 */
#include "helpers.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <dirent.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

static char root[256];

static const char *path(const char *name) {
  static char buffers[4][512];
  static int next;
  char *p = buffers[next++ % 4];
  snprintf(p, sizeof buffers[0], "%s/%s", root, name);
  return p;
}

static void write_file(const char *name, const void *data, size_t bytes) {
  FILE *f = fopen(name, "wb");
  if (!f || fwrite(data, 1, bytes, f) != bytes || fclose(f)) {
    perror(name);
    exit(1);
  }
}

static char *read_file(const char *name, size_t *bytes) {
  FILE *f = fopen(name, "rb");
  struct stat st;
  if (!f || fstat(fileno(f), &st)) {
    perror(name);
    exit(1);
  }
  char *data = (char *)malloc((size_t)st.st_size + 1);
  *bytes = fread(data, 1, (size_t)st.st_size, f);
  fclose(f);
  return data;
}

/* Packs by the layout's formula, independently of the packer. */
static void pack(char *to, const moec_weight_desc *w, const float *const parts[2]) {
  int bf16 = !strcmp(w->format, "bf16");
  int64_t per = w->parts == 2 ? 16 : 32, kp = (w->cols + 31) / 32 * 32;
  int64_t panels = (w->rows + per - 1) / per;
  for (int64_t e = 0; e < w->experts; ++e)
    for (int64_t p = 0; p < w->parts; ++p)
      for (int64_t r = 0; r < w->rows; ++r)
        for (int64_t k = 0; k < w->cols; ++k) {
          float v = parts[p][(e * w->rows + r) * w->cols + k];
          int64_t panel = e * panels + r / per, lane = r % per + 16 * p;
          uint16_t h = bf16_round(v);
          if (bf16)
            memcpy(to + panel * kp * 64 + ((k / 2) * 64 + lane * 2 + k % 2) * 2, &h, 2);
          else
            memcpy(to + panel * kp * 128 + (k * 32 + lane) * 4, &v, 4);
        }
}

static void write_weights(const char *folder) {
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    const moec_layer_desc *d = &mock_moec_module.layers[i];
    const moec_layer_code *c = d->code;
    size_t bytes = 8192;
    for (int j = 0; j < c->weight_count; ++j)
      bytes += c->weights[j].bytes;
    char *file = (char *)calloc(bytes, 1);
    uint64_t header = 4088;
    memcpy(file, &header, 8);
    memset(file + 8, ' ', 4088);
    file[8] = '{';
    file[9] = '}';
    moec_id_block *id = (moec_id_block *)(void *)(file + 4096);
    memcpy(id->magic, "MOECPACK", 8);
    id->schema = 1;
    id->tensor_count = (uint32_t)c->weight_count;
    memcpy(id->id, d->id, 32);
    id->file_bytes = bytes;
    strcpy(id->layout, "panel32-1");
    size_t at = 8192;
    for (int j = c->weight_count - 1; j >= 0; --j) { /* an order of its own: found by role */
      const moec_weight_desc *w = &c->weights[j];
      moec_id_tensor *t = &id->tensors[j];
      snprintf(t->role, sizeof t->role, "%s", w->role);
      snprintf(t->dtype, sizeof t->dtype, "%s", strcmp(w->format, "f32") ? "BF16" : "F32");
      t->offset = at;
      t->bytes = w->bytes;
      const source *s = &sources[i];
      const float *parts[2] = {w->parts == 2                ? s->gate
                               : !strcmp(w->role, "router") ? s->router
                                                            : s->down,
                               s->up};
      pack(file + at, w, parts);
      t->xxh3 = XXH3_64bits(file + at, w->bytes);
      at += w->bytes;
    }
    char name[512];
    snprintf(name, sizeof name, "%s/%s", folder, d->file);
    write_file(name, file, bytes);
    free(file);
  }
}

/* Every layer gives the float64 result; y of layer 0 is kept for comparisons of bits. */
static float kept[3 * 40];
static void check_results(moec_model *m) {
  moec_context *c = NULL;
  OK(moec_context_create(m, NULL, &c, &err));
  for (int i = 0; c && i < MOCK_LAYERS; ++i) {
    const source *s = &sources[i];
    float x[3 * 40], y[3 * 40];
    double want[3 * 40], z[16], w[4] = {1};
    int32_t ids[4] = {0};
    seed = 99;
    for (int j = 0; j < 3 * s->H; ++j)
      x[j] = s->compute_bf16 ? bf16_value(bf16_round(uniform())) : uniform();
    for (int t = 0; t < 3; ++t) {
      if (!s->dense)
        expect_route(s, x + t * s->H, z, ids, w);
      expect_row(s, x + t * s->H, ids, w, s->K, want + t * s->H);
    }
    tensor tx, ty;
    moec_call call;
    MOEC_INIT(call);
    call.x = make2(&tx, x, F32, 3, s->H);
    call.y = make2(&ty, y, F32, 3, s->H);
    OK(moec_run(c, i, &call, &err));
    CHECK(distance(y, want, 3 * s->H) < (s->compute_bf16 ? 0.01 : 1e-5));
    if (!i)
      memcpy(kept, y, sizeof kept);
  }
  moec_context_destroy(c);
}

static int open_files(void) {
  int n = 0;
  DIR *d = opendir("/proc/self/fd");
  while (readdir(d))
    ++n;
  closedir(d);
  return n;
}

static int mappings(const char *text) {
  char line[1024];
  int n = 0;
  FILE *f = fopen("/proc/self/maps", "r");
  while (fgets(line, sizeof line, f))
    n += strstr(line, text) != NULL;
  fclose(f);
  return n;
}

#define LAYER2 "m/weights/model.layers.2.mlp.safetensors"

static moec_open_options options;
static int try_open(void) {
  moec_model *m = (moec_model *)&options; /* must become NULL on failure */
  int r = moec_open(path("m"), &options, &m, &err);
  if (r)
    CHECK(m == NULL);
  else
    moec_close(m);
  return r;
}

/* Changes bytes of a file for one attempt. */
static char *whole;
static size_t whole_bytes;
#define WITH_BYTES(offset, data, size, statement)                                                  \
  do {                                                                                             \
    char *copy = (char *)malloc(whole_bytes);                                                      \
    memcpy(copy, whole, whole_bytes);                                                              \
    memcpy(copy + (offset), (data), (size));                                                       \
    write_file(path(LAYER2), copy, whole_bytes);                                                   \
    free(copy);                                                                                    \
    statement;                                                                                     \
    write_file(path(LAYER2), whole, whole_bytes);                                                  \
  } while (0)

static void levels(void) {
  MOEC_INIT(options);
  options.cpu_level = "x86-64-v3";
  OK(try_open());
  options.cpu_level = "sse2";
  FAILS(try_open(), ISA,
        "cpu_level: expected x86-64-v3, x86-64-v4, avx512-bf16 or amx-bf16, but got \"sse2\"");
  options.cpu_level = "amx-bf16";
  FAILS(try_open(), ISA, "amx-bf16"); /* as below */
  options.cpu_level =
      "avx512-bf16"; /* the library has no code for it, or the machine no such level */
  FAILS(try_open(), ISA, "avx512-bf16");
  options.cpu_level = "x86-64-v4";
  int r = try_open();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl"))
    OK(r);
  else
    FAILS(r, ISA, "AVX-512");
  options.cpu_level = NULL;
  setenv("MOEC_CPU", "x86-64-v3", 1);
  moec_model *m = NULL;
  OK(moec_open(path("m"), &options, &m, &err));
  moec_layer_info info;
  MOEC_INIT(info);
  OK(moec_get_layer_info(m, 0, &info, &err));
  CHECK(!strcmp(info.level, "x86-64-v3"));
  moec_close(m);
  setenv("MOEC_CPU", "fast", 1);
  FAILS(try_open(), ISA, "MOEC_CPU");
  setenv("MOEC_CPU", "", 1);
  OK(try_open());
  unsetenv("MOEC_CPU");

  /* A library with one level only. */
  moec_module module = mock_moec_module;
  moec_layer_desc layers[MOCK_LAYERS];
  moec_layer_code codes[MOCK_LAYERS];
  module.layers = layers;
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    layers[i] = mock_moec_module.layers[i];
    codes[i] = *layers[i].code;
    codes[i].level_count = 1; /* x86-64-v3 */
    layers[i].code = &codes[i];
  }
  options.load = MOEC_NONE;
  OK(moec_open_module(&module, &options, &m, &err));
  moec_close(m);
  options.cpu_level = "x86-64-v4";
  r = moec_open_module(&module, &options, &m, &err);
  FAILS(r, ISA, __builtin_cpu_supports("avx512f") ? "expected a library with level x86-64-v4" : "");
  for (int i = 0; i < MOCK_LAYERS; ++i)
    ++codes[i].levels; /* x86-64-v4 */
  options.cpu_level = "x86-64-v3";
  FAILS(moec_open_module(&module, &options, &m, &err), ISA, "x86-64-v4");
  options.cpu_level = NULL;
  moec_level_code unknown = codes[1].levels[0];
  unknown.level = "x86-64-v9";
  codes[1].levels = &unknown;
  FAILS(moec_open_module(&module, &options, &m, &err), ISA, "x86-64-v9");
  codes[1].levels = mock_moec_module.layers[1].code->levels;

  /* Tables the runtime does not take. */
  moec_module bad = module;
  bad.abi = 0x00020000;
  FAILS(moec_open_module(&bad, &options, &m, &err), ABI, "but got 2.0");
  bad.abi = MOEC_ABI + 1;
  char newer[32];
  snprintf(newer, sizeof newer, "but got 1.%d", (int)((MOEC_ABI & 0xffff) + 1));
  FAILS(moec_open_module(&bad, &options, &m, &err), ABI, newer);
  codes[0].needs = MOEC_TOKEN_IDS;
  FAILS(moec_open_module(&module, &options, &m, &err), UNSUPPORTED, "0x1");
  codes[0].needs = 0;
  moec_weight_desc weights[3];
  memcpy(weights, codes[0].weights, sizeof weights);
  codes[0].weights = weights;
  weights[1].layout = "rows-1";
  FAILS(moec_open_module(&module, &options, &m, &err), LAYOUT, "rows-1");
  weights[1].layout = "panel32-1";
  weights[1].format = "fp8";
  FAILS(moec_open_module(&module, &options, &m, &err), LAYOUT, "fp8");
  weights[1].format = "f32";
  weights[1].bytes += 4096;
  FAILS(moec_open_module(&module, &options, &m, &err), LAYOUT, "packed bytes");
}

int main(int argc, char **argv) {
  if (argc < 2)
    return 2;
  make_sources();
  snprintf(root, sizeof root, "%s/moec-files-XXXXXX", getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp");
  if (!mkdtemp(root))
    return 2;
  mkdir(path("m"), 0777);
  mkdir(path("m/weights"), 0777);
  size_t bytes;
  char *library = read_file(argv[1], &bytes);
  write_file(path("m/libmock.so"), library, bytes);
  write_file(path("m/manifest.json"), "{}", 2);
  write_weights(path("m/weights"));
  whole = read_file(path(LAYER2), &whole_bytes);

  /* Mapped, copied, verified, weights elsewhere, a linked folder, a linked module: the same bits.
   */
  float first[3 * 40];
  moec_model *m = NULL;
  OK(moec_open(path("m"), NULL, &m, &err));
  CHECK(moec_layer_count(m) == MOCK_LAYERS);
  check_results(m);
  memcpy(first, kept, sizeof first);
  CHECK(mappings("mlp.safetensors") == MOCK_LAYERS);
  moec_model *twice = NULL;
  OK(moec_open(path("m"), NULL, &twice, &err)); /* the same library again */
  moec_close(m);
  check_results(twice);
  moec_close(twice);
  CHECK(mappings("mlp.safetensors") == 0 && mappings("libmock.so") == 0);
  for (int load = MOEC_MAP; load <= MOEC_COPY; ++load) {
    MOEC_INIT(options);
    options.load = load;
    options.verify = 1;
    OK(moec_open(path("m"), &options, &m, &err));
    if (load == MOEC_COPY)
      CHECK(mappings("mlp.safetensors") == 0);
    check_results(m);
    CHECK(!memcmp(first, kept, sizeof first));
    moec_close(m);
  }
  MOEC_INIT(options);
  CHECK(!symlink("m/weights", path("link")));
  options.weights = path("link");
  OK(moec_open(path("m"), &options, &m, &err));
  check_results(m);
  moec_close(m);
  OK(moec_open_module(&mock_moec_module, &options, &m, &err));
  check_results(m);
  CHECK(!memcmp(first, kept, sizeof first));

  /* A mapped file is never written to: setting a weight gives the layer memory of its own. */
  tensor t;
  sources[0].down[7] += 1;
  OK(moec_set_weight(m, 0, "down", 0, make2(&t, sources[0].down, F32, 40, 23), 0, &err));
  CHECK(mappings("mlp.safetensors") == MOCK_LAYERS - 1);
  check_results(m);
  sources[0].down[7] -= 1;
  moec_close(m);
  OK(moec_open_module(&mock_moec_module, &options, &m, &err));
  check_results(m);
  CHECK(!memcmp(first, kept, sizeof first));
  moec_close(m);

  levels();

  /* From here on everything fails, and nothing stays behind. */
  const int files = open_files();
  MOEC_INIT(options);
  FAILS(moec_open(NULL, NULL, &m, &err), ARGUMENT, "dir");
  FAILS(moec_open(path("m"), NULL, NULL, &err), ARGUMENT, "model");
  FAILS(moec_open_module(NULL, NULL, &m, &err), ARGUMENT, "module");
  FAILS(moec_open_module(&mock_moec_module, NULL, &m, &err), ARGUMENT, "MOEC_NONE");
  FAILS(moec_open(path("nowhere"), NULL, &m, &err), IO, "No such file");
  FAILS(moec_open(path("m/manifest.json"), NULL, &m, &err), IO, "Not a directory");
  options.struct_size = 3;
  FAILS(try_open(), ARGUMENT, "struct_size");
  MOEC_INIT(options);
  options.load = 3;
  FAILS(try_open(), ARGUMENT, "load");
  options.load = MOEC_MAP;
  options.verify = 2;
  FAILS(try_open(), ARGUMENT, "verify");
  options.verify = 0;
  options.device.device_type = kDLCUDA;
  FAILS(try_open(), ARCH, "but got one for CPUs");
  options.device.device_type = kDLCPU;
  options.device.device_id = 1;
  FAILS(try_open(), NO_DEVICE, "CPU 1");
  options.device.device_id = 0;
  OK(try_open());
  options.weights = path("nowhere");
  FAILS(try_open(), IO, "nowhere");
  MOEC_INIT(options);

  /* library: missing, two, truncated at many places, another file, without the symbol */
  rename(path("m/libmock.so"), path("m/libother.so"));
  FAILS(try_open(), ABI, "other_moec_module");
  write_file(path("m/libmock.so"), library, bytes);
  FAILS(try_open(), PATH, "but got 2");
  unlink(path("m/libother.so"));
  for (int i = 0; i < 8; ++i) {
    write_file(path("m/libmock.so"), library, bytes * (size_t)i / 8);
    FAILS(try_open(), FILE_FORMAT, "libmock.so");
  }
  write_file(path("m/libmock.so"), library, bytes - 1);
  FAILS(try_open(), FILE_FORMAT, "truncated");
  char *wrong = (char *)malloc(bytes);
  memcpy(wrong, library, bytes);
  wrong[18] = (char)183; /* AArch64 */
  write_file(path("m/libmock.so"), wrong, bytes);
  FAILS(try_open(), ISA, "machine 183");
  memcpy(wrong, library, bytes);
  uint64_t phoff, far = (uint64_t)1 << 40;
  memcpy(&phoff, library + 32, 8);
  memcpy(wrong + phoff + 32, &far, 8); /* size in the file of the first segment */
  write_file(path("m/libmock.so"), wrong, bytes);
  FAILS(try_open(), FILE_FORMAT, "truncated");
  free(wrong);
  unlink(path("m/libmock.so"));
  FAILS(try_open(), PATH, "but got 0");
  mkdir(path("m/libmock.so"), 0777);
  FAILS(try_open(), PATH, "a folder");
  rmdir(path("m/libmock.so"));
  CHECK(!symlink(argv[1], path("m/libmock.so")));
  FAILS(try_open(), PATH, "link that leaves it");
  unlink(path("m/libmock.so"));
  write_file(path("m/libmock.so"), library, bytes);
  OK(try_open());

  /* A snapshot of a Hugging Face cache: links lead to the blobs of the same repository alone. */
  mkdir(path("snapshots"), 0777);
  mkdir(path("snapshots/models--a"), 0777);
  mkdir(path("snapshots/models--a/blobs"), 0777);
  mkdir(path("snapshots/models--a/snapshots"), 0777);
  mkdir(path("snapshots/models--a/snapshots/1"), 0777);
  for (int i = 0; i < MOCK_LAYERS; ++i) {
    char from[64], target[64], link[128];
    snprintf(from, sizeof from, "m/weights/%s", mock_moec_module.layers[i].file);
    snprintf(target, sizeof target, "../../blobs/%d", i);
    snprintf(link, sizeof link, "snapshots/models--a/snapshots/1/%s",
             mock_moec_module.layers[i].file);
    size_t n;
    char *data = read_file(path(from), &n);
    snprintf(from, sizeof from, "snapshots/models--a/blobs/%d", i);
    write_file(path(from), data, n);
    free(data);
    CHECK(!symlink(target, path(link)));
  }
  char snapshot[512];
  snprintf(snapshot, sizeof snapshot, "%s", path("snapshots/models--a/snapshots/1"));
  options.weights = snapshot;
  OK(try_open());
  rename(path("snapshots/models--a/blobs"), path("snapshots/models--a/other"));
  CHECK(!symlink("other", path("snapshots/models--a/blobs")));
  FAILS(try_open(), PATH, "link that leaves it");
  MOEC_INIT(options);

  /* weight file: missing, folder, pipe, links, truncated, longer */
  rename(path(LAYER2), path("m/weights/kept"));
  FAILS(try_open(), IO, "model.layers.2.mlp.safetensors");
  mkdir(path(LAYER2), 0777);
  FAILS(try_open(), PATH, "a folder");
  rmdir(path(LAYER2));
  CHECK(!mkfifo(path(LAYER2), 0666));
  FAILS(try_open(), PATH, "a special file");
  unlink(path(LAYER2));
  CHECK(!symlink("kept", path(LAYER2))); /* inside the folder */
  OK(try_open());
  unlink(path(LAYER2));
  rename(path("m/weights/kept"), path("kept"));
  CHECK(!symlink("../../kept", path(LAYER2)));
  FAILS(try_open(), PATH, "link that leaves it");
  unlink(path(LAYER2));
  CHECK(!symlink("nothing", path(LAYER2)));
  FAILS(try_open(), IO, "No such file");
  unlink(path(LAYER2));
  static const size_t cuts[] = {0, 5, 4096, 8191, 8192, 20000};
  for (int i = 0; i < 6; ++i) {
    write_file(path(LAYER2), whole, cuts[i]);
    FAILS(try_open(), FILE_FORMAT, "truncated");
  }
  write_file(path(LAYER2), whole, whole_bytes - 1);
  FAILS(try_open(), FILE_FORMAT, "truncated");
  char *longer = (char *)calloc(whole_bytes + 4096, 1);
  memcpy(longer, whole, whole_bytes);
  write_file(path(LAYER2), longer, whole_bytes + 4096);
  FAILS(try_open(), FILE_FORMAT, "longer");
  free(longer);

  /* id block */
  const moec_id_block *id = (const moec_id_block *)(const void *)(whole + 4096);
#define AT(field) ((size_t)((const char *)&id->field - whole))
  WITH_BYTES(0, "\x10", 1, FAILS(try_open(), FILE_FORMAT, "packed by moec"));
  WITH_BYTES(8, "[", 1, FAILS(try_open(), FILE_FORMAT, "packed by moec"));
  WITH_BYTES(4096, "X", 1, FAILS(try_open(), FILE_FORMAT, "packed by moec"));
  WITH_BYTES(AT(schema), "\x02", 1, FAILS(try_open(), FILE_FORMAT, "but got 2"));
  WITH_BYTES(AT(id), "\x63", 1, FAILS(try_open(), WEIGHTS, "but got id 6307"));
  WITH_BYTES(AT(file_bytes), "\x01", 1, FAILS(try_open(), FILE_FORMAT, "bytes"));
  WITH_BYTES(AT(layout), "rows-1", 7, FAILS(try_open(), LAYOUT, "rows-1"));
  WITH_BYTES(AT(tensor_count), "\x02", 1, FAILS(try_open(), LAYOUT, "expected 3 tensors"));
  WITH_BYTES(AT(tensors[1].role), "gate", 5, FAILS(try_open(), LAYOUT, "\"gate_up\""));
  WITH_BYTES(AT(tensors[1].dtype), "F16", 4, FAILS(try_open(), LAYOUT, "gate_up: expected BF16"));
  WITH_BYTES(AT(tensors[1].bytes), "\0\0\1", 3, FAILS(try_open(), LAYOUT, "gate_up"));
  WITH_BYTES(AT(tensors[1].offset), "\x20", 1, FAILS(try_open(), FILE_FORMAT, "gate_up"));
  WITH_BYTES(AT(tensors[1].offset), "\0\0\0\0\1", 5, FAILS(try_open(), FILE_FORMAT, "gate_up"));
  WITH_BYTES(AT(tensors[1].offset), "\0\xf0\xff\xff\xff\xff\xff\xff", 8,
             FAILS(try_open(), FILE_FORMAT, "gate_up"));

  uint64_t late = whole_bytes - 4096; /* begins inside, ends outside */
  WITH_BYTES(AT(tensors[1].offset), &late, 8, FAILS(try_open(), FILE_FORMAT, "gate_up"));

  /* A changed weight byte is seen by verify alone. */
  OK(try_open());
  WITH_BYTES(whole_bytes - 9000, "~", 1, OK(try_open()));
  options.verify = 1;
  WITH_BYTES(whole_bytes - 9000, "~", 1, FAILS(try_open(), HASH, "bytes were changed"));
  options.load = MOEC_COPY;
  WITH_BYTES(whole_bytes - 9000, "~", 1, FAILS(try_open(), HASH, "bytes were changed"));
  OK(try_open());

  /* Weights of another layer under this name. */
  options.verify = 0;
  size_t other_bytes;
  char *other = read_file(path("m/weights/model.layers.0.mlp.safetensors"), &other_bytes);
  write_file(path("m/weights/model.layers.1.mlp.safetensors"), other, other_bytes);
  FAILS(try_open(), WEIGHTS, "model.layers.1.mlp.safetensors");
  free(other);

  CHECK(open_files() == files);
  CHECK(mappings("mlp.safetensors") == 0 && mappings("libmock.so") == 0);
  free(whole);
  free(library);
  char command[300];
  snprintf(command, sizeof command, "rm -rf %s", root);
  if (system(command))
    return 2;
  return finish("files");
}
