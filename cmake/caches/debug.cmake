# cmake -G Ninja -S . -B build-debug -C cmake/caches/debug.cmake
# Our assertions are on; Debian's LLVM has its own off, and its headers follow the library
# (llvm/Config/abi-breaking.h), so the two go together.
set(CMAKE_BUILD_TYPE Debug CACHE STRING "")
set(CMAKE_C_FLAGS_DEBUG "-O0 -g" CACHE STRING "")
set(CMAKE_CXX_FLAGS_DEBUG "-O0 -g" CACHE STRING "")
include(${CMAKE_CURRENT_LIST_DIR}/release.cmake)
