// A GPU, or g++ pretending to be one (cuda_emulation.h), so that tests without a GPU run the launches and copies too.
#pragma once

#ifdef MCPT_EMULATE_CUDA
#include "cuda_emulation.h"
#else
#include <cuda_runtime.h>
#define MCPT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace megatron_cpt {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class Function>
__global__ void par_for_kernel(int64_t n, Function function) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += step) function(i);
}

struct Cuda {
  cudaStream_t stream;

  // Device memory that lives as long as the order.
  template <class T>
  class Array {
   public:
    Array() = default;
    explicit Array(const std::vector<T>& values) {
      if (values.empty()) return;
      check_cuda(cudaMalloc(reinterpret_cast<void**>(&data_), values.size() * sizeof(T)), "cudaMalloc");
      check_cuda(cudaMemcpy(data_, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    Array& operator=(Array&& other) noexcept {
      std::swap(data_, other.data_);
      return *this;
    }
    ~Array() { cudaFree(data_); }
    const T* data() const { return data_; }

   private:
    T* data_ = nullptr;
  };

  template <class T>
  static Array<T> upload(const std::vector<T>& values) {
    return Array<T>(values);
  }

  // Device memory for the length of one call, in the order of the stream.
  template <class T>
  class Scratch {
   public:
    Scratch(int64_t size, const Cuda& cuda) : stream_(cuda.stream) {
      if (size) check_cuda(cudaMallocAsync(reinterpret_cast<void**>(&data_), size * sizeof(T), stream_), "cudaMallocAsync");
    }
    Scratch(const std::vector<T>& values, const Cuda& cuda) : Scratch(static_cast<int64_t>(values.size()), cuda) {
      if (values.empty()) return;
      const size_t bytes = values.size() * sizeof(T);
      check_cuda(cudaMemcpyAsync(data_, values.data(), bytes, cudaMemcpyHostToDevice, stream_), "cudaMemcpyAsync");
    }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() {
      if (data_) cudaFreeAsync(data_, stream_);
    }
    T* data() { return data_; }

   private:
    cudaStream_t stream_;
    T* data_ = nullptr;
  };

  // function(0), ..., function(n - 1), queued on the stream.
  template <class Function>
  void par_for(int64_t n, const Function& function) const {
    if (n == 0) return;
    constexpr int64_t THREADS = 256, MOST_BLOCKS = 1 << 20;
    const unsigned grid = static_cast<unsigned>(std::min((n + THREADS - 1) / THREADS, MOST_BLOCKS));
    MCPT_LAUNCH(par_for_kernel<Function>, grid, THREADS, stream, n, function);
    check_cuda(cudaGetLastError(), "kernel launch");
  }
};

}  // namespace megatron_cpt
