// Decode attention over paged product-quantized keys and values, gathered straight into tensor-core fragments.
//
// One query token a sequence.  A block holds both centroid tables of a KV head in shared memory, row = code, and a warp
// takes groups of 16 tokens:
//   scores  A = keys.  A register of the operand is two adjacent dims of one token, which is (a word of) a centroid,
//           so a lookup fills it.  Row r uses the subspaces in the order x ^ r (layout.cuh): lookups of a warp fall in
//           32 banks.  Column n of B holds q in the order of row n, so the score of row r is at column r (mod 8) of C;
//           the other products are the price of conflict-free lookups.
//           For several query heads the eight columns serve two of them in four orders, 4 * (head & 1) + order: rows r
//           and r ^ 4 are brought to the same order by swapping two registers of the upper lanes.  The orders of every
//           other pair of heads are permuted by ^ 2, so that each lane finds two scores of one head, or of two for HG = 8.
//   values  A = values, rows = dims or subspaces, k = tokens; columns of B hold the probabilities of one lane slot t
//           each (the slots order their subspaces differently), and the slots are added once at the end.
// An entry of 8 or 16 bytes (4 or 8 dims a code) fills registers of two or four instructions or halves of them; of
// codes of one dim two lookups make a word (layout.cuh), which then serves as one of two dims does.
// Probabilities are fp16 scaled by up to 2^15.
#pragma once

#include "decode_block.cuh"

namespace million {

template <int D_, int MK_, int MV_, int HG_, int WARPS_, int STAGES_>
struct MmaDecode {
  static constexpr int D = D_, MK = MK_, MV = MV_, HG = HG_, WARPS = WARPS_, STAGES = STAGES_;
  using K = KeyOrder<D, MK>;
  using V = ValueOrder<D, MV>;
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kRow = 256;  // bytes of a table row: byte 1 of an offset is the code
  static constexpr int kValueTable = D == 128 ? kRow * kCentroids : 2 * D;  // D = 64: both tables share the rows
  static constexpr int kTableBytes = (D == 128 ? 2 : 1) * kRow * kCentroids;
  static constexpr int kStageBytes = K::kGroupBytes + V::kGroupBytes;
  // A warp's part of the ring; the last stage is large enough for a row of sums, before and after the codes.
  static constexpr int kVectorBytes = HG * D * 4;
  static constexpr int kVector = (STAGES - 1) * kStageBytes;
  static constexpr int kRingBytes = kVector + (kStageBytes > kVectorBytes ? kStageBytes : kVectorBytes);
  static constexpr bool kPairs = HG > 1;  // operands serve two heads; tokens of values packed in pairs
  static constexpr int kTiles = D / 16;  // score instructions a head and group
  static_assert(HG == 1 || HG == 4 || HG == 8, "heads of a block");
  static constexpr int kSums = kPairs ? HG / 2 * kTiles : D / 32;
};

// What a warp does with the codes of a group; decode_mma.cuh brings codes and tables in.
template <class T>
struct MmaWalk : DecodeBlock<T> {
  using Base = DecodeBlock<T>;
  using Base::g, Base::p, Base::state, Base::t, Base::warp;
  static constexpr int D = T::D, HG = T::HG;
  using K = typename T::K;
  using V = typename T::V;

  uint8_t* tables;
  Vectors scratch;  // rows of sums, a warp's own

  __device__ MmaWalk(const PagedDecodeParams& params, BlockState<D, HG, T::WARPS>& shared) : Base(params, shared) {}

  // Score operands of a warp: columns of one head, or of two.
  static constexpr int kColumns = T::kPairs ? HG / 2 : 1;
  static constexpr int kHeadMask = T::kPairs ? 16 : 18;  // with 4 and 9: lanes that share a head differ by these

  // First and second unit of score instruction i (entries of a word).  To be swapped, the second is in the other half
  // of the banks.
  static constexpr bool kSwap = T::kPairs && K::kEntryWords == 1;
  __device__ static constexpr int first_unit(int i) { return kSwap ? i % 4 + 8 * (i / 4) : i; }
  __device__ static constexpr int second_unit(int i) { return kSwap ? first_unit(i) + 4 : i + T::kTiles; }

