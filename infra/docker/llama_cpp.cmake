# Build libllama and ggml only. llama-cpp-python forces LLAMA_BUILD_COMMON on in CMake's cache, which compiles llama.cpp's
# `common`, its HTTP library and its tools: 115 of 193 steps that are not used here. CMake includes this file when the
# project "llama.cpp" begins (CMAKE_PROJECT_llama.cpp_INCLUDE), and a normal variable hides the cached one.
set(LLAMA_BUILD_COMMON OFF)
