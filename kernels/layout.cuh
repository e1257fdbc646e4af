// Fragment order: codes stored in the order in which the lanes of a warp read them.
//
// A group is 16 tokens.  Lane = 4 * g + t (g = 0..7, t = 0..3, as in the fragments of mma.m16n8k16) owns M / 2
// bytes of the group's 16 * M, in chunks of at most 16 bytes; chunk c of all lanes is contiguous:
//     offset = c * 32 * chunk + lane * chunk + byte.
//
// An entry is what one lookup of a table row gives: the fp16 centroid of a code, 4, 8 or 16 bytes for 2, 4 or 8 dims.
// Codes of one dim go in pairs: an entry is a word of the row, of which one lookup takes the lower half, one the upper.
//
// Keys.  The lane looks up tokens g and g + 8, unit x being entry 4 * (x ^ (g & kMask)) + t.
//   At one unit the lanes that are served together thus touch different banks, whatever the codes are: 32 lanes of
//   entries of 4 bytes, 16 of 8, 8 of 16.
// Values.  The lane looks up the four tokens 2t, 2t+1, 2t+8, 2t+9; unit x is entry `entry(x)`, again a bank a lane.
//   (D = 64 with M = 16 has 16 entries a row only: two lanes share a bank there.)
//
// million_cli/ops/fragment.py states the same order in Python.
#pragma once

#include "common.cuh"

namespace million {

template <int D, int M>
struct CodeShape {
  static constexpr int kDsub = D / M;
  static_assert(M == D || 2 * M == D || 4 * M == D || 8 * M == D, "M is D, D / 2, D / 4 or D / 8");
  static constexpr int kLaneBytes = M / 2;
  static constexpr int kChunk = kLaneBytes < 16 ? kLaneBytes : 16;
  static constexpr int kChunks = kLaneBytes / kChunk;
  static constexpr int kGroupBytes = kGroupTokens * M;
  static constexpr int kPacked = kDsub == 1 ? 2 : 1;  // codes of an entry
  static constexpr int kEntries = M / kPacked;
  static constexpr int kEntryDims = kDsub * kPacked;
  static constexpr int kEntryBytes = 2 * kEntryDims;
  static constexpr int kEntryWords = kEntryDims / 2;

  __host__ __device__ static constexpr int offset(int lane, int byte) {
    return (byte / kChunk) * 32 * kChunk + lane * kChunk + byte % kChunk;
  }
};

template <int D, int M>
struct KeyOrder : CodeShape<D, M> {
  using Shape = CodeShape<D, M>;
  static constexpr int kUnits = Shape::kEntries / 4;
  static constexpr int kMask = 8 / Shape::kEntryWords - 1;

  __host__ __device__ static constexpr int entry(int x, int g, int t) { return 4 * (x ^ (g & kMask)) + t; }

  // Byte of the lane's codes for unit x and token g + 8 * half: the register order of the matrix operand.  Of a packed
  // entry the other code is in the next byte.
  __host__ __device__ static constexpr int byte(int x, int half) {
    return Shape::kDsub == 1   ? 4 * x + 2 * half
           : Shape::kDsub == 2 ? 4 * (x % (M / 8)) + 2 * (x / (M / 8)) + half
                               : 2 * x + half;
  }

  __host__ __device__ static constexpr int position(int token, int s) {
    const int g = token & 7, e = s / Shape::kPacked, t = e & 3;
    return Shape::offset(4 * g + t, byte((e >> 2) ^ (g & kMask), token >> 3) + s % Shape::kPacked);
  }
};

template <int D, int M>
struct ValueOrder : CodeShape<D, M> {
  using Shape = CodeShape<D, M>;
  static constexpr int kUnits = Shape::kEntries / 8;
  static constexpr bool kSplit = Shape::kDsub == 4 && M == 32;  // the table row holds 32 entries of two words
  static constexpr bool kTurned = Shape::kDsub == 8;            // eight entries fill the banks: t turns g, not x
  static constexpr int kMask = kTurned ? 0 : (kUnits < 4 ? kUnits : 4) - 1;

  __host__ __device__ static constexpr int entry(int x, int g, int t) {
    return kTurned  ? (g ^ 2 * t) + 8 * x
           : kSplit ? (g & 3) + 4 * (x ^ t) + 16 * (g >> 2)
                    : g + 8 * (x ^ (t & kMask));
  }

  // Byte of the lane's codes for unit x and its a-th token; of a packed entry the other code is four bytes on.
  __host__ __device__ static constexpr int byte(int x, int a) { return 4 * Shape::kPacked * x + a; }

  __host__ __device__ static constexpr int position(int token, int s) {
    const int t = (token & 7) >> 1, a = (token & 1) + 2 * (token >> 3), e = s / Shape::kPacked;
    const int g = kTurned ? (e & 7) ^ 2 * t : kSplit ? (e & 3) + 4 * (e >> 4) : e & 7;
    const int x = kTurned ? e >> 3 : kSplit ? ((e >> 2) & 3) ^ t : (e >> 3) ^ (t & kMask);
    return Shape::offset(4 * g + t, byte(x, a) + 4 * (s % Shape::kPacked));
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
