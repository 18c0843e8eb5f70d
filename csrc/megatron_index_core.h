// Megatron-LM's sample index and blending index, bit-identical to megatron-core's build_sample_idx (with one extra token,
// last partial sequence dropped) and build_blending_indices. megatron_cpt/mixture/order/megatron.py is the specification.
//
// Header-only, without allocation or exceptions; the callers check the arguments. Must be compiled without contracting
// a * b - c into one rounding (-ffp-contract=off), or other samples are drawn on machines with such an instruction.
#pragma once

#include <algorithm>
#include <cstdint>

namespace megatron_cpt {

// The documents one after the other, in the order in which they are read: entry j is document document_index[j].
struct DocumentStream {
  const int32_t* lengths;  // tokens of each document
  int64_t num_documents;
  const int32_t* document_index;
  int64_t num_entries;

  int64_t length(int64_t entry) const { return lengths[document_index[entry]]; }

  // Documents are read in random order, so the memory of a length is asked for some entries before it is needed. The
  // entry may not have been checked yet, hence the clamp (a negative document is a large unsigned one).
  void prefetch(int64_t entry, int64_t end) const {
    constexpr int64_t AHEAD = 24;
    if (entry + AHEAD >= end) return;
    const uint64_t document = static_cast<uint64_t>(static_cast<int64_t>(document_index[entry + AHEAD]));
    __builtin_prefetch(lengths + std::min(document, static_cast<uint64_t>(num_documents - 1)));
  }
};

struct ChunkSum {
  int64_t tokens;
  int64_t bad_entry;  // the first whose document does not exist or has a negative length; -1: none
};

// First pass: tokens of the entries begin to end - 1.
inline ChunkSum sum_chunk(const DocumentStream& stream, int64_t begin, int64_t end) {
  int64_t tokens = 0;
  for (int64_t entry = begin; entry < end; ++entry) {
    stream.prefetch(entry, end);
    const int64_t document = stream.document_index[entry];
    if (document < 0 || document >= stream.num_documents || stream.lengths[document] < 0) return {tokens, entry};
    tokens += stream.lengths[document];
  }
  return {tokens, -1};
}

// Second pass: sample k begins at token k * seq_length of the stream. Writes (entry, offset in its document) to
// sample_index[2 k] and [2 k + 1] for every k from 1 to num_samples that begins in the entries begin to end - 1, of which
// the first token is number `start` of the stream. An entry without tokens begins no sample.
template <class T>
inline void emit_chunk(const DocumentStream& stream, int64_t begin, int64_t end, int64_t start, int64_t seq_length,
                       int64_t num_samples, T* sample_index) {
  int64_t sample = std::max<int64_t>((start + seq_length - 1) / seq_length, 1);
  int64_t position = sample * seq_length;
  for (int64_t entry = begin; entry < end && sample <= num_samples; ++entry) {
    stream.prefetch(entry, end);
    const int64_t next = start + stream.length(entry);
    for (; position < next && sample <= num_samples; ++sample, position += seq_length) {
      sample_index[2 * sample] = static_cast<T>(entry);
      sample_index[2 * sample + 1] = static_cast<T>(position - start);
    }
    start = next;
  }
}

// Sample n comes from the dataset that is furthest behind weight * n, the first of those that are equally far.
// `taken` (num_datasets) holds zeros at first; counts of samples are exact as doubles, being below 2^53.
inline void blend(const double* weights, int64_t num_datasets, int64_t num_samples, double* taken, int16_t* dataset_index,
                  int64_t* dataset_sample_index) {
  for (int64_t sample = 0; sample < num_samples; ++sample) {
    const double position = std::max(static_cast<double>(sample), 1.0);
    int64_t furthest = 0;
    double largest = weights[0] * position - taken[0];
    for (int64_t dataset = 1; dataset < num_datasets; ++dataset) {
      const double behind = weights[dataset] * position - taken[dataset];
      if (behind > largest) {
        largest = behind;
        furthest = dataset;
      }
    }
    dataset_index[sample] = static_cast<int16_t>(furthest);
    dataset_sample_index[sample] = static_cast<int64_t>(taken[furthest]);
    taken[furthest] += 1.0;
  }
}

}  // namespace megatron_cpt
