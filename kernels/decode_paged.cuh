// Decode attention over paged product-quantized keys and values, gathered straight into tensor-core fragments.
//
// One query token a sequence.  A block holds the centroid tables of one KV head in shared memory, row = code, and a
// warp takes groups of 16 tokens:
//   scores  A = keys.  A register of the operand is two adjacent dims of one token, which is (a word of) a centroid,
//           so a lookup fills it.  Row r uses the subspaces in the order x ^ r (layout.cuh): lookups of a warp fall in
//           32 banks.  Column n of B holds q in the order of row n, so the score of row r is at column r (mod 8) of C;
//           the other products are the price of conflict-free lookups.
//           For four query heads, rows r and r ^ 4 are brought to the same order by swapping two registers of the
//           upper lanes; then the eight columns serve two heads, 4 * (head & 1) + order, and the second pair's orders
//           are permuted by ^ 2, so that each lane finds two scores of one head, `my_head`.
//   values  A = values, rows = dims or subspaces, k = tokens; columns of B hold the probabilities of one lane slot t
//           each (the slots order their subspaces differently), and the slots are added once at the end.
// Sums and softmax state are fp32, exponents base 2; probabilities are fp16 scaled by up to 2^15.
#pragma once

#include "layout.cuh"
#include "schedule.cuh"

namespace million {

constexpr unsigned kFull = 0xffffffffu;
constexpr float kHeadroom = 7.f;    // probabilities start at 2^7 below the first maximum ...
constexpr float kMaxExponent = 15.f;  // ... and are rescaled when one would pass 2^15 (fp16 ends at 2^16)

template <int D_, int MK_, int MV_, int HG_, int WARPS_, int STAGES_>
struct PagedDecode {
  static constexpr int D = D_, MK = MK_, MV = MV_, HG = HG_, WARPS = WARPS_, STAGES = STAGES_;
  using K = KeyOrder<D, MK>;
  using V = ValueOrder<D, MV>;
  static constexpr int kThreads = WARPS * 32;
  static constexpr int kRow = 256;  // bytes of a table row: byte 1 of an offset is the code
  static constexpr int kValueTable = D == 128 ? kRow * kCentroids : 2 * D;  // D = 64: both tables share the rows
  static constexpr int kTableBytes = D == 128 ? 2 * kRow * kCentroids : kRow * kCentroids;
  static constexpr int kStageBytes = K::kGroupBytes + V::kGroupBytes;
  static constexpr int kRingBytes = WARPS * STAGES * kStageBytes;
  static constexpr int kRowsBytes = WARPS * HG * D * 4;  // one row of sums a warp
  static constexpr bool kStash = HG > 1;                 // window sums wait in shared memory, else in registers
  static constexpr int kScratchBytes = kRingBytes > 2 * kRowsBytes ? kRingBytes : 2 * kRowsBytes;
  static constexpr int kSlices = kThreads / D;           // of a rotation's dot products
  static constexpr int kRotationBytes = (1 + kSlices) * HG * D * 4;
  static constexpr int kSideBytes = kStash && kRowsBytes > kRotationBytes ? kRowsBytes : kRotationBytes;
  static constexpr int kSharedBytes = kTableBytes + kScratchBytes + kSideBytes + HG * D * 2 + 4 * WARPS * HG * 4;
  static constexpr int kTiles = D / 16;   // score instructions a head and group
  static_assert(HG == 1 || HG == 4, "heads of a block");
  static constexpr bool kPairs = HG > 1;  // operands serve two heads; tokens of values packed in pairs
  static constexpr int kSums = kPairs ? HG / 2 * kTiles : D / 32;
};

// Lane constants: one byte a distinct offset inside a table row, three to a register, byte 3 is zero.
template <int N>
struct RowOffsets {
  uint32_t words[(N + 2) / 3];
  template <class F>
  __device__ explicit RowOffsets(F offset) {
#pragma unroll
    for (int w = 0; w < (N + 2) / 3; ++w) {
      words[w] = 0;
#pragma unroll
      for (int j = 0; j < 3; ++j)
        if (3 * w + j < N) words[w] |= uint32_t(offset(3 * w + j)) << (8 * j);
    }
  }
  // Row offset: byte 1 = the code at byte `which` of `codes`, byte 0 = constant i.
  __device__ __forceinline__ uint32_t address(uint32_t codes, int which, int i) const {
    return __byte_perm(codes, words[i / 3], 0x7700u | (which << 4) | (4 + i % 3));
  }
};

template <class T>
struct PagedDecodeBlock {
  static constexpr int D = T::D, HG = T::HG;
  using K = typename T::K;
  using V = typename T::V;

  const PagedDecodeParams& p;
  uint8_t* tables;
  uint8_t* scratch;  // the ring; after it, rows of sums
  float* side;       // while the ring is in use: rotation, then (kStash) the window's rows
  __half* q_shared;  // [HG][D] rotated queries
  float* warp_max;   // [2][WARPS][HG] of codes, of the window
  float* warp_sum;
  int* flag;  // in place of warp_max, between spans
  int warp, lane, g, t;