  // A lane finds scores of the heads my_head + 4 * i (if below HG), i < kMine.
  static constexpr int kMine = HG > 4 ? HG / 4 : 1;
  __device__ int my_head() const { return T::kPairs ? 2 * ((t & 1) ^ ((g >> 1) & 1)) + (t >> 1) : t ^ (g >> 1); }

  // What a warp carries from group to group.
  struct Walk {
    uint32_t query[kColumns][2 * T::kTiles];  // registers 2i and 2i + 1 serve score instruction i
    float sums[T::kSums][4];
    float offset[kMine];  // log2 of the unit of the probabilities of the lane's heads
    float denominator[kMine];
  };
  static constexpr int kKeyOffsets = K::kMask + 1;
  static constexpr int kValueOffsets = V::kMask + 1;

  __device__ __forceinline__ void load_operand(Walk& walk) const {
    const uint32_t* q_words = reinterpret_cast<const uint32_t*>(state.q);
#pragma unroll
    for (int i = 0; i < kMine; ++i) walk.offset[i] = -1e30f, walk.denominator[i] = 0.f;
    // Heads 2c and 2c + 1 in columns 0-3 and 4-7, or one head.
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int hg = T::kPairs ? 2 * c + (g >> 2) : 0;
      const int order = T::kPairs ? (g & 3) ^ (2 * (c & 1)) : g;
#pragma unroll
      for (int i = 0; i < T::kTiles; ++i)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int word = K::kEntryWords == 1   ? K::entry(high ? second_unit(i) : first_unit(i), order, t)
                           : K::kEntryWords == 2 ? 2 * K::entry(i, order, t) + high
                                                 : 4 * K::entry(i / 2, order, t) + 2 * (i & 1) + high;
          walk.query[c][2 * i + high] = q_words[hg * D / 2 + word];
        }
    }
  }

  __device__ __forceinline__ void score(float (&scores)[kColumns][4], const uint32_t* codes, const Walk& walk,
                                        const RowOffsets<kKeyOffsets>& offsets) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) scores[c][0] = scores[c][1] = scores[c][2] = scores[c][3] = 0.f;
    uint4 wide[2];  // entries of 16 bytes, which serve two instructions
