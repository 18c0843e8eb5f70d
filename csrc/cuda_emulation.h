// As much of CUDA's runtime as backend_cuda.h uses, on the CPU under g++: one thread after the other, "device" memory from
// malloc. Kernels that synchronise or share memory would not work; there are none.
#pragma once

#include <cstdlib>
#include <cstring>

#define __global__
struct Dim3 {
  unsigned x = 1;
};
inline thread_local Dim3 blockIdx, threadIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice };

inline const char* cudaGetErrorString(cudaError_t status) { return status ? "out of memory" : "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMalloc(void** data, size_t bytes) {
  *data = std::malloc(bytes);
  return *data ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaMallocAsync(void** data, size_t bytes, cudaStream_t) { return cudaMalloc(data, bytes); }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline void cudaFree(void* data) { std::free(data); }
inline void cudaFreeAsync(void* data, cudaStream_t) { std::free(data); }

#define MCPT_LAUNCH(kernel, grid, block, stream, ...)                                     \
  do {                                                                                    \
    (void)(stream);                                                                       \
    gridDim.x = (grid);                                                                   \
    blockDim.x = (block);                                                                 \
    for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x)                            \
      for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(__VA_ARGS__); \
  } while (0)
