// SampleOrder for any backend: it checks the description, prepares the tables of small permutations, and runs `locate` for
// many samples. A backend gives `upload`, `Scratch`, `par_for` (see backend_cpu.h, backend_cuda.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "sampling_core.h"

namespace megatron_cpt {

constexpr int64_t SAMPLES_LIMIT = int64_t{1} << 62;
constexpr int64_t BEFORE_LIMIT = SAMPLES_LIMIT / 2, BASE_LIMIT = SAMPLES_LIMIT / 4;  // their sum with a sample is below 2^63
constexpr int64_t BLOCK_LIMIT = int64_t{1} << 24;  // bounds the memory of the tables of a block's corpora
constexpr uint64_t RAMP_LIMIT = uint64_t{1} << 46;
constexpr int64_t PIECE = int64_t{1} << 20;  // samples of a call that are prepared together: bounds the tables' memory

// The description of an order in host memory.
struct Description {
  std::vector<Node> nodes;
  std::vector<Stage> stages;
  std::vector<int64_t> base;
  std::vector<Corpus> corpora;
  uint64_t seed;
  int64_t seq_length, block_size, block_origin;

  OrderView view() const {
    return {nodes.data(),
            stages.data(),
            base.data(),
            corpora.data(),
            static_cast<int32_t>(stages.size()),
            static_cast<int32_t>(corpora.size()),
            seed,
            seq_length,
            block_size,
            block_origin};
  }
};

inline void require(bool holds, const std::string& name, int64_t value, const std::string& wanted) {
  if (!holds) throw std::invalid_argument(name + " is " + std::to_string(value) + "; expected " + wanted);
}

inline void require_size(int64_t value, const std::string& name) {
  require(0 < value && value <= SAMPLES_LIMIT, name, value, "1 to 2**62");
}

inline void require_before(int64_t value, const std::string& name) {
  require(0 <= value && value <= BEFORE_LIMIT, name, value, "0 to 2**61");
}

// Samples each corpus gives before sample n of the run, by what stage `number` says.
inline std::vector<int128_t> counts_by(const OrderView& order, int32_t number, int64_t n) {
  const Stage& stage = order.stages[number];
  const int64_t* base = order.base + static_cast<int64_t>(number) * order.num_corpora;
  std::vector<int128_t> counts(base, base + order.num_corpora);
  const uint64_t k = n - stage.start, left = stage.left_count(k);
  std::vector<std::pair<int32_t, uint64_t>> open{{stage.left, stage.left_before + left}};
  if (stage.right != NO_TREE) open.push_back({stage.right, stage.right_before + k - left});
  while (!open.empty()) {
    const auto [tree, samples] = open.back();
    open.pop_back();
    if (tree < 0) {
      counts[~tree] += samples;
    } else {
      const uint64_t to_left = order.nodes[tree].left_count(samples);
      open.push_back({order.nodes[tree].left, to_left});
      open.push_back({order.nodes[tree].right, samples - to_left});
    }
  }
  return counts;
}

// Each corpus is at most once in a stage. So the walk has no more steps than corpora, though nodes may share their children.
inline void check_corpora_once(const Description& order, size_t number) {
  std::vector<bool> seen(order.corpora.size());
  std::vector<int32_t> open{order.stages[number].left};
  if (order.stages[number].right != NO_TREE) open.push_back(order.stages[number].right);
  while (!open.empty()) {
    const int32_t tree = open.back();
    open.pop_back();
    if (tree < 0) {
      require(!seen[~tree], "a corpus of stage[" + std::to_string(number) + "]", ~tree, "each once");
      seen[~tree] = true;
    } else {
      open.push_back(order.nodes[tree].right);
      open.push_back(order.nodes[tree].left);
    }
  }
}

// No corpus is to give a sample before its first, nor one stage to begin before where the stage before it has come.
inline void check_counts(const Description& order) {
  const OrderView view = order.view();
  const auto name = [](size_t i) { return "samples before stage of corpus[" + std::to_string(i) + "]"; };
  for (int32_t number = 1; number < view.num_stages; ++number) {
    const int64_t start = view.stages[number].start;
    const auto before = counts_by(view, number - 1, start), after = counts_by(view, number, start);
    for (size_t i = 0; i < after.size(); ++i) {
      require(after[i] >= before[i], name(i), static_cast<int64_t>(after[i]), "no fewer than the stage before has given");
    }
  }
  const auto first = counts_by(view, view.stage_of(view.block_origin), view.block_origin);
  for (size_t i = 0; i < first.size(); ++i) require(first[i] >= 0, name(i), static_cast<int64_t>(first[i]), "0 or more");
}

// Whatever the arrays hold, an order that passes reads nothing outside them and every walk ends.
inline void check(const Description& order) {
  const auto check_tree = [&](int32_t tree, size_t before, const std::string& name) {
    const bool known = tree < 0 ? static_cast<size_t>(~tree) < order.corpora.size() : static_cast<size_t>(tree) < before;
    require(known, name, tree, "an earlier node or ~corpus");
  };
  const auto at = [](const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; };
  require(!order.stages.empty(), "number of stages", 0, "1 or more");
  require(!order.corpora.empty(), "number of corpora", 0, "1 or more");
  require(order.base.size() == order.stages.size() * order.corpora.size(), "size of base", order.base.size(),
          "stages x corpora");
  require_size(order.seq_length, "seq_length");
  require(0 < order.block_size && order.block_size <= BLOCK_LIMIT, "block_size", order.block_size, "1 to 2**24");
  require(0 <= order.block_origin && order.block_origin <= SAMPLES_LIMIT, "block_origin", order.block_origin, "0 to 2**62");
  for (size_t i = 0; i < order.base.size(); ++i) {
    require(-BASE_LIMIT <= order.base[i] && order.base[i] <= BASE_LIMIT, at("base", i), order.base[i], "-2**60 to 2**60");
  }
  for (size_t i = 0; i < order.nodes.size(); ++i) {
    check_tree(order.nodes[i].left, i, at("left child of node", i));
    check_tree(order.nodes[i].right, i, at("right child of node", i));
  }
  for (size_t i = 0; i < order.stages.size(); ++i) {
    const Stage& stage = order.stages[i];
    check_tree(stage.left, order.nodes.size(), at("left tree of stage", i));
    if (stage.right != NO_TREE) check_tree(stage.right, order.nodes.size(), at("right tree of stage", i));
    const bool in_order = i ? order.stages[i - 1].start <= stage.start
                            : 0 <= stage.start && stage.start <= order.block_origin;
    require(in_order && stage.start <= SAMPLES_LIMIT, at("start of stage", i), stage.start,
            "0 to block_origin first, then no less than before");
    require(stage.length > 0 && (!stage.ramp || stage.length <= RAMP_LIMIT), at("length of stage", i), stage.length,
            "1 or more; at most 2**46 with a ramp");
    const auto distance = [&] { return static_cast<uint64_t>(order.stages[i + 1].start) - static_cast<uint64_t>(stage.start); };
    const bool ends = i + 1 < order.stages.size() && distance() <= stage.length;
    require(!stage.ramp || ends, at("ramp of stage", i), stage.ramp, "0, or another stage where this one ends");
    require(stage.ramp <= ~stage.share + 1 || !stage.share, at("ramp of stage", i), stage.ramp, "one to a share of 1 at most");
    require_before(stage.left_before, at("left_before of stage", i));
    require_before(stage.right_before, at("right_before of stage", i));
    check_corpora_once(order, i);
  }
  for (size_t i = 0; i < order.corpora.size(); ++i) {
    require_size(order.corpora[i].samples, at("samples of corpus", i));
    require_size(order.corpora[i].tokens, at("tokens of corpus", i));
    const bool fits = order.corpora[i].samples <= (order.corpora[i].tokens - 1) / order.seq_length;
    require(fits, at("tokens of corpus", i), order.corpora[i].tokens, "samples x seq_length + 1 or more");
  }
  check_counts(order);
}

// Samples each corpus gives before sample n of the run (whole blocks).
inline std::vector<int64_t> count(const OrderView& order, int64_t n) {
  const auto counts = counts_by(order, order.stage_of(n), n);
  return {counts.begin(), counts.end()};
}

// Where the results of a call go: arrays of `count`, in the memory of the backend.
struct Output {
  int32_t* corpus;
  int64_t *epoch, *sample, *begin;
};

// Work for `par_for`, one call for each block, each (corpus, epoch) and each sample.
struct FillBlockTable {
  OrderView order;
  int64_t first_block;
  uint16_t* tables;

