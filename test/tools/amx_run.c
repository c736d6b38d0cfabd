/* amx_run DIR: every layer of a compiled folder at level amx-bf16, its AMX instructions executed in
   software (AmxEmulator.h), against the same library's next level. Linked with a runtime of its own
   whose MOEC_EMULATE_AMX takes the CPU to have AMX; all other features must be there.

   For several numbers of tokens: outputs start as NaN; every row must be within bf16's accuracy of
   the other level's, have the same bits as the token alone, and leave the workspace's end as it
   was. Exits with 0, or with 1 and the first difference. */
#include "AmxEmulator.h"
#include "moec.h"

#include <stdio.h>
#include <stdlib.h>

static int failed;
#define CHECK(condition, ...)                                                                      \
  do {                                                                                             \
    if (!(condition)) {                                                                            \
      printf(__VA_ARGS__);                                                                         \
      printf("\n");                                                                                \
      failed = 1;                                                                                  \
      return;                                                                                      \
    }                                                                                              \
  } while (0)

enum { MOST = 131, GUARD = 4096 };

/* Two lanes, one after the other: signals of a pool's workers are blocked. */
static void serial(void *self, int32_t n, void (*task)(void *, int32_t), void *argument) {
  (void)self;
  for (int32_t i = 0; i < n; ++i)
    task(argument, i);
}
static const moec_executor lanes = {sizeof(moec_executor), NULL, 2, 0, serial};

static float uniform(void) { /* in [-1, 1) */
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (float)(int64_t)(state >> 40) * 0x1p-23f - 1.0f;
}

static moec_context *open_context(const char *dir, const char *level, moec_model **model,
                                  char **workspace, uint64_t *bytes) {
  moec_error error;
  moec_open_options options;
  MOEC_INIT(options);
  options.cpu_level = level;
  moec_context_options context;
  MOEC_INIT(context);
  context.max_tokens = MOST;
  context.executor = &lanes;
  moec_context *out = NULL;
  if (moec_open(dir, &options, model, &error) ||
      moec_workspace_size(*model, &context, bytes, &error)) {
    printf("%s\n", error.message);
    return NULL;
  }
  /* Every byte beyond the workspace is a NaN that must neither be written nor matter. */
  *workspace = aligned_alloc(64, (*bytes + 63) / 64 * 64 + GUARD);
  if (*workspace)
    memset(*workspace, 0x7f, (*bytes + 63) / 64 * 64 + GUARD);
  context.workspace = *workspace;
  context.workspace_bytes = *bytes;
  if (!*workspace || moec_context_create(*model, &context, &out, &error))
    printf("%s\n", *workspace ? error.message : "no memory");
  return out;
}

static void run_layer(moec_context *contexts[2], int32_t layer, const moec_layer_info *info,
                      int64_t T) {
  const int64_t H = info->H;
  uint16_t *x = malloc((size_t)(T * H) * 2);
  float *y[2] = {malloc((size_t)(T * H) * 4), malloc((size_t)(T * H) * 4)};
  float *alone = malloc((size_t)H * 4);
  CHECK(x && y[0] && y[1] && alone, "no memory");
  for (int64_t i = 0; i < T * H; ++i) {
    const float v = uniform();
    uint32_t bits;
    memcpy(&bits, &v, 4);
    x[i] = (uint16_t)(bits >> 16);
  }
  const DLDataType bf16 = {kDLBfloat, 16, 1}, f32 = {kDLFloat, 32, 1};
  moec_error error;
  int64_t shape[2] = {T, H}, one[2] = {1, H};
  for (int level = 0; level < 2; ++level) {
    for (int64_t i = 0; i < T * H; ++i)
      y[level][i] = NAN;
    DLTensor in = {x, {kDLCPU, 0}, 2, bf16, shape, NULL, 0};
    DLTensor out = {y[level], {kDLCPU, 0}, 2, f32, shape, NULL, 0};
    moec_call call;
    MOEC_INIT(call);
    call.x = &in;
    call.y = &out;
    CHECK(!moec_run(contexts[level], layer, &call, &error), "%s", error.message);
  }
  for (int64_t t = 0; t < T; ++t) {
    double difference = 0, norm = 0;
    for (int64_t h = 0; h < H; ++h) {
      const double a = y[0][t * H + h], b = y[1][t * H + h];
      difference += (a - b) * (a - b);
      norm += b * b;
    }
    CHECK(difference <= norm * 1e-4 && norm > 0, "%s: T = %lld, token %lld: %g from %g apart",
          info->name, (long long)T, (long long)t, sqrt(difference), sqrt(norm));
    if (t % 37 && t != T - 1)
      continue;
    DLTensor in = {x + t * H, {kDLCPU, 0}, 2, bf16, one, NULL, 0};
    DLTensor out = {alone, {kDLCPU, 0}, 2, f32, one, NULL, 0};
    moec_call call;
    MOEC_INIT(call);
    call.x = &in;
    call.y = &out;
    CHECK(!moec_run(contexts[0], layer, &call, &error), "%s", error.message);
    CHECK(!memcmp(alone, y[0] + t * H, (size_t)H * 4), "%s: T = %lld: token %lld alone differs",
          info->name, (long long)T, (long long)t);
  }
  free(x);
  free(y[0]);
  free(y[1]);
  free(alone);
}

static void run(const char *dir) {
  static const char *const levels[2] = {"amx-bf16", "x86-64-v4"};
  moec_context *contexts[2];
  moec_model *models[2];
  char *workspaces[2];
  uint64_t bytes[2];
  for (int i = 0; i < 2; ++i) {
    contexts[i] = open_context(dir, levels[i], &models[i], &workspaces[i], &bytes[i]);
    CHECK(contexts[i], "expected level %s to open", levels[i]);
  }
  for (int32_t layer = 0; layer < moec_layer_count(models[0]); ++layer) {
    moec_layer_info info;
    MOEC_INIT(info);
    moec_error error;
    CHECK(!moec_get_layer_info(models[0], layer, &info, &error), "%s", error.message);
    CHECK(!strcmp(info.level, "amx-bf16"), "%s: expected level amx-bf16, but got %s", info.name,
          info.level);
    /* A dense layer, and experts that all tokens take, have as many rows. */
    static const int64_t tokens[] = {1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 127, 128, 129, MOST};
    for (size_t i = 0; i < sizeof tokens / sizeof *tokens && !failed; ++i)
      run_layer(contexts, layer, &info, tokens[i]);
    if (failed)
      return;
  }
  for (int i = 0; i < 2; ++i) {
    for (int b = 0; b < GUARD; ++b)
      CHECK(workspaces[i][(bytes[i] + 63) / 64 * 64 + (uint64_t)b] == 0x7f,
            "expected the workspace's end untouched, but got byte %d written", b);
    moec_context_destroy(contexts[i]);
    moec_close(models[i]);
    free(workspaces[i]);
  }
  CHECK(amx_products, "expected products of tiles, but got none");
  printf("%llu products of tiles in %llu configurations: passed\n",
         (unsigned long long)amx_products, (unsigned long long)amx_configurations);
}

int main(int count, char **arguments) {
  if (count != 2) {
    printf("usage: amx_run DIR\n");
    return 2;
  }
  amx_emulate();
  run(arguments[1]);
  return failed;
}
