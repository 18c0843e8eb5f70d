// The order of the data on a GPU, behind C functions (see megatron_cpt/mixture/order/cuda.py). `make cuda` builds it.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>

#include "backend_cuda.h"
#include "sampling_order.h"

#define MCPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Order = megatron_cpt::SampleOrder<megatron_cpt::Cuda>;

struct Message {
  char* text;
  int64_t size;

  void operator=(const char* what) const {
    std::strncpy(text, what, size - 1);
    text[size - 1] = '\0';
  }
};

}  // namespace

// Null, and why in `error`, when the description is wrong or there is no memory. The arrays are in host memory.
MCPT_EXPORT void* mcpt_order_create(const megatron_cpt::Node* nodes, int64_t num_nodes, const megatron_cpt::Stage* stages,
                                    int64_t num_stages, const int64_t* base, const megatron_cpt::Corpus* corpora,
                                    int64_t num_corpora, uint64_t seed, int64_t seq_length, int64_t block_size,
                                    int64_t block_origin, char* error, int64_t error_size) {
  try {
    return new Order({{nodes, nodes + num_nodes},
                      {stages, stages + num_stages},
                      {base, base + num_stages * num_corpora},
                      {corpora, corpora + num_corpora},
                      seed,
                      seq_length,
                      block_size,
                      block_origin});
  } catch (const std::exception& problem) {
    Message{error, error_size} = problem.what();
    return nullptr;
  }
}

// Samples first to first + count - 1 into arrays of the device, on the caller's stream. 0, or 1 and why in `error`.
MCPT_EXPORT int mcpt_order_locate(const void* order, int64_t first, int64_t count, int32_t* corpus, int64_t* epoch,
                                  int64_t* sample, int64_t* begin, void* stream, char* error, int64_t error_size) {
  try {
    static_cast<const Order*>(order)->locate(first, count, {corpus, epoch, sample, begin},
                                             megatron_cpt::Cuda{static_cast<cudaStream_t>(stream)});
    return 0;
  } catch (const std::exception& problem) {
    Message{error, error_size} = problem.what();
    return 1;
  }
}

MCPT_EXPORT void mcpt_order_destroy(void* order) { delete static_cast<Order*>(order); }
