# Helpers of this project.
#
#   moe_add_subdirectories(dir...)
#     add_subdirectory for every dir that has a CMakeLists.txt, in the order given.
#
#   add_moe_library(name source... [DEPENDS target...] [LINK_LIBS target...] [LLVM_ONLY] [NO_PCH])
#     A static library of compiler code. Links the shared libMLIR and libLLVM (LLVM_ONLY: libLLVM
#     alone), compiles with LLVM's flags and the shared precompiled header (not with LLVM_ONLY or
#     NO_PCH).
#       DEPENDS    tablegen targets whose headers must exist before the sources are compiled
#                  (every library that includes a generated header lists them)
#       LINK_LIBS  libraries of this project, or LLD's; linked PUBLIC. Never list upstream
#                  MLIR* or LLVM* component names: they would add a second, static copy.
#     Example:
#       add_moe_library(MLIRMoETransforms FuseActivation.cpp ToLoops.cpp
#         DEPENDS MLIRMoEPassIncGen LINK_LIBS MLIRMoE)
#
#   add_moe_tool(name source... [LINK_LIBS target...] [NO_INSTALL])
#     An executable of the compiler in build/bin, installed to bin.
#
#   moe_use_pch(target)
#     Lets a target of its own making reuse the precompiled header. The target must compile with
#     the flags that add_moe_library gives.

include_guard(GLOBAL)

function(moe_add_subdirectories)
  foreach(dir IN LISTS ARGN)
    # By glob, so that a folder that appears later makes the build configure again.
    file(GLOB list_file CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/${dir}/CMakeLists.txt)
    if(list_file)
      add_subdirectory(${dir})
    endif()
  endforeach()
endfunction()

function(moe_print_options)
  foreach(name MOE_ENABLE_COMPILER MOE_ENABLE_PCH MOE_ENABLE_CCACHE MOE_ENABLE_WERROR
          MOE_ENABLE_TESTS MOE_ENABLE_PYTHON MOE_SANITIZE CMAKE_BUILD_TYPE)
    message(STATUS "${name} = ${${name}}")
  endforeach()
endfunction()

function(moe_set_flags target)
  if(COMMAND llvm_update_compile_flags)
    llvm_update_compile_flags(${target})
  endif()
  if(MOE_ENABLE_WERROR)
    target_compile_options(${target} PRIVATE -Werror)
  endif()
endfunction()

# One precompiled header for all: parsing these headers costs 6 to 8 seconds in every file.
function(moe_add_pch)
  set(header ${PROJECT_SOURCE_DIR}/cmake/MoEPrecompiled.h)
  file(WRITE ${CMAKE_BINARY_DIR}/moe_pch.cpp.in "// Carries the precompiled header.\n")
  configure_file(${CMAKE_BINARY_DIR}/moe_pch.cpp.in ${CMAKE_BINARY_DIR}/moe_pch.cpp COPYONLY)
  add_library(moe_pch STATIC ${CMAKE_BINARY_DIR}/moe_pch.cpp)
  moe_set_flags(moe_pch)
  target_precompile_headers(moe_pch PRIVATE ${header})
  # What the precompiled header depends on besides compiler and flags. ccache takes this instead of
  # the header's bytes, which hold absolute paths, so build folders share their objects.
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${header})
  file(SHA256 ${header} hash)
  file(TIMESTAMP ${MLIR_DIR}/MLIRConfig.cmake stamp UTC)
  set(sum "${hash} ${MLIR_DIR} ${LLVM_PACKAGE_VERSION} ${stamp}\n")
  set(extension pch)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    set(extension gch)
  endif()
  file(WRITE
    ${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/moe_pch.dir/cmake_pch.hxx.${extension}.sum "${sum}")
endfunction()

function(moe_use_pch target)
  if(TARGET moe_pch)
    target_precompile_headers(${target} REUSE_FROM moe_pch)
  endif()
endfunction()

function(add_moe_library name)
  cmake_parse_arguments(ARG "LLVM_ONLY;NO_PCH" "" "DEPENDS;LINK_LIBS" ${ARGN})
  add_library(${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  moe_set_flags(${name})
  if(ARG_LINK_LIBS)
    target_link_libraries(${name} PUBLIC ${ARG_LINK_LIBS})
  endif()
  if(ARG_LLVM_ONLY)
    target_link_libraries(${name} PUBLIC LLVM)
  else()
    target_link_libraries(${name} PUBLIC MLIR LLVM)
    if(NOT ARG_NO_PCH)
      moe_use_pch(${name})
    endif()
  endif()
  if(ARG_DEPENDS)
    add_dependencies(${name} ${ARG_DEPENDS})
  endif()
endfunction()

function(add_moe_tool name)
  cmake_parse_arguments(ARG "NO_INSTALL" "" "LINK_LIBS;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_UNPARSED_ARGUMENTS})
  moe_set_flags(${name})
  target_link_libraries(${name} PRIVATE ${ARG_LINK_LIBS} MLIR LLVM)
  if(ARG_DEPENDS)
    add_dependencies(${name} ${ARG_DEPENDS})
  endif()
  if(NOT ARG_NO_INSTALL)
    install(TARGETS ${name} RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT compiler)
  endif()
endfunction()

if(MOE_ENABLE_CCACHE)
  find_program(MOE_CCACHE ccache)
  if(MOE_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
    # The sloppiness is what ccache asks for where a precompiled header is used.
    set(launcher ${CMAKE_COMMAND} -E env
        CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
        CCACHE_PCH_EXTSUM=1 CCACHE_BASEDIR=${PROJECT_SOURCE_DIR}
        ${MOE_CCACHE})
    set(CMAKE_C_COMPILER_LAUNCHER ${launcher})
    set(CMAKE_CXX_COMPILER_LAUNCHER ${launcher})
    if(CMAKE_CXX_COMPILER_ID MATCHES "Clang")
      add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:SHELL:-Xclang -fno-pch-timestamp>")
    endif()
  endif()
endif()

foreach(sanitizer IN LISTS MOE_SANITIZE)
  add_compile_options(-fsanitize=${sanitizer} -fno-omit-frame-pointer)
  add_link_options(-fsanitize=${sanitizer})
endforeach()
