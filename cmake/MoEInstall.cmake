# What `cmake --install` writes, and what the Python wheel carries inside the package.
#
#   bin/      moec moe-opt moe-reduce moe-lsp-server
#   lib/      libmoec.so.1 libmoec.a cmake/moec/moecConfig.cmake pkgconfig/moec.pc
#   include/  moec.h moec/*.h moec/errors.def
#   share/    moec/models/*.json (the model table)
#
# The tree can be moved: tools look for ../share/moec, the package files for their own place.

include(CMakePackageConfigHelpers)

if(TARGET moec_runtime)
  set(moe_runtime_targets moec_runtime)
  set_target_properties(moec_runtime PROPERTIES EXPORT_NAME moec)
  add_library(moec::moec ALIAS moec_runtime)
  if(TARGET moec_runtime_static)
    list(APPEND moe_runtime_targets moec_runtime_static)
    set_target_properties(moec_runtime_static PROPERTIES EXPORT_NAME moec_static)
    add_library(moec::moec_static ALIAS moec_runtime_static)
  endif()
  foreach(target IN LISTS moe_runtime_targets)
    target_include_directories(${target} INTERFACE
      $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
      $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  endforeach()
  install(TARGETS ${moe_runtime_targets} EXPORT moecTargets
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT runtime)
  install(EXPORT moecTargets NAMESPACE moec:: COMPONENT runtime
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/moec)
  configure_package_config_file(
    ${PROJECT_SOURCE_DIR}/cmake/moecConfig.cmake.in ${CMAKE_BINARY_DIR}/moecConfig.cmake
    INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/moec)
  write_basic_package_version_file(${CMAKE_BINARY_DIR}/moecConfigVersion.cmake
    COMPATIBILITY SameMajorVersion)
  install(FILES ${CMAKE_BINARY_DIR}/moecConfig.cmake ${CMAKE_BINARY_DIR}/moecConfigVersion.cmake
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/moec COMPONENT runtime)
  configure_file(${PROJECT_SOURCE_DIR}/cmake/moec.pc.in ${CMAKE_BINARY_DIR}/moec.pc @ONLY)
  install(FILES ${CMAKE_BINARY_DIR}/moec.pc
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig COMPONENT runtime)
endif()

install(FILES ${PROJECT_SOURCE_DIR}/include/moec.h
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT runtime OPTIONAL)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/moec
  DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT runtime
  FILES_MATCHING PATTERN "*.h" PATTERN "errors.def")
if(EXISTS ${PROJECT_SOURCE_DIR}/share)
  install(DIRECTORY ${PROJECT_SOURCE_DIR}/share/ DESTINATION share COMPONENT compiler)
  # The build tree has the same shape as an installed one, so tools find share from build/bin too.
  file(CREATE_LINK ${PROJECT_SOURCE_DIR}/share ${CMAKE_BINARY_DIR}/share SYMBOLIC)
endif()