  __device__ PagedDecodeBlock(const PagedDecodeParams& params, uint8_t* shared) : p(params) {
    tables = shared;
    scratch = tables + T::kTableBytes;
    side = reinterpret_cast<float*>(scratch + T::kScratchBytes);
    q_shared = reinterpret_cast<__half*>(scratch + T::kScratchBytes + T::kSideBytes);
    warp_max = reinterpret_cast<float*>(q_shared + HG * D);
    warp_sum = warp_max + 2 * T::WARPS * HG;
    flag = reinterpret_cast<int*>(warp_max);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    g = lane >> 2;
    t = lane & 3;
  }

  __device__ int valid_heads(int set) const { return min(HG, p.group - set * HG); }
  __device__ int64_t q_row(int b, int h, int set) const { return int64_t(b) * p.kv_heads * p.group + h * p.group + set * HG; }

  __device__ void copy_table(const __half* source, int offset) {
    constexpr int kPieces = 2 * D / 16;  // 16-byte pieces of a row
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(source);
    for (int i = threadIdx.x; i < kCentroids * kPieces; i += T::kThreads)
      cp_async<16>(tables + offset + (i / kPieces) * T::kRow + (i % kPieces) * 16, bytes + i * 16);
  }

  __device__ void load_tables(int h) {
    const int64_t size = int64_t(kCentroids) * D;
    copy_table(p.key_table + (p.key_table_heads > 1 ? h : 0) * size, 0);
    copy_table(p.value_table + (p.value_table_heads > 1 ? h : 0) * size, T::kValueTable);
  }

  // q [HG, D] -> q_shared, rotated if the keys are.  Heads past the group are zero.
  __device__ void load_queries(int b, int h, int set) {
    const int heads = valid_heads(set);
    const int64_t row = q_row(b, h, set);
    if (p.key_rotation == nullptr) {
      for (int i = threadIdx.x; i < HG * D; i += T::kThreads)
        q_shared[i] = i / D < heads ? __float2half_rn(load_element(p.q, row * D + i, p.dtype)) : __half(0.f);
      return;
    }
    constexpr int kSlices = T::kSlices;
    float* raw = side;  // [HG][D], then [slices][HG][D]
    float* part = raw + HG * D;
    for (int i = threadIdx.x; i < HG * D; i += T::kThreads)
      raw[i] = i / D < heads ? load_element(p.q, row * D + i, p.dtype) : 0.f;
    __syncthreads();
    const float* rotation = p.key_rotation + (p.key_rotation_heads > 1 ? h : 0) * int64_t(D) * D;
    const int d = threadIdx.x % D, slice = threadIdx.x / D;
    if (slice < kSlices) {
      float sums[HG] = {};
#pragma unroll 8
      for (int e = slice; e < D; e += kSlices) {
        const float r = __ldg(rotation + e * D + d);
#pragma unroll
        for (int hg = 0; hg < HG; ++hg) sums[hg] += raw[hg * D + e] * r;
      }
#pragma unroll
      for (int hg = 0; hg < HG; ++hg) part[(slice * HG + hg) * D + d] = sums[hg];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HG * D; i += T::kThreads) {
      float sum = 0.f;
      for (int s = 0; s < kSlices; ++s) sum += part[s * HG * D + i];
      q_shared[i] = __float2half_rn(sum);
    }
  }

