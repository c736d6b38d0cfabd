# The gate to LLVM and MLIR: one version, one way to link (the shared libMLIR and libLLVM).
#
# Sets up: the packages MLIR, LLVM and LLD, TableGen and the LLVM CMake helpers, include
# directories, definitions and compile flags for everything below this directory.

set(MOE_LLVM_ROOT "/usr/lib/llvm-22" CACHE PATH "Where LLVM and MLIR 22.1 are installed")

# Decided before the packages are read: with the shared libMLIR nothing has to be listed and a
# tool takes 100 KB; a mixture of both would give two copies of every type id.
set(MLIR_LINK_MLIR_DYLIB ON)

find_package(MLIR 22.1 QUIET CONFIG HINTS ${MOE_LLVM_ROOT}/lib/cmake/mlir)
if(NOT MLIR_FOUND)
  set(found "none")
  if(MLIR_CONSIDERED_VERSIONS)
    set(found "version ${MLIR_CONSIDERED_VERSIONS}")
  endif()
  message(FATAL_ERROR
    "expected MLIR 22.1 under ${MOE_LLVM_ROOT} (or -DMLIR_DIR=...), but got ${found}; "
    "on Debian install: libmlir-22-dev mlir-22-tools llvm-22-dev llvm-22-tools liblld-22-dev")
endif()
message(STATUS "MLIR ${MLIR_VERSION} (LLVM ${LLVM_PACKAGE_VERSION}) in ${MLIR_DIR}")
if(NOT TARGET MLIR)
  message(FATAL_ERROR "expected the shared library libMLIR in ${MLIR_DIR}, but got static "
    "archives only; on Debian install libmlir-22-dev")
endif()
find_package(LLD QUIET CONFIG HINTS ${LLVM_DIR}/../lld)
if(NOT LLD_FOUND)
  message(FATAL_ERROR "expected LLD ${LLVM_PACKAGE_VERSION} beside LLVM, but got none; "
    "on Debian install liblld-22-dev")
endif()

list(APPEND CMAKE_MODULE_PATH ${MLIR_CMAKE_DIR} ${LLVM_CMAKE_DIR})
set(LLVM_BUILD_TOOLS ON)
set(LLVM_RUNTIME_OUTPUT_INTDIR ${CMAKE_RUNTIME_OUTPUT_DIRECTORY})
set(LLVM_LIBRARY_OUTPUT_INTDIR ${CMAKE_LIBRARY_OUTPUT_DIRECTORY})
set(MLIR_BINARY_DIR ${CMAKE_BINARY_DIR})
# Debian ships lit beside the tools, not as the llvm-lit that LLVM's helpers expect.
set(LLVM_EXTERNAL_LIT "${LLVM_TOOLS_BINARY_DIR}/lit" CACHE FILEPATH "The lit test runner")
set(LLVM_LIT_ARGS "-sv" CACHE STRING "Default options for lit")

include(TableGen)
include(AddLLVM)
include(AddMLIR)
# LLVM has RTTI on and exceptions off in Debian; HandleLLVMOptions and llvm_update_compile_flags
# give our code the same.
set(LLVM_ENABLE_WARNINGS ON)
include(HandleLLVMOptions)

include_directories(SYSTEM ${LLVM_INCLUDE_DIRS} ${MLIR_INCLUDE_DIRS})
# As one string add_definitions would quote it into a single broken definition.
separate_arguments(moe_llvm_definitions NATIVE_COMMAND "${LLVM_DEFINITIONS}")
add_definitions(${moe_llvm_definitions})
