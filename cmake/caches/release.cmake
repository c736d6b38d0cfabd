# cmake -G Ninja -S . -B build -C cmake/caches/release.cmake
# clang-22 is preferred where it is installed (faster, smaller precompiled header); CC and CXX, or
# -DCMAKE_CXX_COMPILER before -C, choose otherwise.
if(NOT DEFINED ENV{CC} AND NOT DEFINED ENV{CXX} AND NOT CMAKE_CXX_COMPILER)
  find_program(moe_clang clang-22)
  find_program(moe_clangxx clang++-22)
  if(moe_clang AND moe_clangxx)
    set(CMAKE_C_COMPILER ${moe_clang} CACHE FILEPATH "")
    set(CMAKE_CXX_COMPILER ${moe_clangxx} CACHE FILEPATH "")
  endif()
endif()
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "")
endif()
set(CMAKE_C_FLAGS_RELEASE "-O2 -DNDEBUG" CACHE STRING "")
set(CMAKE_CXX_FLAGS_RELEASE "-O2 -DNDEBUG" CACHE STRING "")