  // Rows of the warps, of codes and of the window, -> one partial result: [HG][D] sums of codes (both, unless values
  // are rotated), [HG][D] of the window, [HG][2] maximum and denominator.
  __device__ void combine(float* partial, const float* window_rows) {
    constexpr int kRows = 2 * T::WARPS;
    __syncthreads();
    if (warp < HG) {  // maxima of head `warp` become factors
      const int hg = warp;
      const float mine = lane < kRows ? warp_max[lane * HG + hg] : -INFINITY;
      float top = mine;
#pragma unroll
      for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, step));
      const float factor = exp2_approx(mine - top);
      float denominator = lane < kRows ? factor * warp_sum[lane * HG + hg] : 0.f;
#pragma unroll
      for (int step = 16; step; step >>= 1) denominator += __shfl_xor_sync(kFull, denominator, step);
      if (lane < kRows) warp_max[lane * HG + hg] = factor;
      if (lane == 0) *reinterpret_cast<float2*>(partial + 2 * (HG * D + hg)) = make_float2(top, denominator);
    }
    static_assert(kRows <= 32 && HG <= T::WARPS, "a lane a row, a warp a head");
    __syncthreads();
    const float2* rows = reinterpret_cast<const float2*>(scratch);
    const float2* others = reinterpret_cast<const float2*>(window_rows);
    const bool apart = p.value_rotation != nullptr;
    for (int i = threadIdx.x; i < HG * D / 2; i += T::kThreads) {
      const int hg = i / (D / 2);
      float2 sum = make_float2(0.f, 0.f), window_sum = sum;
#pragma unroll
      for (int w = 0; w < T::WARPS; ++w) {
        const float factor = warp_max[w * HG + hg], window_factor = warp_max[(T::WARPS + w) * HG + hg];
        const float2 row = rows[w * HG * D / 2 + i], other = others[w * HG * D / 2 + i];
        sum.x += factor * row.x, sum.y += factor * row.y;
        window_sum.x += window_factor * other.x, window_sum.y += window_factor * other.y;
      }
      float2* to = reinterpret_cast<float2*>(partial);
      to[i] = apart ? sum : make_float2(sum.x + window_sum.x, sum.y + window_sum.y);
      if (apart) to[HG * D / 2 + i] = window_sum;
    }
    __syncthreads();
  }

  // One warp's sums over its tokens of the window, `kDims` dims a lane.
  struct WindowSums {
    float sums[HG][D / 32], top[HG], denominator[HG];
    __device__ void store(float* rows, float* maxima, float* denominators, int warp, int lane) const {
#pragma unroll
      for (int hg = 0; hg < HG; ++hg) {
#pragma unroll
        for (int j = 0; j < D / 32; ++j) rows[(warp * HG + hg) * D + lane * (D / 32) + j] = sums[hg][j];
        if (lane == 0) {
          maxima[warp * HG + hg] = top[hg];
          denominators[warp * HG + hg] = denominator[hg];
        }
      }
    }
  };

  // Exact attention over the window, tokens max(coded, first_valid) .. length - 1, dealt to the warps of the set's
  // `blocks` blocks, of which this is number `index`.  It takes less time than the tables take to arrive.
  __device__ void window(WindowSums& result, const Sequence& s, int b, int h, int set, int index, int blocks) {
    constexpr int kDims = D / 32;  // dims a lane
    const int heads = valid_heads(set);
    const int64_t row = q_row(b, h, set);
    const float log_scale = p.scale * kLog2e;
    float q[HG][kDims];
    auto& [sums, top, denominator] = result;
#pragma unroll
    for (int hg = 0; hg < HG; ++hg) {
      top[hg] = -1e30f;
      denominator[hg] = 0.f;
#pragma unroll
      for (int j = 0; j < kDims; ++j) {
        q[hg][j] = hg < heads ? load_element(p.q, (row + hg) * D + lane * kDims + j, p.dtype) * log_scale : 0.f;
        sums[hg][j] = 0.f;
      }
    }
    const int64_t base = (int64_t(b) * p.kv_heads + h) * p.residual;
    constexpr int kBatch = 4;  // tokens whose loads are in flight together
    const int stride = T::WARPS * blocks;
    for (int first = max(s.coded, s.first_valid) + index * T::WARPS + warp; first < s.length; first += kBatch * stride) {
      uint32_t k[kBatch][kDims / 2], v[kBatch][kDims / 2];
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        const int position = min(first + n * stride, s.length - 1);
        const int64_t offset = ((base + position % p.residual) * D + lane * kDims) / 2;
#pragma unroll
        for (int j = 0; j < kDims / 2; ++j) {
          k[n][j] = __ldg(static_cast<const uint32_t*>(p.key_window) + offset + j);
          v[n][j] = __ldg(static_cast<const uint32_t*>(p.value_window) + offset + j);
        }
      }
      float score[kBatch][HG];
#pragma unroll
      for (int n = 0; n < kBatch; ++n)
#pragma unroll
        for (int hg = 0; hg < HG; ++hg) {
          score[n][hg] = 0.f;
#pragma unroll
          for (int j = 0; j < kDims / 2; ++j) {
            const float2 pair = unpack2(k[n][j], p.dtype);
            score[n][hg] += q[hg][2 * j] * pair.x + q[hg][2 * j + 1] * pair.y;
          }
        }
#pragma unroll
      for (int step = 16; step; step >>= 1)
#pragma unroll
        for (int n = 0; n < kBatch; ++n)
#pragma unroll
          for (int hg = 0; hg < HG; ++hg) score[n][hg] += __shfl_xor_sync(kFull, score[n][hg], step);
#pragma unroll
      for (int hg = 0; hg < HG; ++hg) {
        float next = top[hg];
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          if (first + n * stride >= s.length) score[n][hg] = -INFINITY;
          next = fmaxf(next, score[n][hg]);
        }
        const float factor = exp2_approx(top[hg] - next);
        top[hg] = next;
        denominator[hg] *= factor;
#pragma unroll
        for (int j = 0; j < kDims; ++j) sums[hg][j] *= factor;
#pragma unroll
        for (int n = 0; n < kBatch; ++n) {
          const float weight = exp2_approx(score[n][hg] - next);
          denominator[hg] += weight;
#pragma unroll
          for (int j = 0; j < kDims / 2; ++j) {
            const float2 pair = unpack2(v[n][j], p.dtype);
            sums[hg][2 * j] += weight * pair.x, sums[hg][2 * j + 1] += weight * pair.y;
          }
        }
      }
    }
  }

  // Walks the groups of one warp through the block table.
  struct Cursor {
    const uint8_t* keys;  // this lane's first byte of page 0, head h
    const uint8_t* values;
    const int* table;
    uint32_t key_page_bytes, value_page_bytes;  // of all heads
    int groups_per_page, step_pages, step_groups;
    int left, page, slot, in_page;

    __device__ Cursor(const PagedDecodeParams& p, int b, int h, int lane, int first, int count) {
      groups_per_page = p.page_size / kGroupTokens;
      keys = p.key_pool + h * groups_per_page * K::kGroupBytes + lane * K::kChunk;
      values = p.value_pool + h * groups_per_page * V::kGroupBytes + lane * V::kChunk;
      key_page_bytes = p.kv_heads * groups_per_page * K::kGroupBytes;
      value_page_bytes = p.kv_heads * groups_per_page * V::kGroupBytes;
      step_pages = T::WARPS / groups_per_page, step_groups = T::WARPS % groups_per_page;
      table = p.block_table + int64_t(b) * p.table_width;
      left = count;
      slot = first / groups_per_page, in_page = first % groups_per_page;
      page = left > 0 ? __ldg(table + slot) : 0;
    }
    __device__ __forceinline__ const uint8_t* key_group() const {
      return keys + uint64_t(uint32_t(page)) * key_page_bytes + in_page * K::kGroupBytes;
    }
    __device__ __forceinline__ const uint8_t* value_group() const {
      return values + uint64_t(uint32_t(page)) * value_page_bytes + in_page * V::kGroupBytes;
    }
    __device__ __forceinline__ void next() {
      --left;
      slot += step_pages;
      in_page += step_groups;
      if (in_page >= groups_per_page) in_page -= groups_per_page, ++slot;
      if (left > 0) page = __ldg(table + slot);
    }
  };

  // Score operands of a warp: columns of one head, or of two.
  static constexpr int kColumns = T::kPairs ? HG / 2 : 1;
  static constexpr int kHeadMask = T::kPairs ? 16 : 18;  // with 4 and 9: lanes that share a head differ by these

  // First and second unit of score instruction i (dsub 2).  For pairs, the second is in the other half of the banks.
  __device__ static constexpr int first_unit(int i) { return T::kPairs ? i % 4 + 8 * (i / 4) : i; }
  __device__ static constexpr int second_unit(int i) { return T::kPairs ? first_unit(i) + 4 : i + T::kTiles; }

  // What a warp carries from group to group.
  struct State {
    uint32_t query[kColumns][2 * T::kTiles];  // registers 2i and 2i + 1 serve score instruction i
    float sums[T::kSums][4];
    float offset = -1e30f;  // log2 of the unit of the probabilities of my_head
    float denominator = 0.f;
    int my_head;  // the head whose scores this lane finds, if below HG
  };
  static constexpr int kKeyOffsets = K::kDsub == 2 ? 8 : 4;
  static constexpr int kValueOffsets = V::kMask + 1;

  __device__ __forceinline__ void load_operand(State& state) const {
    const uint32_t* q_words = reinterpret_cast<const uint32_t*>(q_shared);
    // Heads 2c and 2c + 1 in columns 0-3 and 4-7, or one head.
    state.my_head = T::kPairs ? 2 * ((t & 1) ^ ((g >> 1) & 1)) + (t >> 1) : t ^ (g >> 1);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int hg = T::kPairs ? 2 * c + (g >> 2) : 0;
      const int order = T::kPairs ? (g & 3) ^ (2 * c) : g;
#pragma unroll
      for (int i = 0; i < T::kTiles; ++i)
#pragma unroll
        for (int high = 0; high < 2; ++high) {
          const int word = K::kDsub == 2 ? K::subspace(high ? second_unit(i) : first_unit(i), order, t)
                                         : 2 * K::subspace(i, order, t) + high;
          state.query[c][2 * i + high] = q_words[hg * D / 2 + word];
        }
    }
  }

  __device__ __forceinline__ void score(float (&scores)[kColumns][4], const uint32_t* codes, const State& state,
                                        const RowOffsets<kKeyOffsets>& offsets) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c) scores[c][0] = scores[c][1] = scores[c][2] = scores[c][3] = 0.f;
