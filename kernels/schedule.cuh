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
  s.first_valid = p.first_valid ? p.first_valid[b] : 0;
  const int old = s.length - (p.residual - p.page_size);
  s.coded = old > 0 ? p.by_page_size.quotient(old) * p.page_size : 0;
  s.first_group = min(s.first_valid, s.coded) / kGroupTokens;
  s.groups = s.coded / kGroupTokens - s.first_group;
  return s;
}

// a / b for quotients below 2^22, without the latency of an exact division.
__device__ __forceinline__ int small_quotient(int a, int b) {
  int q = __float2int_rz(__int2float_rn(a) * __frcp_rn(__int2float_rn(b)));
  while (int64_t(q) * b > a) --q;
  while (int64_t(q + 1) * b <= a) ++q;
  return q;
}

// All in 32 bits: 2^31 units are 34 billion tokens.  Made and asked by whole warps.
struct Schedule {
  const PagedDecodeParams& p;
  int total;   // units of the launch
  int blocks;  // blocks that get any
  int quotient, remainder;
  bool whole;  // all blocks do

  __device__ Schedule(const PagedDecodeParams& params, int lane) : p(params) {
    const int sets_of_sequence = p.kv_heads * p.head_sets, sets = p.batch * sets_of_sequence;
    int units = 0;
    for (int b = lane; b < p.batch; b += 32) units += sequence(p, b).units();
    total = __reduce_add_sync(~0u, units) * sets_of_sequence;
    blocks = p.grid;
    const int worth = total / kMinUnits;
    whole = worth >= p.grid;
    if (!whole) blocks = worth < sets ? min(sets, p.grid) : worth - worth % sets;
    quotient = divide(total), remainder = total - quotient * blocks;
  }
  __device__ int divide(int n) const { return whole ? p.by_grid.quotient(n) : n / blocks; }
  // i * total / blocks
  __device__ int begin(int i) const { return i * quotient + divide(i * remainder); }
  // The block whose span holds the unit.
  __device__ int owner(int unit) const {
    int i = min(__float2int_rz((unit + 0.5f) * blocks * __frcp_rn(float(total))), blocks - 1);
    while (begin(i) > unit) --i;
    while (begin(i + 1) <= unit) ++i;
    return i;
  }
  // The sequence that holds the unit; `base` becomes its first unit.
  __device__ int find(int unit, int lane, int& base) const {
    const int sets_of_sequence = p.kv_heads * p.head_sets;
    base = 0;
    for (int first = 0;; first += 32) {
      const int b = first + lane;
      const int units = b < p.batch ? sequence(p, b).units() * sets_of_sequence : 0;
      int end = units;  // of the sequences first .. b
#pragma unroll
      for (int step = 1; step < 32; step <<= 1) {
        const int before = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += before;
      }
      const unsigned past = __ballot_sync(~0u, base + end > unit && b < p.batch);
      if (past) {
        const int at = __ffs(past) - 1;
        base += __shfl_sync(~0u, end - units, at);
        return first + at;
      }
      base += __shfl_sync(~0u, end, 31);
    }
  }
};

}  // namespace million
