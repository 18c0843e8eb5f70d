// The order of the data in integers: the same definitions as megatron_cpt/mixture/order/, which is the specification.
//
// Header-only and without floats, allocation or exceptions: the same functions are compiled for the CPU and, by nvcc, for a
// GPU. Numbers of samples are below 2^62 and stages with a ramp below 2^46 (the callers check), so no sum here overflows.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MCPT_HOST_DEVICE __host__ __device__
#else
#define MCPT_HOST_DEVICE
#endif

namespace megatron_cpt {

__extension__ typedef unsigned __int128 uint128_t;
__extension__ typedef __int128 int128_t;

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
constexpr uint64_t MIXER = 0xD6E8FEB86659FD93;
constexpr uint64_t TABLE_LIMIT = 4096;  // table entries fit in uint16_t
constexpr int HALF_ROUNDS = 8;
constexpr int32_t NO_TREE = INT32_MIN;
constexpr uint64_t BLOCK = 0, EPOCH = 1, PHASE = 2;  // what a key is for

// A bijection of 64-bit integers that looks random.
MCPT_HOST_DEVICE inline uint64_t mix64(uint64_t x) {
  x ^= x >> 32;
  x *= MIXER;
  x ^= x >> 32;
  x *= MIXER;
  return x ^ (x >> 32);
}

// One key from several integers; the order of the parts matters.
template <class... Parts>
MCPT_HOST_DEVICE inline uint64_t combine(Parts... parts) {
  uint64_t key = 0;
  ((key = mix64(key + GOLDEN + static_cast<uint64_t>(parts))), ...);
  return key;
}

// Up to TABLE_LIMIT values a permutation is a Fisher-Yates table...
MCPT_HOST_DEVICE inline void shuffle_table(uint64_t n, uint64_t key, uint16_t* table) {
  for (uint64_t i = 0; i < n; ++i) table[i] = static_cast<uint16_t>(i);
  for (uint64_t i = n - 1; i > 0; --i) {
    const uint64_t j = mix64(key + i * GOLDEN) % (i + 1);
    const uint16_t swapped = table[i];
    table[i] = table[j];
    table[j] = swapped;
  }
}

// ... and above it a Feistel network on the next power of two; values from n on are permuted again until one is below n.
MCPT_HOST_DEVICE inline uint64_t permute(uint64_t n, uint64_t key, uint64_t i) {
  int bits = 0;
  while ((n - 1) >> bits) ++bits;
  const int right_bits = bits - bits / 2;
  const uint64_t left_mask = (uint64_t{1} << bits / 2) - 1, right_mask = (uint64_t{1} << right_bits) - 1;
  uint64_t round_keys[HALF_ROUNDS];
  for (int round = 0; round < HALF_ROUNDS; ++round) round_keys[round] = mix64(key + (round + 1) * GOLDEN);
  do {
    uint64_t left = i >> right_bits, right = i & right_mask;
    for (int round = 0; round < HALF_ROUNDS; round += 2) {
      left ^= mix64(right ^ round_keys[round]) & left_mask;
      right ^= mix64(left ^ round_keys[round + 1]) & right_mask;
    }
    i = left << right_bits | right;
  } while (i >= n);
  return i;
}

// Of the first k samples that reach a node, the left child gets round(k * left_share / 2^64).
// A child is the index of a node before this one, or ~corpus.
struct Node {
  uint64_t left_share;
  int32_t left, right;

  MCPT_HOST_DEVICE uint64_t left_count(uint64_t k) const {
    return static_cast<uint64_t>((static_cast<uint128_t>(k) * left_share + (uint64_t{1} << 63)) >> 64);
  }
};

struct CorpusPlace {
  int32_t corpus;
  int64_t used;  // samples of this corpus that came before
};

MCPT_HOST_DEVICE inline CorpusPlace find(const Node* nodes, int32_t tree, uint64_t k) {
  while (tree >= 0) {
    const Node node = nodes[tree];
    const uint128_t scaled = static_cast<uint128_t>(k) * node.left_share + (uint64_t{1} << 63);
    const uint64_t before = static_cast<uint64_t>(scaled >> 64), rest = static_cast<uint64_t>(scaled);
    // Sample k itself goes left if the count for k + 1 is one more, that is if adding the share carries.
    const bool goes_left = rest + node.left_share < rest;
    tree = goes_left ? node.left : node.right;
    k = goes_left ? before : k - before;
  }
  return {~tree, static_cast<int64_t>(k)};
}

// A stretch of the run, from sample `start` on. Of its first k samples the left tree gets
// floor((k share + floor(ramp k^2 / (2 length)) + phase) / 2^64).
struct Stage {
  int64_t start;
  uint64_t share, phase, ramp, length;
  int64_t left_before, right_before;
  int32_t left, right;