#pragma unroll
    for (int i = 0; i < T::kTiles; ++i) {
      uint32_t a[4];
      if constexpr (K::kDsub == 2) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const int x = r & 2 ? second_unit(i) : first_unit(i);
          const int at = K::byte(x, r & 1);
          a[r] = word(offsets.address(codes[at / 4], at % 4, x & 7) + (x >> 3) * 128);
        }
        if constexpr (T::kPairs) {  // lanes of rows 4-7 looked the units up in the other order
          const bool swap = g & 4;
          const uint32_t a0 = a[0], a1 = a[1];
          a[0] = swap ? a[2] : a0, a[1] = swap ? a[3] : a1;
          a[2] = swap ? a0 : a[2], a[3] = swap ? a1 : a[3];
        }
      } else {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = K::byte(i, half);
          const uint2 entry = pair(offsets.address(codes[at / 4], at % 4, i & 3) + (i >> 2) * 128);
          a[half] = entry.x, a[half + 2] = entry.y;
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        mma(scores[c], a[0], a[1], a[2], a[3], state.query[c][2 * i], state.query[c][2 * i + 1]);
    }
  }

  // Scores -> this lane's two probabilities (tokens g and g + 8 of my_head) as halves; rescales the sums if need be.
  __device__ __forceinline__ uint32_t soften(const float (&scores)[kColumns][4], State& state, int token,
                                             int first_valid) const {
    float s0 = select(g & 1, scores[0][1], scores[0][0]), s1 = select(g & 1, scores[0][3], scores[0][2]);
    if constexpr (T::kPairs) {
#pragma unroll
      for (int c = 1; c < kColumns; ++c) {
        const bool here = state.my_head >> 1 == c;
        s0 = select(here, select(g & 1, scores[c][1], scores[c][0]), s0);
        s1 = select(here, select(g & 1, scores[c][3], scores[c][2]), s1);
      }
    } else if (state.my_head != 0) {
      s0 = s1 = -INFINITY;
    }
    if (token < first_valid) {  // the same for all lanes: only a sequence's first group can hold padding
      if (token + g < first_valid) s0 = -INFINITY;
      if (token + g + 8 < first_valid) s1 = -INFINITY;
    }
    const float log_scale = p.scale * kLog2e;
    float e0 = fmaf(s0, log_scale, -state.offset), e1 = fmaf(s1, log_scale, -state.offset);
    if (__any_sync(kFull, fmaxf(e0, e1) > kMaxExponent)) {
      float top = fmaxf(s0, s1) * log_scale;
      top = fmaxf(top, __shfl_xor_sync(kFull, top, 4));  // lanes of one head differ by these masks
      top = fmaxf(top, __shfl_xor_sync(kFull, top, 9));
      top = fmaxf(top, __shfl_xor_sync(kFull, top, kHeadMask));
      const float next = fmaxf(state.offset, top - kHeadroom);
      const float factor = exp2_approx(state.offset - next);
      state.offset = next;
      state.denominator *= factor;
#pragma unroll
      for (int i = 0; i < T::kSums; ++i) {
        // Of a lane of the head whose sums these are: 2 * (i / kTiles) + (t >> 1).
        const float f = __shfl_sync(kFull, factor, T::kPairs ? i / T::kTiles + 2 * (t >> 1) : 0);
        float(&sum)[4] = state.sums[i];
        sum[0] *= f, sum[1] *= f, sum[2] *= f, sum[3] *= f;
      }
      e0 = fmaf(s0, log_scale, -next), e1 = fmaf(s1, log_scale, -next);
    }
    const float p0 = exp2_approx(e0), p1 = exp2_approx(e1);
    state.denominator += p0 + p1;
    const __half2 packed = __floats2half2_rn(p0, p1);
    return *reinterpret_cast<const uint32_t*>(&packed);
  }

  // sums += probabilities * values of one group.
  __device__ __forceinline__ void accumulate(State& state, const uint32_t* codes, uint32_t mine,
                                             const RowOffsets<kValueOffsets>& offsets) const {
    if constexpr (T::kPairs) {
      // Lanes with (g & 3) == t hold column g of B: head 2 * pair + (g >> 2), tokens 2t, 2t + 1 (and + 8).
      const int source = 8 * t + 2 * (g >> 2) + (t & 1);
      const uint32_t keep = (g & 3) == t ? ~0u : 0u;
      uint32_t b[HG / 2][2];
#pragma unroll
      for (int i = 0; i < HG / 2; ++i) {
        const uint32_t even = __shfl_sync(kFull, mine, source ^ i);
        const uint32_t odd = __shfl_sync(kFull, mine, (source ^ i) + 4);
        b[i][0] = __byte_perm(even, odd, 0x5410) & keep;
        b[i][1] = __byte_perm(even, odd, 0x7632) & keep;
      }
#pragma unroll
      for (int x = 0; x < V::kUnits; ++x) {
        uint32_t low[4], high[4];
        lookup_values(low, high, codes[x], offsets, x);
#pragma unroll
        for (int w = 0; w < V::kDsub / 2; ++w) {
          const uint32_t* e = w ? high : low;
          const uint32_t a0 = __byte_perm(e[0], e[1], 0x5410), a1 = __byte_perm(e[0], e[1], 0x7632);
          const uint32_t a2 = __byte_perm(e[2], e[3], 0x5410), a3 = __byte_perm(e[2], e[3], 0x7632);
#pragma unroll
          for (int i = 0; i < HG / 2; ++i)
            mma(state.sums[i * T::kTiles + x * (V::kDsub / 2) + w], a0, a1, a2, a3, b[i][0], b[i][1]);
        }
      }
    } else {
      // k = (token, dim of the word): an entry is used as it comes; column n = (slot n >> 1, dim n & 1).
      const uint32_t other = __shfl_xor_sync(kFull, mine, 4);
      const uint32_t even = g & 1 ? other : mine, odd = g & 1 ? mine : other;
      const uint32_t take_low = g & 1 ? 0x1044 : 0x4410, take_high = g & 1 ? 0x3244 : 0x4432;
      const uint32_t b00 = __byte_perm(even, 0, take_low), b01 = __byte_perm(odd, 0, take_low);
      const uint32_t b10 = __byte_perm(even, 0, take_high), b11 = __byte_perm(odd, 0, take_high);
      constexpr int kUnitsPerTile = V::kDsub == 2 ? 2 : 1;
#pragma unroll
      for (int tile = 0; tile < T::kSums; ++tile) {
        uint32_t low[4], high[4], rest[4];
        lookup_values(low, high, codes[tile * kUnitsPerTile], offsets, tile * kUnitsPerTile);
        if constexpr (V::kDsub == 2) lookup_values(high, rest, codes[tile * 2 + 1], offsets, tile * 2 + 1);
        mma(state.sums[tile], low[0], high[0], low[1], high[1], b00, b01);
        mma(state.sums[tile], low[2], high[2], low[3], high[3], b10, b11);
      }
    }
  }

  // One span of a set: coded groups first .. last - 1 of KV head h and this block's share of the window.
  __device__ void attend(const Sequence& s, int b, int h, int set, int first, int last, int index, int blocks,
                         bool needs_tables, float* partial) {
    const int mine = last - first - warp;
    const int rounds = mine > 0 ? (mine + T::WARPS - 1) / T::WARPS : 0;
    Cursor cursor(p, b, h, lane, first + warp, rounds);
    uint8_t* ring = scratch + warp * (T::STAGES * T::kStageBytes);
    int write = 0;
    auto ask = [&] {  // the next group into the ring
      if (cursor.left > 0) {
        const uint8_t *keys = cursor.key_group(), *values = cursor.value_group();
        uint8_t* stage = ring + write;
#pragma unroll
        for (int c = 0; c < K::kChunks; ++c)
          cp_async<K::kChunk>(stage + (c * 32 + lane) * K::kChunk, keys + c * 32 * K::kChunk);
#pragma unroll
        for (int c = 0; c < V::kChunks; ++c)
          cp_async<V::kChunk>(stage + K::kGroupBytes + (c * 32 + lane) * V::kChunk, values + c * 32 * V::kChunk);
        cursor.next();
      }
      cp_async_commit();
      write += T::kStageBytes;
      if (write == T::STAGES * T::kStageBytes) write = 0;
    };
    if (needs_tables) load_tables(h);
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < T::STAGES - 1; ++i) ask();
    load_queries(b, h, set);
    WindowSums window_sums;
    window(window_sums, s, b, h, set, index, blocks);
    float* window_max = warp_max + T::WARPS * HG;
    float* window_denominator = warp_sum + T::WARPS * HG;
    if constexpr (T::kStash) {
      __syncthreads();  // the rotation is done with `side`
      window_sums.store(side, window_max, window_denominator, warp, lane);
    }
    cp_async_wait<T::STAGES - 1>();  // the tables
    __syncthreads();

    State state;
    load_operand(state);
    const RowOffsets<kKeyOffsets> key_offsets([&](int x) { return K::kEntryBytes * K::subspace(x, g, t); });
    const RowOffsets<kValueOffsets> value_offsets([&](int x) { return V::kEntryBytes * V::subspace(x, g, t); });
