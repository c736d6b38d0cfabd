# cmake -G Ninja -S . -B build-asan -C cmake/caches/asan.cmake
# Address and undefined-behaviour sanitizers for our code; LLVM and MLIR are not instrumented.
set(MOE_SANITIZE "address;undefined" CACHE STRING "")
set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "")
set(CMAKE_C_FLAGS_RELWITHDEBINFO "-O1 -g" CACHE STRING "")
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O1 -g" CACHE STRING "")
include(${CMAKE_CURRENT_LIST_DIR}/release.cmake)
