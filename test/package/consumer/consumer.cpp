// The header in C++17, and a pool from a C++ program.
#include "moec.h"
#include <cstdio>

int main() {
  moec_pool_options options;
  MOEC_INIT(options);
  options.threads = 2;
  moec_executor *pool = nullptr;
  moec_error error;
  if (moec_pool_create(&options, &pool, &error) != 0) {
    std::fprintf(stderr, "%s\n", error.message);
    return 1;
  }
  std::printf("%d lanes\n", static_cast<int>(pool->lanes));
  moec_pool_destroy(pool);
  return 0;
}
