// megatron_cpt.mixture.order._sampling: megatron_cpt/mixture/order/order.py for many samples at once.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <tuple>
#include <utility>
#include <vector>

#include "backend_cpu.h"
#include "sampling_order.h"

namespace py = pybind11;
using namespace megatron_cpt;

namespace {

template <class T>
using Input = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <class T>
std::vector<T> to_vector(const Input<T>& values) {
  return {values.data(), values.data() + values.size()};
}

class PySampleOrder {
 public:
  PySampleOrder(const Input<Node>& nodes, const Input<Stage>& stages, const Input<int64_t>& base,
                const Input<Corpus>& corpora, uint64_t seed, int64_t seq_length, int64_t block_size, int64_t block_origin)
      : order_({to_vector(nodes), to_vector(stages), to_vector(base), to_vector(corpora), seed, seq_length, block_size,
                block_origin}) {}

  py::tuple locate(int64_t first, int64_t count, int64_t threads) const {
    require(0 <= count && count <= SAMPLES_LIMIT, "number of samples", count, "0 to 2**62");  // before memory is asked for
    py::array_t<int32_t> corpus(count);
    py::array_t<int64_t> epoch(count), sample(count), begin(count);
    const Output output{corpus.mutable_data(), epoch.mutable_data(), sample.mutable_data(), begin.mutable_data()};
    {
      py::gil_scoped_release release;
      order_.locate(first, count, output, Cpu{threads});
    }
    return py::make_tuple(std::move(corpus), std::move(epoch), std::move(sample), std::move(begin));
  }

 private:
  SampleOrder<Cpu> order_;
};

}  // namespace

PYBIND11_MODULE(_sampling, module) {
  module.doc() = "Native twin of megatron_cpt.mixture.order.order.SampleOrder";
  PYBIND11_NUMPY_DTYPE(Node, left_share, left, right);
  PYBIND11_NUMPY_DTYPE(Stage, start, share, phase, ramp, length, left_before, right_before, left, right);
  PYBIND11_NUMPY_DTYPE(Corpus, tokens, samples, key);
  py::class_<PySampleOrder>(module, "SampleOrder")
      .def(py::init<const Input<Node>&, const Input<Stage>&, const Input<int64_t>&, const Input<Corpus>&, uint64_t, int64_t,
                    int64_t, int64_t>(),
           py::arg("nodes"), py::arg("stages"), py::arg("base"), py::arg("corpora"), py::arg("seed"),
           py::arg("seq_length"), py::arg("block_size"), py::arg("block_origin"), "The fields of OrderTables")
      .def("locate", &PySampleOrder::locate, py::arg("first"), py::arg("count"), py::arg("threads") = 1,
           "Samples first to first + count - 1 -> (int32 corpus, int64 epoch, int64 sample, int64 begin)");
}
