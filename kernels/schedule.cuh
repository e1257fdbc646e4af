// How the work of a launch is dealt to its blocks, from lengths that only the device knows.
//
// The unit is a group of 16 tokens of one "set" (sequence, KV head, up to HG of its query heads); a set without codes
// counts as one.  All units stand in one line and block i of n takes the span [i * total / n, (i + 1) * total / n):
// blocks finish together whatever the lengths are, and with equal lengths and n a multiple of the number of sets, spans
// end at set boundaries.  The blocks of a set share its residual window.
// Example: 32 sets of 256 units on 128 blocks: 64 units a block, four blocks a set.
#pragma once

#include "decode_params.h"

namespace million {

constexpr int kMinUnits = 8;  // fewer are not worth a block's table loads

struct Sequence {
  int length;
  int coded;        // tokens held as codes
  int first_valid;  // tokens before it are padding
  int first_group;  // groups before it hold padding only
  int groups;       // groups to read
  __device__ int units() const { return max(groups, 1); }
};

__device__ __forceinline__ Sequence sequence(const PagedDecodeParams& p, int b) {
  Sequence s;
  s.length = p.lengths[b];
  const int old = s.length - (p.residual - p.page_size);
  s.coded = old > 0 ? old / p.page_size * p.page_size : 0;
  s.first_valid = p.first_valid ? p.first_valid[b] : 0;
  s.first_group = min(s.first_valid, s.coded) / kGroupTokens;
  s.groups = s.coded / kGroupTokens - s.first_group;
  return s;
}

// All in 32 bits: 2^31 units are 34 billion tokens.
struct Schedule {
  int total;   // units of the launch
  int blocks;  // blocks that get any
  int quotient, remainder;

  __device__ Schedule(const PagedDecodeParams& p, int grid) {
    const int sets_of_sequence = p.kv_heads * p.head_sets, sets = p.batch * sets_of_sequence;
    total = 0;
    for (int b = 0; b < p.batch; ++b) total += sequence(p, b).units();
    total *= sets_of_sequence;
    blocks = grid;
    const int worth = total / kMinUnits;
    if (worth < grid) blocks = worth < sets ? min(sets, grid) : worth - worth % sets;
    quotient = total / blocks, remainder = total % blocks;
  }
  // i * total / blocks
  __device__ int begin(int i) const { return i * quotient + i * remainder / blocks; }
  // The block whose span holds the unit.
  __device__ int owner(int unit) const {
    int i = min(int((unit + 0.5f) * (float(blocks) / float(total))), blocks - 1);
    while (begin(i) > unit) --i;
    while (begin(i + 1) <= unit) ++i;
    return i;
  }
};

}  // namespace million
