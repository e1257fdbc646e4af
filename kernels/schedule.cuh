// How the work of a launch is dealt to its blocks, from lengths that only the device knows.
//
// The unit is a group of 16 tokens of one "set" (sequence, KV head, up to HG of its query heads).  All units stand
// in one line and block i of n takes the span [i * total / n, (i + 1) * total / n): blocks finish together whatever
// the lengths are, and with equal lengths and n a multiple of the number of sets, spans end at set boundaries.
// Each set also counts kWindowUnits for its residual window, done by the block that holds the set's last unit.
// Example: 32 sets of 252 + 4 units on 128 blocks: 64 units a block, four blocks a set.
#pragma once

#include "decode_params.h"

namespace million {

constexpr int kWindowUnits = 16;  // what a window takes, in groups
constexpr int kMinUnits = 16;  // fewer are not worth a block's table loads

struct Sequence {
  int length;
  int coded;        // tokens held as codes
  int first_valid;  // tokens before it are padding
  int first_group;  // groups before it hold padding only
  int groups;       // groups to read
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

struct Schedule {
  int64_t total;  // units of the launch
  int blocks;     // blocks that get any

  __device__ Schedule(const PagedDecodeParams& p, int grid) {
    total = 0;
    for (int b = 0; b < p.batch; ++b) total += sequence(p, b).groups + kWindowUnits;
    total *= p.kv_heads * p.head_sets;
    const int64_t worth = (total + kMinUnits - 1) / kMinUnits;
    blocks = worth < grid ? int(worth) : grid;
  }
  __device__ int64_t begin(int block) const { return int64_t(block) * total / blocks; }
  __device__ int owner(int64_t unit) const { return int(((unit + 1) * blocks - 1) / total); }
};

}  // namespace million