  MCPT_HOST_DEVICE uint64_t left_count(uint64_t k) const {
    if (right == NO_TREE) return k;
    uint128_t ramped = 0;
    if (ramp) {  // ramp k^2 / (2 length), in two parts because the product has up to 156 bits
      const uint128_t square = static_cast<uint128_t>(k) * k, twice = static_cast<uint128_t>(length) * 2;
      ramped = square / twice * ramp + square % twice * ramp / twice;
    }
    return static_cast<uint64_t>((static_cast<uint128_t>(k) * share + ramped + phase) >> 64);
  }
};

struct Corpus {
  int64_t tokens, samples;  // samples: in one epoch
  uint64_t key;
};

// What defines an order; the arrays belong to the caller. `base`: [stages][corpora].
struct OrderView {
  const Node* nodes;
  const Stage* stages;
  const int64_t* base;
  const Corpus* corpora;
  int32_t num_stages, num_corpora;
  uint64_t seed;
  int64_t seq_length, block_size, block_origin;

  MCPT_HOST_DEVICE int32_t stage_of(int64_t n) const {
    int32_t low = 0, high = num_stages;  // stages[low].start <= n < stages[high].start
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (stages[middle].start <= n ? low : high) = middle;
    }
    return low;
  }

  MCPT_HOST_DEVICE CorpusPlace corpus_of(int64_t n) const {
    const int32_t number = stage_of(n);
    const Stage& stage = stages[number];
    const uint64_t k = n - stage.start, before = stage.left_count(k);
    const bool goes_left = stage.right == NO_TREE || stage.left_count(k + 1) > before;
    CorpusPlace place = goes_left ? find(nodes, stage.left, stage.left_before + before)
                                  : find(nodes, stage.right, stage.right_before + k - before);
    place.used += base[static_cast<int64_t>(number) * num_corpora + place.corpus];
    return place;
  }

  MCPT_HOST_DEVICE int64_t block_of(int64_t n) const { return (n - block_origin) / block_size; }
  MCPT_HOST_DEVICE int64_t first_of_block(int64_t block) const { return block_origin + block * block_size; }
  MCPT_HOST_DEVICE uint64_t block_key(int64_t block) const { return combine(seed, BLOCK, first_of_block(block)); }
  MCPT_HOST_DEVICE uint64_t epoch_key(int32_t corpus, int64_t epoch) const {
    return combine(seed, EPOCH, corpora[corpus].key, epoch);
  }
  MCPT_HOST_DEVICE int64_t token_phase(int32_t corpus, int64_t epoch) const {
    return epoch ? combine(seed, PHASE, corpora[corpus].key, epoch) % seq_length : 0;
  }
};

// The tables of the permutations that need one, for the samples of one call: `of_blocks` from `first_block` on (null when
// blocks are too large for tables), and those of each small corpus from `first_epoch[corpus]` on, which begin at
// `of_epochs[epochs_begin[corpus]]`.
struct TablesView {
  const uint16_t* of_blocks;
  int64_t first_block;
  const uint16_t* of_epochs;
  const int64_t* epochs_begin;
  const int64_t* first_epoch;
};

struct SamplePlace {
  int32_t corpus;
  int64_t epoch, sample, begin;
};

// Sample n of the run.
MCPT_HOST_DEVICE inline SamplePlace locate(const OrderView& order, const TablesView& tables, int64_t n) {
  const int64_t block = order.block_of(n), first = order.first_of_block(block), place = n - first;
  const uint64_t shuffled = tables.of_blocks
                                ? tables.of_blocks[(block - tables.first_block) * order.block_size + place]
                                : permute(order.block_size, order.block_key(block), place);
  const CorpusPlace in_corpus = order.corpus_of(first + static_cast<int64_t>(shuffled));
  const int32_t number = in_corpus.corpus;
  const Corpus& corpus = order.corpora[number];
  const int64_t epoch = in_corpus.used / corpus.samples, i = in_corpus.used % corpus.samples;
  int64_t sample;
  if (static_cast<uint64_t>(corpus.samples) <= TABLE_LIMIT) {
    const int64_t table = tables.epochs_begin[number] + (epoch - tables.first_epoch[number]) * corpus.samples;
    sample = tables.of_epochs[table + i];
  } else {
    sample = permute(corpus.samples, order.epoch_key(number, epoch), i);
  }
  // at most seq_length - 1 + (samples - 1) * seq_length, which is below the corpus's tokens: only its end may lie beyond
  const int64_t begin = order.token_phase(number, epoch) + sample * order.seq_length;
  return {number, epoch, sample, begin};
}

}  // namespace megatron_cpt
