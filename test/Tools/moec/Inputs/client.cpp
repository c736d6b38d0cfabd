// A client in C++17 that links the generated code statically: moec_open_module, no dlopen.
#include "mixtral.h"
#include <cstdio>
#include <vector>

int main(int argc, char **argv) {
  if (argc < 2)
    return 2;
  moec_error error;
  moec_model *model = nullptr;
  moec_context *context = nullptr;
  moec_open_options options;
  MOEC_INIT(options);
  options.weights = argv[1];
  if (moec_open_module(&mixtral_moec_module, &options, &model, &error) ||
      moec_context_create(model, nullptr, &context, &error)) {
    std::fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  const mixtral_layer_shape *shape = mixtral_layer(0);
  std::vector<uint16_t> x(3 * shape->H, 0x3f80), y(3 * shape->H, 0x7fff);
  if (mixtral_forward(context, 0, x.data(), 3, y.data(), &error)) {
    std::fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  bool equal = true;
  for (int64_t i = 0; i < shape->H; ++i)
    equal = equal && y[i] == y[i + shape->H] && y[i] == y[i + 2 * shape->H];
  std::printf("%s: equal rows %s\n", shape->name, equal ? "stay equal" : "differ");
  moec_context_destroy(context);
  moec_close(model);
  return 0;
}