  MCPT_HOST_DEVICE void operator()(int64_t i) const {
    shuffle_table(order.block_size, order.block_key(first_block + i), tables + i * order.block_size);
  }
};

struct EpochTable {
  int32_t corpus;
  int64_t epoch, begin;  // where its table begins
};

struct FillEpochTable {
  OrderView order;
  const EpochTable* wanted;
  uint16_t* tables;

  MCPT_HOST_DEVICE void operator()(int64_t i) const {
    const EpochTable& table = wanted[i];
    shuffle_table(order.corpora[table.corpus].samples, order.epoch_key(table.corpus, table.epoch), tables + table.begin);
  }
};

struct LocateOne {
  OrderView order;
  TablesView tables;
  int64_t first;
  Output output;

  MCPT_HOST_DEVICE void operator()(int64_t i) const {
    const SamplePlace place = locate(order, tables, first + i);
    output.corpus[i] = place.corpus;
    output.epoch[i] = place.epoch;
    output.sample[i] = place.sample;
    output.begin[i] = place.begin;
  }
};

template <class Backend>
class SampleOrder {
 public:
  explicit SampleOrder(Description description) : host_(std::move(description)) {
    check(host_);
    nodes_ = Backend::upload(host_.nodes);
    stages_ = Backend::upload(host_.stages);
    base_ = Backend::upload(host_.base);
    corpora_ = Backend::upload(host_.corpora);
  }
  SampleOrder(const SampleOrder&) = delete;
  SampleOrder& operator=(const SampleOrder&) = delete;