#pragma unroll
    for (int i = 0; i < T::kTiles; ++i) {
      uint32_t a[4];
      if constexpr (K::kEntryWords == 1) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int x = r & 2 ? second_unit(i) : first_unit(i);
          const int at = K::byte(x, r & 1);
          a[r] = word(offsets.address(codes[at / 4], at % 4, x & 7) + (x >> 3) * 128);
          if constexpr (K::kPacked == 2)  // the word of the upper half's code
            a[r] = __byte_perm(a[r], word(offsets.address(codes[at / 4], at % 4 + 1, x & 7) + (x >> 3) * 128), 0x7610);
        }
        if constexpr (kSwap) {  // lanes of rows 4-7 looked the units up in the other order
          const bool swap = g & 4;
          const uint32_t a0 = a[0], a1 = a[1];
          a[0] = swap ? a[2] : a0, a[1] = swap ? a[3] : a1;
          a[2] = swap ? a0 : a[2], a[3] = swap ? a1 : a[3];
        }
      } else if constexpr (K::kEntryWords == 2) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = K::byte(i, half);
          const uint2 entry = pair(offsets.address(codes[at / 4], at % 4, i & 3) + (i >> 2) * 128);
          a[half] = entry.x, a[half + 2] = entry.y;
        }
      } else {
        if (i % 2 == 0)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int at = K::byte(i / 2, half);
            wide[half] = quad(offsets.address(codes[at / 4], at % 4, i / 2 & 1) + (i >> 2) * 128);
          }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[half] = i % 2 ? wide[half].z : wide[half].x;
          a[half + 2] = i % 2 ? wide[half].w : wide[half].y;
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        mma(scores[c], a[0], a[1], a[2], a[3], walk.query[c][2 * i], walk.query[c][2 * i + 1]);
    }
  }

  // Scores -> the lane's probabilities (tokens g and g + 8 of its heads) as pairs of halves; rescales the sums if need be.
  __device__ __forceinline__ void soften(uint32_t (&probabilities)[kMine], const float (&scores)[kColumns][4], Walk& walk,
                                         int token, int first_valid) const {
    const bool odd = g & 1, second = my_head() & 2;
    const float log_scale = p.scale * kLog2e;
    float s[kMine][2], e[kMine][2];
    bool large = false;
#pragma unroll
    for (int i = 0; i < kMine; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        s[i][half] = select(odd, scores[2 * i][2 * half + 1], scores[2 * i][2 * half]);
        if constexpr (T::kPairs)
          s[i][half] = select(second, select(odd, scores[2 * i + 1][2 * half + 1], scores[2 * i + 1][2 * half]), s[i][half]);
        else if (my_head() != 0)
          s[i][half] = -INFINITY;
      }
    if (token < first_valid) {  // the same for all lanes: only a sequence's first group can hold padding
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        if (token + g < first_valid) s[i][0] = -INFINITY;
        if (token + g + 8 < first_valid) s[i][1] = -INFINITY;
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      e[i][0] = fmaf(s[i][0], log_scale, -walk.offset[i]), e[i][1] = fmaf(s[i][1], log_scale, -walk.offset[i]);
      large = large || fmaxf(e[i][0], e[i][1]) > kMaxExponent;
    }
    if (__any_sync(kFull, large)) {
      float factor[kMine];
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        float top = fmaxf(s[i][0], s[i][1]) * log_scale;
        top = fmaxf(top, __shfl_xor_sync(kFull, top, 4));  // lanes of one head differ by these masks
        top = fmaxf(top, __shfl_xor_sync(kFull, top, 9));
        top = fmaxf(top, __shfl_xor_sync(kFull, top, kHeadMask));
        const float next = fmaxf(walk.offset[i], top - kHeadroom);
        factor[i] = exp2_approx(walk.offset[i] - next);
        walk.offset[i] = next;
        walk.denominator[i] *= factor[i];
        e[i][0] = fmaf(s[i][0], log_scale, -next), e[i][1] = fmaf(s[i][1], log_scale, -next);
      }
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) {
        // Of a lane of the head whose sums these are: 2 * pair + (t >> 1).
        const int pair = i / T::kTiles;
        const float f = __shfl_sync(kFull, factor[pair / 2], T::kPairs ? pair % 2 + 2 * (t >> 1) : 0);
        float(&sum)[4] = walk.sums[i];
        sum[0] *= f, sum[1] *= f, sum[2] *= f, sum[3] *= f;
      }
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const float p0 = exp2_approx(e[i][0]), p1 = exp2_approx(e[i][1]);
      walk.denominator[i] += p0 + p1;
      const __half2 packed = __floats2half2_rn(p0, p1);
      probabilities[i] = *reinterpret_cast<const uint32_t*>(&packed);
    }
  }

  // sums += probabilities * values of one group.
  __device__ __forceinline__ void accumulate(Walk& walk, const uint32_t* codes, const uint32_t (&mine)[kMine],
                                             const RowOffsets<kValueOffsets>& offsets) const {
    if constexpr (T::kPairs) {
      // Lanes with (g & 3) == t hold column g of B: head 2 * pair + (g >> 2), tokens 2t, 2t + 1 (and + 8).
      const int source = 8 * t + 2 * (g >> 2) + (t & 1);
      const uint32_t keep = (g & 3) == t ? ~0u : 0u;
      uint32_t b[HG / 2][2];
#pragma unroll
      for (int i = 0; i < HG / 2; ++i) {
        const uint32_t even = __shfl_sync(kFull, mine[i / 2], source ^ (i & 1));
        const uint32_t odd = __shfl_sync(kFull, mine[i / 2], (source ^ (i & 1)) + 4);
        b[i][0] = __byte_perm(even, odd, 0x5410) & keep;
        b[i][1] = __byte_perm(even, odd, 0x7632) & keep;
      }
#pragma unroll
      for (int x = 0; x < V::kUnits; ++x) {
        uint32_t entries[V::kEntryWords][4], upper[V::kEntryWords][4];
        lookup_values(entries, codes[V::kPacked * x], offsets, x);
        if constexpr (V::kPacked == 2) lookup_values(upper, codes[2 * x + 1], offsets, x);
#pragma unroll
        for (int w = 0; w < V::kEntryWords; ++w) {
          const uint32_t* e = entries[w];
          const uint32_t* f = V::kPacked == 2 ? upper[w] : e;
          const uint32_t a0 = __byte_perm(e[0], e[1], 0x5410), a1 = __byte_perm(f[0], f[1], 0x7632);
          const uint32_t a2 = __byte_perm(e[2], e[3], 0x5410), a3 = __byte_perm(f[2], f[3], 0x7632);
#pragma unroll
          for (int i = 0; i < HG / 2; ++i)
            mma(walk.sums[i * T::kTiles + x * V::kEntryWords + w], a0, a1, a2, a3, b[i][0], b[i][1]);
        }
      }
    } else {
      // k = (token, dim of the word): an entry is used as it comes; column n = (slot n >> 1, dim n & 1).
      const uint32_t other = __shfl_xor_sync(kFull, mine[0], 4);
      const uint32_t even = g & 1 ? other : mine[0], odd = g & 1 ? mine[0] : other;
      const uint32_t take_low = g & 1 ? 0x1044 : 0x4410, take_high = g & 1 ? 0x3244 : 0x4432;
      const uint32_t b00 = __byte_perm(even, 0, take_low), b01 = __byte_perm(odd, 0, take_low);
      const uint32_t b10 = __byte_perm(even, 0, take_high), b11 = __byte_perm(odd, 0, take_high);
      // A tile is two words of an entry, or of two.
      constexpr int kUnitsPerStep = V::kEntryWords == 1 ? 2 : 1, kTilesPerStep = V::kEntryWords == 4 ? 2 : 1;
#pragma unroll
      for (int step = 0; step < T::kSums / kTilesPerStep; ++step) {
        uint32_t words[kUnitsPerStep * V::kEntryWords][4];
#pragma unroll
        for (int i = 0; i < kUnitsPerStep; ++i) {
          const int x = step * kUnitsPerStep + i;
          auto& entries = reinterpret_cast<uint32_t(&)[V::kEntryWords][4]>(words[i * V::kEntryWords]);
          lookup_values(entries, codes[V::kPacked * x], offsets, x);
          if constexpr (V::kPacked == 2) {
            uint32_t upper[1][4];
            lookup_values(upper, codes[2 * x + 1], offsets, x);
#pragma unroll
            for (int a = 0; a < 4; ++a) entries[0][a] = __byte_perm(entries[0][a], upper[0][a], 0x7610);
          }
        }
#pragma unroll
        for (int i = 0; i < kTilesPerStep; ++i) {
          const uint32_t *low = words[2 * i], *high = words[2 * i + 1];
          float(&sums)[4] = walk.sums[step * kTilesPerStep + i];
          mma(sums, low[0], high[0], low[1], high[1], b00, b01);
          mma(sums, low[2], high[2], low[3], high[3], b10, b11);
        }
      }
    }
  }

  __device__ __forceinline__ uint32_t word(uint32_t address) const {
    return *reinterpret_cast<const uint32_t*>(tables + address);
  }
  __device__ __forceinline__ uint2 pair(uint32_t address) const {
    return *reinterpret_cast<const uint2*>(tables + address);
  }
  __device__ __forceinline__ uint4 quad(uint32_t address) const {
    return *reinterpret_cast<const uint4*>(tables + address);
  }

  // Words of the entries of unit x for the lane's four tokens.
  __device__ __forceinline__ void lookup_values(uint32_t (&words)[V::kEntryWords][4], uint32_t codes,
                                                const RowOffsets<V::kMask + 1>& offsets, int x) const {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const uint32_t address = offsets.address(codes, a, x & V::kMask) + T::kValueTable + (x / (V::kMask + 1)) * 128;
      if constexpr (V::kEntryWords == 1) {
        words[0][a] = word(address);
      } else if constexpr (V::kEntryWords == 2) {
        const uint2 entry = pair(address);
        words[0][a] = entry.x, words[1][a] = entry.y;
      } else {
        const uint4 entry = quad(address);
        words[0][a] = entry.x, words[1][a] = entry.y, words[2][a] = entry.z, words[3][a] = entry.w;
      }
    }
  }

  // Adds the slots and writes this warp's row of sums; unit y of slot t is held as unit y ^ t, or entry e by the lanes
  // of row e ^ 2t (ValueOrder::kTurned).
  __device__ void store_rows(const Walk& walk) {
    float* row = scratch[warp];
    const auto& sums = walk.sums;
    constexpr int kMask = V::kMask, kWords = V::kEntryWords;
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      float denominator = walk.denominator[i];
      denominator += __shfl_xor_sync(kFull, denominator, 4);
      denominator += __shfl_xor_sync(kFull, denominator, 9);
      denominator += __shfl_xor_sync(kFull, denominator, kHeadMask);
      const int head = my_head() + 4 * i;
      if (g == 0 && head < HG) state.row_max[warp][head] = walk.offset[i], state.row_sum[warp][head] = denominator;
    }
    if constexpr (V::kTurned && T::kPairs) {
      // Lane t has slots 2 * (t & 1) and the next one of head 2 * pair + (t >> 1).
#pragma unroll
      for (int i = 0; i < HG / 2 * T::kTiles; ++i)
#pragma unroll
        for (int dim = 0; dim < 2; ++dim) {
          const float both = sums[i][2 * dim] + __shfl_xor_sync(kFull, sums[i][2 * dim + 1], 8);
          const float total = both + __shfl_xor_sync(kFull, both, 17);
          const int hg = 2 * (i / T::kTiles) + (t >> 1), word = i % T::kTiles, x = word / kWords;
          const int first = V::kEntryDims * V::entry(x, g, 2 * (t & 1)) + 2 * (word % kWords);
          if ((t & 1) == dim) row[hg * D + first + dim] = total;
        }
    } else if constexpr (V::kTurned) {
#pragma unroll
      for (int i = 0; i < 2 * T::kSums; ++i)  // words
#pragma unroll
        for (int dim = 0; dim < 2; ++dim) {
          float total = sums[i / 2][2 * (i % 2) + dim];
          total += __shfl_xor_sync(kFull, total, 9);
          total += __shfl_xor_sync(kFull, total, 18);
          if (t == i % 4) row[V::kEntryDims * V::entry(i / kWords, g, t) + 2 * (i % kWords) + dim] = total;
        }
    } else if constexpr (T::kPairs) {
#pragma unroll
      for (int pair_index = 0; pair_index < HG / 2; ++pair_index)
#pragma unroll
        for (int w = 0; w < kWords; ++w)
#pragma unroll
          for (int dim = 0; dim < 2; ++dim) {
            float slot[V::kUnits];
#pragma unroll
            for (int z = 0; z < V::kUnits; ++z)
              slot[z] = sums[pair_index * T::kTiles + z * kWords + w][2 * dim] +
                        sums[pair_index * T::kTiles + (z ^ (1 & kMask)) * kWords + w][2 * dim + 1];
#pragma unroll
            for (int z = 0; z < V::kUnits; ++z) {
              if (z & 2 & kMask) continue;
              const float total = slot[z] + __shfl_xor_sync(kFull, slot[z ^ (2 & kMask)], 1);
              // Lane t has slots 2 * (t & 1) and the next one of head 2 * pair + (t >> 1).
              const int y = z ^ (2 * (t & 1) & kMask);
              const int hg = 2 * pair_index + (t >> 1);
              if (kMask == 3 || !(t & 1)) row[hg * D + V::kEntryDims * V::entry(y, g, 0) + 2 * w + dim] = total;
            }
          }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll
        for (int dim = 0; dim < 2; ++dim) {
          auto sum = [&](int z) { return kWords == 1 ? sums[z / 2][2 * (z & 1) + dim] : sums[z][2 * w + dim]; };
          float once[V::kUnits];
#pragma unroll
          for (int z = 0; z < V::kUnits; ++z) once[z] = sum(z) + __shfl_xor_sync(kFull, sum(z ^ (1 & kMask)), 1);
#pragma unroll
          for (int z = 0; z < V::kUnits; z += kMask + 1) {
            const float total = once[z] + __shfl_xor_sync(kFull, once[z ^ (2 & kMask)], 2);
            const int y = z ^ (t & kMask);
            row[V::kEntryDims * V::entry(y, g, 0) + 2 * w + dim] = total;
          }
        }
    }
  }
};

}  // namespace million
