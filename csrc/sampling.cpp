// megatron_cpt.data._sampling: the lookups of megatron_cpt/data/sampling.py for many samples at once.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "sampling_core.h"

namespace py = pybind11;
using namespace megatron_cpt;

namespace {

constexpr int64_t SAMPLES_LIMIT = int64_t{1} << 62;

void check(bool holds, const std::string& message) {
  if (!holds) throw py::value_error(message);
}

void check_size(int64_t value, const std::string& name) {
  check(0 < value && value <= SAMPLES_LIMIT, name + " is " + std::to_string(value) + "; use 1 to 2**62");
}

// The permutations of one call, kept while they may be needed again: the current block's, and for each corpus those of
// a few epochs, because the samples of a block near the end of an epoch come from both sides of it.
class PermutationCache {
 public:
  PermutationCache(const OrderView& order, size_t corpora) : order_(order), epochs_(corpora * EPOCHS_KEPT) {}

  const Permutation& of_block(int64_t block) {
    if (block_.number != block) block_.fill(block, order_.block_size, order_.block_key(block));
    return block_.permutation;
  }

  const Permutation& of_epoch(int32_t corpus, int64_t epoch) {
    Slot& slot = epochs_[corpus * EPOCHS_KEPT + epoch % EPOCHS_KEPT];
    if (slot.number != epoch) slot.fill(epoch, order_.samples_per_epoch[corpus], order_.epoch_key(corpus, epoch));
    return slot.permutation;
  }

 private:
  static constexpr size_t EPOCHS_KEPT = 4;

  struct Slot {
    int64_t number = -1;  // of the block or epoch
    Permutation permutation{};
    std::vector<uint16_t> table;

    void fill(int64_t new_number, uint64_t n, uint64_t key) {
      if (n <= TABLE_LIMIT) table.resize(n);
      permutation = make_permutation(n, key, table.data());
      number = new_number;
    }
  };

  const OrderView& order_;
  Slot block_;
  std::vector<Slot> epochs_;
};

class SampleOrder {
 public:
  SampleOrder(const std::vector<std::tuple<uint64_t, int32_t, int32_t>>& nodes, int32_t root,
              std::vector<int64_t> samples_per_epoch, uint64_t seed, int64_t block_size)
      : samples_per_epoch_(std::move(samples_per_epoch)) {
    for (size_t i = 0; i < nodes.size(); ++i) {
      const auto& [left_share, left, right] = nodes[i];
      check_child(left, i, "left child of node " + std::to_string(i));
      check_child(right, i, "right child of node " + std::to_string(i));
      nodes_.push_back({left_share, left, right});
    }
    check_child(root, nodes.size(), "root");
    for (size_t i = 0; i < samples_per_epoch_.size(); ++i) {
      check_size(samples_per_epoch_[i], "samples_per_epoch[" + std::to_string(i) + "]");
    }
    check_size(block_size, "block_size");
    order_ = {nodes_.data(), root, samples_per_epoch_.data(), seed, block_size};
  }
  SampleOrder(const SampleOrder&) = delete;  // order_ points into this object
  SampleOrder& operator=(const SampleOrder&) = delete;

  py::tuple locate(int64_t first, int64_t count) const {
    check(first >= 0 && count >= 0 && first <= SAMPLES_LIMIT && count <= SAMPLES_LIMIT - first,
          "samples " + std::to_string(first) + " and " + std::to_string(count) + " from there; use 0 to 2**62");
    py::array_t<int32_t> corpus(count);
    py::array_t<int64_t> epoch(count), sample(count);
    fill(first, count, corpus.mutable_data(), epoch.mutable_data(), sample.mutable_data());
    return py::make_tuple(std::move(corpus), std::move(epoch), std::move(sample));
  }

 private:
  // Children come before their parents in the table, so that every walk from the root ends.
  void check_child(int32_t child, size_t parent, const std::string& name) const {
    const bool known = child < 0 ? static_cast<size_t>(~child) < samples_per_epoch_.size() : static_cast<size_t>(child) < parent;
    check(known, name + " is " + std::to_string(child) + "; use an earlier node or ~corpus");
  }

  void fill(int64_t first, int64_t count, int32_t* corpus, int64_t* epoch, int64_t* sample) const {
    py::gil_scoped_release release;
    PermutationCache permutations(order_, samples_per_epoch_.size());
    for (int64_t i = 0; i < count; ++i) {
      const SamplePlace place = megatron_cpt::locate(order_, first + i, permutations);
      corpus[i] = place.corpus;
      epoch[i] = place.epoch;
      sample[i] = place.sample;
    }
  }

  std::vector<Node> nodes_;
  std::vector<int64_t> samples_per_epoch_;
  OrderView order_{};
};

}  // namespace

PYBIND11_MODULE(_sampling, module) {
  module.doc() = "Native twin of megatron_cpt.data.sampling.SampleOrder";
  py::class_<SampleOrder>(module, "SampleOrder")
      .def(py::init<const std::vector<std::tuple<uint64_t, int32_t, int32_t>>&, int32_t, std::vector<int64_t>, uint64_t,
                    int64_t>(),
           py::arg("nodes"), py::arg("root"), py::arg("samples_per_epoch"), py::arg("seed"), py::arg("block_size"),
           "nodes: (left_share, left, right), children first; a child is the index of a node, or ~corpus")
      .def("locate", &SampleOrder::locate, py::arg("first"), py::arg("count"),
           "Samples first to first + count - 1 -> (int32 corpus, int64 epoch, int64 sample of the corpus)");
}