  // Samples first to first + count - 1.
  void locate(int64_t first, int64_t count, Output output, const Backend& backend) const {
    require(host_.block_origin <= first && first <= SAMPLES_LIMIT, "first sample", first, "block_origin to 2**62");
    require(0 <= count && count <= SAMPLES_LIMIT - first, "number of samples", count, "0 to 2**62 less the first");
    for (int64_t done = 0; done < count; done += PIECE) {
      locate_piece(first + done, std::min(PIECE, count - done),
                   {output.corpus + done, output.epoch + done, output.sample + done, output.begin + done}, backend);
    }
  }

 private:
  OrderView device_view() const {
    OrderView view = host_.view();
    view.nodes = nodes_.data();
    view.stages = stages_.data();
    view.base = base_.data();
    view.corpora = corpora_.data();
    return view;
  }

  void locate_piece(int64_t first, int64_t count, Output output, const Backend& backend) const {
    const OrderView host = host_.view(), order = device_view();
    TablesView tables{};
    tables.first_block = host.block_of(first);
    const int64_t blocks = host.block_of(first + count - 1) + 1 - tables.first_block;
    const bool small_blocks = static_cast<uint64_t>(host.block_size) <= TABLE_LIMIT;
    typename Backend::template Scratch<uint16_t> of_blocks(small_blocks ? blocks * host.block_size : 0, backend);
    if (small_blocks) {
      backend.par_for(blocks, FillBlockTable{order, tables.first_block, of_blocks.data()});
      tables.of_blocks = of_blocks.data();
    }

    const EpochTables wanted = epoch_tables(host.first_of_block(tables.first_block),
                                            host.first_of_block(tables.first_block + blocks));
    typename Backend::template Scratch<EpochTable> list(wanted.list, backend);
    typename Backend::template Scratch<int64_t> begins(wanted.begins, backend), epochs(wanted.first_epoch, backend);
    typename Backend::template Scratch<uint16_t> of_epochs(wanted.entries, backend);
    backend.par_for(wanted.list.size(), FillEpochTable{order, list.data(), of_epochs.data()});
    tables.of_epochs = of_epochs.data();
    tables.epochs_begin = begins.data();
    tables.first_epoch = epochs.data();
    backend.par_for(count, LocateOne{order, tables, first, output});
  }

  // Which epochs of which small corpora samples first to last - 1 (whole blocks) lie in.
  struct EpochTables {
    std::vector<EpochTable> list;
    std::vector<int64_t> begins, first_epoch;  // by corpus
    int64_t entries = 0;
  };

  EpochTables epoch_tables(int64_t first, int64_t last) const {
    EpochTables wanted;
    const OrderView order = host_.view();
    wanted.begins.resize(order.num_corpora);
    wanted.first_epoch.resize(order.num_corpora);
    const auto is_small = [](const Corpus& corpus) { return static_cast<uint64_t>(corpus.samples) <= TABLE_LIMIT; };
    if (std::none_of(host_.corpora.begin(), host_.corpora.end(), is_small)) return wanted;
    const std::vector<int64_t> from = count(order, first), to = count(order, last);
    for (int32_t corpus = 0; corpus < order.num_corpora; ++corpus) {
      const int64_t samples = order.corpora[corpus].samples;
      if (!is_small(order.corpora[corpus]) || from[corpus] == to[corpus]) continue;
      wanted.begins[corpus] = wanted.entries;
      wanted.first_epoch[corpus] = from[corpus] / samples;
      for (int64_t epoch = from[corpus] / samples; epoch <= (to[corpus] - 1) / samples; ++epoch) {
        wanted.list.push_back({corpus, epoch, wanted.entries});
        wanted.entries += samples;
      }
    }
    return wanted;
  }

  Description host_;
  typename Backend::template Array<Node> nodes_;
  typename Backend::template Array<Stage> stages_;
  typename Backend::template Array<int64_t> base_;
  typename Backend::template Array<Corpus> corpora_;
};

}  // namespace megatron_cpt