#pragma unroll
    for (int i = 0; i < T::kSums; ++i)
      state.sums[i][0] = state.sums[i][1] = state.sums[i][2] = state.sums[i][3] = 0.f;
    int token = (first + warp) * kGroupTokens;

    // Scores of a group and values of the one before are independent, which hides their latencies.
    uint32_t value_codes[V::kLaneBytes / 4] = {};
    uint32_t probabilities = 0;
    int read = 0;
    for (int round = 0; round < rounds; ++round) {
      cp_async_wait<T::STAGES - 2>();
      uint32_t key_codes[K::kLaneBytes / 4];
      load_codes<K>(key_codes, ring + read);
      float scores[kColumns][4];
      score(scores, key_codes, state, key_offsets);
      accumulate(state, value_codes, probabilities, value_offsets);
      load_codes<V>(value_codes, ring + read + K::kGroupBytes);
      read += T::kStageBytes;
      if (read == T::STAGES * T::kStageBytes) read = 0;
      ask();
      probabilities = soften(scores, state, token, s.first_valid);
      token += T::WARPS * kGroupTokens;
    }
    if (rounds > 0) accumulate(state, value_codes, probabilities, value_offsets);
    cp_async_wait<0>();
    __syncthreads();  // every warp is done with the ring
    store_rows(state.sums, state.offset, state.denominator, state.my_head);
    float* window_rows = side;
    if constexpr (!T::kStash) {
      window_rows = reinterpret_cast<float*>(scratch + T::kRowsBytes);
      window_sums.store(window_rows, window_max, window_denominator, warp, lane);
    }
    combine(partial, window_rows);
  }

  template <class Order>
  __device__ __forceinline__ void load_codes(uint32_t (&codes)[Order::kLaneBytes / 4], const uint8_t* stage) const {
    if constexpr (Order::kChunk == 16) {
#pragma unroll
      for (int c = 0; c < Order::kChunks; ++c) {
        const uint4 piece = *reinterpret_cast<const uint4*>(stage + (c * 32 + lane) * 16);
        codes[4 * c] = piece.x, codes[4 * c + 1] = piece.y, codes[4 * c + 2] = piece.z, codes[4 * c + 3] = piece.w;
      }
    } else {
      const uint2 piece = *reinterpret_cast<const uint2*>(stage + lane * 8);
      codes[0] = piece.x, codes[1] = piece.y;
    }
  }

  __device__ __forceinline__ uint32_t word(uint32_t address) const {
    return *reinterpret_cast<const uint32_t*>(tables + address);
  }
  __device__ __forceinline__ uint2 pair(uint32_t address) const {
    return *reinterpret_cast<const uint2*>(tables + address);
  }

  // Entries of unit x for the lane's four tokens: `low` dims 0 and 1, `high` dims 2 and 3 (dsub 4 only).
  __device__ __forceinline__ void lookup_values(uint32_t (&low)[4], uint32_t (&high)[4], uint32_t codes,
                                                const RowOffsets<V::kMask + 1>& offsets, int x) const {
#pragma unroll
    for (int a = 0; a < 4; ++a) {
      const uint32_t address = offsets.address(codes, a, x & V::kMask) + T::kValueTable + (x / (V::kMask + 1)) * 128;
      if constexpr (V::kDsub == 2) {
        low[a] = word(address);
      } else {
        const uint2 entry = pair(address);
        low[a] = entry.x, high[a] = entry.y;
      }
    }
  }

  // Adds the slots and writes this warp's row of sums; unit y of slot t is held as unit y ^ t.
  __device__ void store_rows(const float (&sums)[T::kSums][4], float offset, float denominator, int my_head) {
    float* row = reinterpret_cast<float*>(scratch) + warp * HG * D;
    constexpr int kMask = V::kMask, kWords = V::kDsub / 2;
    denominator += __shfl_xor_sync(kFull, denominator, 4);
    denominator += __shfl_xor_sync(kFull, denominator, 9);
    denominator += __shfl_xor_sync(kFull, denominator, kHeadMask);
    if (g == 0 && my_head < HG) {
      warp_max[warp * HG + my_head] = offset;
      warp_sum[warp * HG + my_head] = denominator;
    }
    if constexpr (T::kPairs) {
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
              if (kMask == 3 || !(t & 1)) row[hg * D + V::kDsub * V::subspace(y, g, 0) + 2 * w + dim] = total;
            }
          }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w)
