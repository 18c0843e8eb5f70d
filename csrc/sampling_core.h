// The order of the data in integers: the same definitions as megatron_cpt/data/sampling.py, which is the specification.
//
// Header-only and without floats, allocation or exceptions, so that nvcc can compile the same functions for a GPU.
// Numbers of samples are below 2^62 (the callers check), so no sum here leaves 64 bits.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define MCPT_HOST_DEVICE __host__ __device__
#else
#define MCPT_HOST_DEVICE
#endif

namespace megatron_cpt {

__extension__ typedef unsigned __int128 uint128_t;

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15;
constexpr uint64_t MIXER = 0xD6E8FEB86659FD93;
constexpr uint64_t TABLE_LIMIT = 4096;  // table entries fit in uint16_t
constexpr int HALF_ROUNDS = 8;

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

// A permutation of 0..n-1 chosen by a key. Up to TABLE_LIMIT values it is a shuffled table, which the caller owns;
// above, a Feistel network of HALF_ROUNDS half-rounds on the next power of two.
struct Permutation {
  uint64_t n;
  const uint16_t* table;  // null: Feistel
  uint64_t left_mask, right_mask;
  int right_bits;
  uint64_t round_keys[HALF_ROUNDS];

  MCPT_HOST_DEVICE uint64_t operator()(uint64_t i) const {
    if (table) return table[i];
    do {  // cycle walking: values from n on are permuted again until one lands below n
      uint64_t left = i >> right_bits, right = i & right_mask;
      for (int round = 0; round < HALF_ROUNDS; round += 2) {
        left ^= mix64(right ^ round_keys[round]) & left_mask;
        right ^= mix64(left ^ round_keys[round + 1]) & right_mask;
      }
      i = left << right_bits | right;
    } while (i >= n);
    return i;
  }
};

// Fisher-Yates.
MCPT_HOST_DEVICE inline void shuffle_table(uint64_t n, uint64_t key, uint16_t* table) {
  for (uint64_t i = 0; i < n; ++i) table[i] = static_cast<uint16_t>(i);
  for (uint64_t i = n - 1; i > 0; --i) {
    const uint64_t j = mix64(key + i * GOLDEN) % (i + 1);
    const uint16_t swapped = table[i];
    table[i] = table[j];
    table[j] = swapped;
  }
}

// `table` has room for n values; it is neither written nor kept when n is above TABLE_LIMIT.
MCPT_HOST_DEVICE inline Permutation make_permutation(uint64_t n, uint64_t key, uint16_t* table) {
  Permutation permutation{};
  permutation.n = n;
  if (n <= TABLE_LIMIT) {
    shuffle_table(n, key, table);
    permutation.table = table;
    return permutation;
  }
  int bits = 0;
  while ((n - 1) >> bits) ++bits;
  permutation.left_mask = (uint64_t{1} << bits / 2) - 1;
  permutation.right_bits = bits - bits / 2;
  permutation.right_mask = (uint64_t{1} << permutation.right_bits) - 1;
  for (int i = 0; i < HALF_ROUNDS; ++i) permutation.round_keys[i] = mix64(key + (i + 1) * GOLDEN);
  return permutation;
}

// Of the first k samples that reach a node, the left child gets round(k * left_share / 2^64).
// A child is the index of a node, or ~corpus.
struct Node {
  uint64_t left_share;
  int32_t left, right;
};

struct CorpusPlace {
  int32_t corpus;
  uint64_t used;  // samples of this corpus that came before
};

MCPT_HOST_DEVICE inline CorpusPlace walk_tree(const Node* nodes, int32_t root, uint64_t n) {
  int32_t place = root;
  while (place >= 0) {
    const Node node = nodes[place];
    const uint128_t scaled = static_cast<uint128_t>(n) * node.left_share + (uint64_t{1} << 63);
    const uint64_t before = static_cast<uint64_t>(scaled >> 64), rest = static_cast<uint64_t>(scaled);
    // Sample n itself goes left if the count for n + 1 is one more, that is if adding the share carries.
    const bool goes_left = rest + node.left_share < rest;
    place = goes_left ? node.left : node.right;
    n = goes_left ? before : n - before;
  }
  return {~place, n};
}

struct SamplePlace {
  int32_t corpus;
  int64_t epoch, sample;
};

// What defines an order; the arrays belong to the caller.
struct OrderView {
  const Node* nodes;
  int32_t root;
  const int64_t* samples_per_epoch;
  uint64_t seed;
  int64_t block_size;

  MCPT_HOST_DEVICE uint64_t block_key(int64_t block) const { return combine(seed, 0, block); }
  MCPT_HOST_DEVICE uint64_t epoch_key(int32_t corpus, int64_t epoch) const { return combine(seed, 1, corpus, epoch); }
};

// Sample n of the run. `permutations` gives the Permutation of a block and of a corpus in an epoch: how they are kept
// between lookups is for the caller to decide.
template <class Permutations>
MCPT_HOST_DEVICE inline SamplePlace locate(const OrderView& order, int64_t n, Permutations& permutations) {
  const int64_t block = n / order.block_size, place = n % order.block_size;
  const uint64_t unshuffled = block * order.block_size + permutations.of_block(block)(place);
  const CorpusPlace in_corpus = walk_tree(order.nodes, order.root, unshuffled);
  const int64_t used = static_cast<int64_t>(in_corpus.used), size = order.samples_per_epoch[in_corpus.corpus];
  const int64_t epoch = used / size;
  const uint64_t sample = permutations.of_epoch(in_corpus.corpus, epoch)(used % size);
  return {in_corpus.corpus, epoch, static_cast<int64_t>(sample)};
}

}  // namespace megatron_cpt
