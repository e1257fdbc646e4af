// Fragment order: codes stored in the order in which the lanes of a warp read them.
//
// A group is 16 tokens.  Lane = 4 * g + t (g = 0..7, t = 0..3, as in the fragments of mma.m16n8k16) owns M / 2
// bytes of the group's 16 * M, in chunks of at most 16 bytes; chunk c of all lanes is contiguous:
//     offset = c * 32 * chunk + lane * chunk + byte.
//
// Keys.  The lane looks up tokens g and g + 8, unit x = 0..M/4-1 being subspace 4 * (x ^ (g & kMask)) + t.
//   At one unit the 32 lanes thus touch 32 different words of a table row of 64, whatever the codes are.
// Values.  The lane looks up the four tokens 2t, 2t+1, 2t+8, 2t+9; unit x = 0..M/8-1 is subspace `subspace(x)`,
//   again one word a bank.  (D = 64 with M = 16 has 16 entries a row only: two lanes share a bank there.)
//
// million_cli/ops/fragment.py states the same order in Python.
#pragma once

#include "common.cuh"

namespace million {

template <int D, int M>
struct CodeShape {
  static constexpr int kDsub = D / M;
  static_assert(kDsub == 2 || kDsub == 4, "M is D / 2 or D / 4");
  static constexpr int kLaneBytes = M / 2;
  static constexpr int kChunk = kLaneBytes < 16 ? kLaneBytes : 16;
  static constexpr int kChunks = kLaneBytes / kChunk;
  static constexpr int kGroupBytes = kGroupTokens * M;
  static constexpr int kEntryBytes = 2 * kDsub;  // fp16 centroid

  __host__ __device__ static constexpr int offset(int lane, int byte) {
    return (byte / kChunk) * 32 * kChunk + lane * kChunk + byte % kChunk;
  }
};

template <int D, int M>
struct KeyOrder : CodeShape<D, M> {
  using Shape = CodeShape<D, M>;
  static constexpr int kUnits = M / 4;
  static constexpr int kMask = Shape::kDsub == 2 ? 7 : 3;

  __host__ __device__ static constexpr int subspace(int x, int g, int t) { return 4 * (x ^ (g & kMask)) + t; }

  // Byte of the lane's codes for unit x and token g + 8 * half: the register order of the matrix operand.
  __host__ __device__ static constexpr int byte(int x, int half) {
    return Shape::kDsub == 2 ? 4 * (x % (M / 8)) + 2 * (x / (M / 8)) + half : 2 * x + half;
  }

  __host__ __device__ static constexpr int position(int token, int s) {
    const int g = token & 7, t = s & 3;
    return Shape::offset(4 * g + t, byte((s >> 2) ^ (g & kMask), token >> 3));
  }
};

template <int D, int M>
struct ValueOrder : CodeShape<D, M> {
  using Shape = CodeShape<D, M>;
  static constexpr int kUnits = M / 8;
  static constexpr bool kSplit = Shape::kDsub == 4 && M == 32;  // the table row holds 32 entries of two words
  static constexpr int kMask = (kUnits < 4 ? kUnits : 4) - 1;

  __host__ __device__ static constexpr int subspace(int x, int g, int t) {
    return kSplit ? (g & 3) + 4 * (x ^ t) + 16 * (g >> 2) : g + 8 * (x ^ (t & kMask));
  }

  // Byte of the lane's codes for unit x and its a-th token.
  __host__ __device__ static constexpr int byte(int x, int a) { return 4 * x + a; }

  __host__ __device__ static constexpr int position(int token, int s) {
    const int t = (token & 7) >> 1, a = (token & 1) + 2 * (token >> 3);
    const int g = kSplit ? (s & 3) + 4 * (s >> 4) : s & 7;
    const int x = kSplit ? ((s >> 2) & 3) ^ t : (s >> 3) ^ (t & kMask);
    return Shape::offset(4 * g + t, byte(x, a));
  }
};

// Position of a code in the 16 * M bytes of a group, for any layout.
template <int D, int M>
__host__ __device__ constexpr int group_position(Layout layout, int token, int s) {
  switch (layout) {
    case Layout::kRow:
      return token * M + s;
    case Layout::kTransposed:
      return s * kGroupTokens + token;
    case Layout::kFragmentKeys:
      return KeyOrder<D, M>::position(token, s);
    default:
      return ValueOrder<D, M>::position(token, s);
  }
}

}  // namespace million