#pragma unroll
        for (int dim = 0; dim < 2; ++dim) {
          auto sum = [&](int z) { return V::kDsub == 2 ? sums[z / 2][2 * (z & 1) + dim] : sums[z][2 * w + dim]; };
          float once[V::kUnits];
#pragma unroll
          for (int z = 0; z < V::kUnits; ++z) once[z] = sum(z) + __shfl_xor_sync(kFull, sum(z ^ (1 & kMask)), 1);
#pragma unroll
          for (int z = 0; z < V::kUnits; z += kMask + 1) {
            const float total = once[z] + __shfl_xor_sync(kFull, once[z ^ (2 & kMask)], 2);
            const int y = z ^ (t & kMask);
            row[V::kDsub * V::subspace(y, g, 0) + 2 * w + dim] = total;
          }
        }
    }
  }

  // Partial results of a set, `count` slots of `stride` floats, -> out; by the last block to arrive.
  __device__ void reduce(int b, int h, int set, const float* slots, int count) {
    constexpr int kStride = partial_floats(D, HG), kBatch = T::kPairs ? 16 : 8;
    float2* sums = reinterpret_cast<float2*>(scratch);  // [HG][D] of codes, to be rotated back, then of the window
    const int64_t row = q_row(b, h, set);
    const int outputs = valid_heads(set) * D;
    const bool apart = p.value_rotation != nullptr;
    for (int i = threadIdx.x; i < outputs / 2; i += T::kThreads) {
      const int hg = i / (D / 2);
      float top = -INFINITY, denominator = 0.f;
      float2 sum = make_float2(0.f, 0.f), window_sum = sum;
      for (int first = 0; first < count; first += kBatch) {  // loads of a batch are in flight together
        float2 ml[kBatch], o[kBatch], window[kBatch];
        float next = top;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const bool inside = first + j < count;
          const float2* slot = reinterpret_cast<const float2*>(slots + (inside ? first + j : 0) * int64_t(kStride));
          ml[j] = inside ? __ldcg(slot + HG * D + hg) : make_float2(-INFINITY, 0.f);
          o[j] = __ldcg(slot + i);
          window[j] = apart ? __ldcg(slot + HG * D / 2 + i) : make_float2(0.f, 0.f);
        }
#pragma unroll
        for (int j = 0; j < kBatch; ++j) next = fmaxf(next, ml[j].x);
        const float factor = exp2_approx(top - next);
        sum.x *= factor, sum.y *= factor, window_sum.x *= factor, window_sum.y *= factor;
        denominator *= factor, top = next;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float weight = exp2_approx(ml[j].x - next);
          denominator += weight * ml[j].y;
          sum.x += weight * o[j].x, sum.y += weight * o[j].y;
          window_sum.x += weight * window[j].x, window_sum.y += weight * window[j].y;
        }
      }
      const float inverse = denominator > 0.f ? 1.f / denominator : 0.f;
      sum.x *= inverse, sum.y *= inverse;
      if (apart) {
        sums[i] = sum;
        sums[HG * D / 2 + i] = make_float2(window_sum.x * inverse, window_sum.y * inverse);
      } else {
        store_element(p.out, row * D + 2 * i, sum.x, p.dtype);
        store_element(p.out, row * D + 2 * i + 1, sum.y, p.dtype);
      }
    }
    if (!apart) return;
    __syncthreads();
    const float* rotated = reinterpret_cast<const float*>(sums);
    const float* rotation = p.value_rotation + (p.value_rotation_heads > 1 ? h : 0) * int64_t(D) * D;
    for (int d = warp; d < D; d += T::WARPS) {  // o[d] = sum over e of o_rot[e] * R[d, e]
      float r[D / 32];
#pragma unroll
      for (int j = 0; j < D / 32; ++j) r[j] = __ldg(rotation + d * D + 32 * j + lane);
      for (int i = d; i < outputs; i += D) {
        float sum = 0.f;
#pragma unroll
        for (int j = 0; j < D / 32; ++j) sum += r[j] * rotated[i / D * D + 32 * j + lane];
#pragma unroll
        for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(kFull, sum, step);
        if (lane == 0) store_element(p.out, row * D + i, sum + rotated[HG * D + i], p.dtype);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) paged_decode_kernel(const __grid_constant__ PagedDecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  wait_for_previous_launch();
  PagedDecodeBlock<T> block(p, shared);
  const Schedule schedule(p, gridDim.x);
  if (int(blockIdx.x) >= schedule.blocks) return;
  int unit = schedule.begin(blockIdx.x);
  const int end = schedule.begin(blockIdx.x + 1);
  const int sets = p.kv_heads * p.head_sets;
  const int64_t stride = partial_floats(T::D, T::HG);

  int base = 0;  // first unit of sequence b
  int loaded = -1;
  for (int b = 0; b < p.batch && unit < end; ++b) {
    const Sequence s = sequence(p, b);
    const int next = base + s.units() * sets;
    while (unit < end && unit < next) {
      const int set = (unit - base) / s.units();
      const int set_begin = base + set * s.units(), set_end = set_begin + s.units();
      const int stop = min(end, set_end);
      const int h = set / p.head_sets, sub = set % p.head_sets, id = b * sets + set;
      const int from = schedule.owner(set_begin), count = schedule.owner(set_end - 1) - from + 1;
      const int first = s.first_group + unit - set_begin;
      const int last = s.first_group + min(stop - set_begin, s.groups);

      __syncthreads();  // the tables and the scratch of the previous set are free
      const bool needs_tables =
          first < last && loaded != h && (loaded < 0 || p.key_table_heads > 1 || p.value_table_heads > 1);
      if (first < last) loaded = h;
      block.attend(s, b, h, sub, first, last, blockIdx.x - from, count, needs_tables,
                   p.partials + (int64_t(blockIdx.x) + id) * stride);
      bool last_of_set = true;
      if (count > 1) {
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
          const int arrived = atomicAdd(p.counters + id, 1);
          *block.flag = arrived == count - 1;
          if (arrived == count - 1) p.counters[id] = 0;
        }
        __syncthreads();
        last_of_set = *block.flag;
        __threadfence();
      }
      if (last_of_set) block.reduce(b, h, sub, p.partials + (int64_t(from) + id) * stride, count);
      unit = stop;
    }
    base = next;
  }
}

}  // namespace million
