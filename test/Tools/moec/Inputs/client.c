/* A client in C99: the generated header, no DLTensor by hand. argv[1]: DIR. */
#include "mixtral.h"
#include <stdio.h>
#include <stdlib.h>

static int fail(const moec_error *error) {
  fprintf(stderr, "%s\n", error->message);
  return 1;
}

int main(int argc, char **argv) {
  moec_error error;
  moec_model *model = NULL;
  moec_context *context = NULL;
  enum { T = 5 };
  static uint16_t x[T * MIXTRAL_H], y[T * MIXTRAL_H], again[T * MIXTRAL_H];
  static int32_t experts[T * MIXTRAL_K];
  static float weights[T * MIXTRAL_K], logits[T * MIXTRAL_E], xf[T * MIXTRAL_H], yf[T * MIXTRAL_H];
  int i, layer, zeros;
  if (argc < 2)
    return 2;
  for (i = 0; i < T * MIXTRAL_H; ++i) {
    /* 0.5 or -1 as bf16, by position */
    x[i] = i % 3 ? 0x3f00 : 0xbf80;
    xf[i] = i % 3 ? 0.5f : -1.0f;
  }
  if (moec_open(argv[1], NULL, &model, &error) ||
      moec_context_create(model, NULL, &context, &error))
    return fail(&error);
  for (layer = 0; layer < MIXTRAL_LAYERS; ++layer) {
    if (mixtral_forward(context, layer, x, T, y, &error) ||
        mixtral_route(context, layer, x, T, experts, weights, &error) ||
        mixtral_route_bf16(context, layer, x, T, experts, weights, logits, &error) ||
        mixtral_experts(context, layer, x, T, experts, weights, MIXTRAL_K, again, &error) ||
        mixtral_forward_f32(context, layer, xf, T, yf, &error))
      return fail(&error);
    zeros = 0;
    for (i = 0; i < T * MIXTRAL_H; ++i)
      zeros += y[i] == 0;
    printf("%s: H %d, experts twice %s, %s\n", mixtral_layer(layer)->name,
           (int)mixtral_layer(layer)->H, memcmp(y, again, sizeof y) ? "differ" : "equal",
           zeros < T ? "not zero" : "zero");
    printf("choice %s, weights sum %s\n",
           logits[experts[0]] >= logits[experts[1]] ? "falls" : "rises",
           weights[0] + weights[1] > 0.99f && weights[0] + weights[1] < 1.01f ? "one" : "wrong");
  }
  if (mixtral_forward(context, MIXTRAL_LAYERS, x, T, y, &error) != MOEC_E_ARGUMENT)
    return 3;
  printf("%s\n", error.message);
  if (mixtral_forward(context, 0, x, 0, y, &error))
    return fail(&error);
  moec_context_destroy(context);
  moec_close(model);
  return 0;
}
