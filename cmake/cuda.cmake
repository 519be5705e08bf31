# pmc_fast._cuda, a module of its own: what cannot load it can still load pmc_fast._C.
if(NOT PMC_FAST_CUDA MATCHES "^(0|1|AUTO|EMULATED)$")
  message(FATAL_ERROR "PMC_FAST_CUDA: got '${PMC_FAST_CUDA}', expected 0, 1, AUTO or EMULATED")
endif()
if(PMC_FAST_CUDA STREQUAL "0")
  return()
endif()

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
if(PMC_FAST_CUDA STREQUAL "EMULATED")  # for tests
  set_source_files_properties(${cuda_sources} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "${pmc_cuda_as_cxx}")
  pybind11_add_module(_cuda NO_EXTRAS csrc/cuda/bindings.cpp csrc/cuda/emulate.cpp ${cuda_sources})
  target_include_directories(_cuda PRIVATE csrc)
  target_compile_definitions(_cuda PRIVATE PMC_CUDA_TARGETS="an emulated GPU")
  target_compile_options(_cuda PRIVATE -O2 -Wall -Wextra)
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PMC_FAST_CUDA STREQUAL "1")
    message(FATAL_ERROR "PMC_FAST_CUDA=1 asks for the CUDA kernels, but no nvcc was found: put it on PATH, or name it in "
                        "CUDACXX")
  endif()
  message(STATUS "pmc_fast: without CUDA kernels, no nvcc was found")
  return()
endif()

# sm_80's code also goes in as PTX, from which drivers make code for GPUs that are not listed.
set(CMAKE_CUDA_ARCHITECTURES 80 90a-real)
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  list(APPEND CMAKE_CUDA_ARCHITECTURES 100a-real)
endif()
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^([0-9]+a?).*" "sm_\\1" OUTPUT_VARIABLE targets)
list(JOIN targets ", " targets)

set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
pybind11_add_module(_cuda NO_EXTRAS csrc/cuda/bindings.cpp ${cuda_sources})
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE "PMC_CUDA_TARGETS=\"${targets}\"")
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra>
  "$<$<COMPILE_LANGUAGE:CUDA>:-O3;--threads=2;-Werror=all-warnings;-Xcompiler=-Wall,-Wextra>")
