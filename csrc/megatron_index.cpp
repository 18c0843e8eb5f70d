// megatron_cpt.mixture.order._megatron_index: the two slow builders of megatron_cpt/mixture/order/megatron.py.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <limits>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "megatron_index_core.h"

namespace py = pybind11;
using namespace megatron_cpt;

namespace {

constexpr int64_t MAX_THREADS = 1024;
constexpr int64_t MAX_SEQ_LENGTH = std::numeric_limits<int32_t>::max() - 1;  // with the extra token, an int32 in Megatron
constexpr int64_t MAX_DATASETS = std::numeric_limits<int16_t>::max() - 1;    // Megatron's own limit

using Int32Array = py::array_t<int32_t, py::array::c_style>;
using DoubleArray = py::array_t<double, py::array::c_style>;

void check(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

void check_range(int64_t value, int64_t low, int64_t high, const std::string& name) {
  check(low <= value && value <= high,
        name + " is " + std::to_string(value) + "; expected " + std::to_string(low) + " to " + std::to_string(high));
}

template <class Array>
void check_vector(const Array& array, const std::string& name) {
  const bool aligned = reinterpret_cast<uintptr_t>(array.data()) % alignof(typename Array::value_type) == 0;
  check(array.ndim() == 1 && array.size() > 0 && aligned, name + " is not an aligned vector of at least one value");
}

// task(0) to task(count - 1), each on a thread of its own where the system grants one.
template <class Task>
void run_all(int64_t count, const Task& task) {
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(count));
  for (int64_t i = 1; i < count; ++i) {
    try {
      threads.emplace_back(task, i);
    } catch (const std::system_error&) {
      task(i);
    }
  }
  task(0);
  for (std::thread& thread : threads) thread.join();
}

// The entries of a stream in as many consecutive chunks as there are threads.
struct Chunks {
  DocumentStream stream;
  int64_t count;

  int64_t begin(int64_t chunk) const { return stream.num_entries * chunk / count; }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

std::vector<ChunkSum> sum_all(const Chunks& chunks) {
  std::vector<ChunkSum> sums(static_cast<size_t>(chunks.count));
  run_all(chunks.count, [&](int64_t i) { sums[i] = sum_chunk(chunks.stream, chunks.begin(i), chunks.end(i)); });
  return sums;
}

// The first token of each chunk, and at the end the number of tokens.
std::vector<int64_t> chunk_starts(const Chunks& chunks, const std::vector<ChunkSum>& sums) {
  std::vector<int64_t> starts{0};
  for (const ChunkSum& sum : sums) {
    if (sum.bad_entry >= 0) {
      const std::string document = std::to_string(chunks.stream.document_index[sum.bad_entry]);
      check(false, "document_index[" + std::to_string(sum.bad_entry) + "] is " + document + "; expected documents from 0 to " +
                       std::to_string(chunks.stream.num_documents - 1) + " of length 0 or more");
    }
    starts.push_back(starts.back() + sum.tokens);
  }
  return starts;
}

template <class T>
py::array emit_all(const Chunks& chunks, const std::vector<int64_t>& starts, int64_t seq_length, int64_t num_samples) {
  py::array_t<T> sample_index({num_samples + 1, int64_t{2}});
  T* out = sample_index.mutable_data();
  out[0] = out[1] = 0;  // the first sample begins with the first entry, even when that has no tokens
  py::gil_scoped_release release;
  run_all(chunks.count, [&](int64_t i) {
    emit_chunk(chunks.stream, chunks.begin(i), chunks.end(i), starts[i], seq_length, num_samples, out);
  });
  return std::move(sample_index);
}

py::array build_sample_index(const Int32Array& lengths, const Int32Array& document_index, int64_t seq_length,
                             int64_t num_samples, int64_t threads, bool wide) {
  check_vector(lengths, "lengths");
  check_vector(document_index, "document_index");
  check_range(seq_length, 1, MAX_SEQ_LENGTH, "seq_length");
  check_range(threads, 1, MAX_THREADS, "threads");
  const DocumentStream stream{lengths.data(), lengths.size(), document_index.data(), document_index.size()};
  const int64_t widest = std::numeric_limits<int32_t>::max();
  check(wide || stream.num_entries <= widest, "document_index has more than 2**31 - 1 entries; expected wide");
  const Chunks chunks{stream, std::min<int64_t>(threads, stream.num_entries)};
  std::vector<ChunkSum> sums;
  {
    py::gil_scoped_release release;
    sums = sum_all(chunks);
  }
  const std::vector<int64_t> starts = chunk_starts(chunks, sums);
  check(starts.back() > 0, "the documents have 0 tokens; expected at least 1");
  check_range(num_samples, 0, (starts.back() - 1) / seq_length, "num_samples");
  return wide ? emit_all<int64_t>(chunks, starts, seq_length, num_samples)
              : emit_all<int32_t>(chunks, starts, seq_length, num_samples);
}

py::tuple build_blending_index(const DoubleArray& weights, int64_t num_samples) {
  check_vector(weights, "weights");
  check_range(weights.size(), 1, MAX_DATASETS, "number of weights");
  check_range(num_samples, 0, int64_t{1} << 53, "num_samples");
  for (py::ssize_t i = 0; i < weights.size(); ++i) {
    const double weight = weights.data()[i];
    check(std::isfinite(weight) && weight > 0,
          "weights[" + std::to_string(i) + "] is " + std::to_string(weight) + "; expected finite numbers above 0");
  }
  py::array_t<int16_t> dataset_index(num_samples);
  py::array_t<int64_t> dataset_sample_index(num_samples);
  std::vector<double> taken(static_cast<size_t>(weights.size()));
  int16_t* datasets = dataset_index.mutable_data();
  int64_t* samples = dataset_sample_index.mutable_data();
  {
    py::gil_scoped_release release;
    blend(weights.data(), weights.size(), num_samples, taken.data(), datasets, samples);
  }
  return py::make_tuple(std::move(dataset_index), std::move(dataset_sample_index));
}

}  // namespace

PYBIND11_MODULE(_megatron_index, module) {
  module.doc() = "Native twin of the sample and blending index of megatron_cpt.mixture.order.megatron";
  module.def("build_sample_index", &build_sample_index, py::arg("lengths").noconvert(), py::arg("document_index").noconvert(),
             py::arg("seq_length"), py::arg("num_samples"), py::arg("threads"), py::arg("wide"),
             "int32 lengths (documents,), int32 document_index (entries,) -> (num_samples + 1, 2) int32, or int64 if wide: "
             "entry and offset at which each sample begins");
  module.def("build_blending_index", &build_blending_index, py::arg("weights").noconvert(), py::arg("num_samples"),
             "float64 weights (datasets,) -> int16 dataset_index, int64 dataset_sample_index, (num_samples,) each");
}
