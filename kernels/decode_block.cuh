// What surrounds a block's walk over the codes: its spans, queries, the residual window, and its partial results.
//
// A block serves up to HG query heads of one KV head of one sequence at a time (a "set") and a span of its tokens.  The walk
// (decode_walk.cuh) leaves one row of sums a warp, with its own maximum and denominator, to be combined here into a partial
// result; merge.cuh adds those up.  Sums and softmax state are fp32, exponents base 2.
//
// A launch is short (4K tokens: 10 us), so the loads that it starts with are issued together: tables for the head that the
// block will have if the lengths are equal, while the lengths are read; then block table, queries and window at once.
#pragma once

#include "layout.cuh"
#include "schedule.cuh"

namespace million {

constexpr unsigned kFull = 0xffffffffu;
constexpr float kHeadroom = 7.f;      // probabilities start at 2^7 below the first maximum ...
constexpr float kMaxExponent = 15.f;  // ... and are rescaled when one would pass 2^15 (fp16 ends at 2^16)

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

// Vectors of [HG][D] floats in shared memory, `pitch` floats from one to the next.
struct Vectors {
  float* first;
  int pitch;
  __device__ float* operator[](int i) const { return first + i * pitch; }
};

// Walks a warp through every STRIDE-th group of a set, from `first`: where each lies in the pools.
template <int STRIDE>
struct Cursor {
  const int* table;
  int head, slot, in_page, page;  // `slot` of the block table holds `page`

  __device__ Cursor(const PagedDecodeParams& p, int b, int h, int first, bool any)
      : table(p.block_table + int64_t(b) * p.table_width), head(h) {
    slot = p.by_page_groups.quotient(first), in_page = first - slot * (p.page_size / kGroupTokens);
    page = any ? __ldg(table + slot) : 0;
  }
  // In groups from the start of a pool.
  __device__ __forceinline__ uint32_t place(const PagedDecodeParams& p) const {
    return (uint32_t(page) * p.kv_heads + head) * (p.page_size / kGroupTokens) + in_page;
  }
  __device__ __forceinline__ void next(const PagedDecodeParams& p, bool any) {
    const int units = p.page_size / kGroupTokens;
    in_page += STRIDE;
    while (in_page >= units) in_page -= units, ++slot;
    if (any) page = __ldg(table + slot);
  }
};

// Shared memory of a block apart from tables and codes.
template <int D, int HG, int WARPS>
struct alignas(16) BlockState {
  __half q[HG][D];                       // rotated queries
  float window[HG][D];                   // the window's sums, with
  float window_max[HG], window_sum[HG];  // their maximum and denominator
  float row_max[WARPS][HG], row_sum[WARPS][HG];
};

// T: D, HG, WARPS, kThreads.
template <class T>
struct DecodeBlock {
  static constexpr int D = T::D, HG = T::HG, kThreads = T::kThreads;

  const PagedDecodeParams& p;
  BlockState<D, HG, T::WARPS>& state;
  int warp, lane, g, t;

  __device__ DecodeBlock(const PagedDecodeParams& params, BlockState<D, HG, T::WARPS>& shared) : p(params), state(shared) {
    warp = __reduce_max_sync(kFull, int(threadIdx.x) / 32);  // so the compiler knows: the same in all lanes
    lane = threadIdx.x % 32;
    g = lane >> 2;
    t = lane & 3;
  }

  __device__ int valid_heads(int set) const { return min(HG, p.group - set * HG); }
  __device__ int64_t q_row(int b, int h, int set) const { return int64_t(b) * p.kv_heads * p.group + h * p.group + set * HG; }

  static constexpr int kDims = D / 32, kWords = kDims / 2;  // of a vector, a lane's
  static constexpr int kBatch = 4;                          // tokens of the window whose loads are in flight together

  // The lane's part of the queries and of the warp's first tokens of the window, on their way.
  struct Loads {
    uint32_t q[HG][kWords], k[kBatch][kWords], v[kBatch][kWords];
  };

  // Tokens of the window of this warp: first, first + stride, ... below s.length.
  struct WindowShare {
    int first, stride;
  };
  __device__ WindowShare window_share(const Sequence& s, int index, int blocks) const {
    return {max(s.coded, s.first_valid) + index * T::WARPS + warp, T::WARPS * blocks};
  }

  __device__ __forceinline__ void load_window(Loads& loads, const Sequence& s, int b, int h, int first, int stride) const {
    const int64_t base = (int64_t(b) * p.kv_heads + h) * p.residual;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const int position = first + n * stride;
      if (position >= s.length) break;
      const int slot = position - p.by_residual.quotient(position) * p.residual;
      const int64_t word = ((base + slot) * D + lane * kDims) / 2;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        loads.k[n][j] = __ldg(static_cast<const uint32_t*>(p.key_window) + word + j);
        loads.v[n][j] = __ldg(static_cast<const uint32_t*>(p.value_window) + word + j);
      }
    }
  }

  __device__ __forceinline__ void load(Loads& loads, const Sequence& s, int b, int h, int set, WindowShare share) const {
    const int64_t row = q_row(b, h, set);
    const int heads = valid_heads(set);
#pragma unroll
    for (int hg = 0; hg < HG; ++hg)  // heads past the group repeat its last
#pragma unroll
      for (int j = 0; j < kWords; ++j)
        loads.q[hg][j] = __ldg(static_cast<const uint32_t*>(p.q) + (row + min(hg, heads - 1)) * (D / 2) + lane * kWords + j);
    load_window(loads, s, b, h, share.first, share.stride);
  }

  // Loaded queries -> state.q, rotated if the keys are.  Synchronises.
  __device__ void prepare_queries(const Loads& loads, int h, Vectors scratch) {
    const bool rotated = p.key_rotation != nullptr;
    constexpr int kRowThreads = D / 4, kGroups = 32 / kRowThreads;  // of a row, 16 bytes a thread; rows of a warp at once
    constexpr int kRows = T::WARPS * kGroups, kSteps = (D + kRows - 1) / kRows;
    const int quad = lane % kRowThreads, first = warp * kGroups + lane / kRowThreads;
    const float4* rotation = reinterpret_cast<const float4*>(
        p.key_rotation + (p.key_rotation_heads > 1 ? h : 0) * int64_t(D) * D);
#pragma unroll
    for (int hg = 0; hg < HG; ++hg) {
      if (warp != hg % T::WARPS) continue;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        const float2 pair = unpack2(loads.q[hg][j], p.dtype);
        if (rotated) reinterpret_cast<float2*>(state.window[hg])[lane * kWords + j] = pair;  // not yet in use
        else reinterpret_cast<__half2*>(state.q[hg])[lane * kWords + j] = __float22half2_rn(pair);
      }
    }
    if (!rotated) return;
    float4 r[kSteps];  // rows first, first + kRows, ... of the matrix, zeros past its end
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      r[j] = __ldg(rotation + min(first + j * kRows, D - 1) * kRowThreads + quad);
      if (D % kRows && first + j * kRows >= D) r[j] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    __syncthreads();
#pragma unroll
    for (int hg = 0; hg < HG; ++hg) {
      float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        const float x = state.window[hg][min(first + j * kRows, D - 1)];
        sum.x += x * r[j].x, sum.y += x * r[j].y, sum.z += x * r[j].z, sum.w += x * r[j].w;
      }
      if constexpr (kGroups == 2) {
        sum.x += __shfl_xor_sync(kFull, sum.x, 16), sum.y += __shfl_xor_sync(kFull, sum.y, 16);
        sum.z += __shfl_xor_sync(kFull, sum.z, 16), sum.w += __shfl_xor_sync(kFull, sum.w, 16);
      }
      static_assert(kGroups <= 2, "a row of 64 or 128");
      if (lane < kRowThreads) reinterpret_cast<float4*>(scratch[warp] + hg * D)[quad] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < HG * D; i += kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < T::WARPS; ++w) sum += scratch[w][i];
      state.q[i / D][i % D] = __float2half_rn(sum);
    }
  }

  // Exact attention over the warps' shares of the window -> state.window.  Synchronises.
  __device__ void window(Loads& loads, const Sequence& s, int b, int h, WindowShare share, Vectors scratch) {
    const float log_scale = p.scale * kLog2e;
    float sums[HG][kDims] = {}, top[HG], denominator[HG] = {};
#pragma unroll
    for (int hg = 0; hg < HG; ++hg) top[hg] = -1e30f;
    for (int first = share.first; first < s.length; first += kBatch * share.stride) {
      if (first != share.first) load_window(loads, s, b, h, first, share.stride);
#pragma unroll
      for (int n = 0; n < kBatch; ++n) {
        if (first + n * share.stride >= s.length) break;
        float score[HG];
#pragma unroll
        for (int hg = 0; hg < HG; ++hg) {
          score[hg] = 0.f;
#pragma unroll
          for (int j = 0; j < kWords; ++j) {
            const float2 q = unpack2(loads.q[hg][j], p.dtype), k = unpack2(loads.k[n][j], p.dtype);
            score[hg] += q.x * k.x + q.y * k.y;
          }
        }
#pragma unroll
        for (int step = 16; step; step >>= 1)
#pragma unroll
          for (int hg = 0; hg < HG; ++hg) score[hg] += __shfl_xor_sync(kFull, score[hg], step);
#pragma unroll
        for (int hg = 0; hg < HG; ++hg) {
          const float next = fmaxf(top[hg], score[hg] * log_scale);
          const float factor = exp2_approx(top[hg] - next), weight = exp2_approx(score[hg] * log_scale - next);
          top[hg] = next;
          denominator[hg] = denominator[hg] * factor + weight;
#pragma unroll
          for (int j = 0; j < kWords; ++j) {
            const float2 pair = unpack2(loads.v[n][j], p.dtype);
            sums[hg][2 * j] = sums[hg][2 * j] * factor + weight * pair.x;
            sums[hg][2 * j + 1] = sums[hg][2 * j + 1] * factor + weight * pair.y;
          }
        }
      }
    }
    if (p.key_rotation != nullptr) __syncthreads();  // scratch is free
#pragma unroll
    for (int hg = 0; hg < HG; ++hg) {
#pragma unroll
      for (int j = 0; j < kDims; ++j) scratch[warp][hg * D + lane * kDims + j] = sums[hg][j];
      if (lane == 0) state.row_max[warp][hg] = top[hg], state.row_sum[warp][hg] = denominator[hg];
    }
    __syncthreads();
    factors([](int) { return make_float2(-1e30f, 0.f); }, [&](int hg, float maximum, float sum, float) {
      state.window_max[hg] = maximum, state.window_sum[hg] = sum;
    });
    __syncthreads();
    for (int i = threadIdx.x; i < HG * D; i += kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < T::WARPS; ++w) sum += state.row_max[w][i / D] * scratch[w][i];
      state.window[i / D][i % D] = sum;
    }
  }

  // Maxima of the rows become factors, in place; store(head, maximum, denominator, factor of the extra row) once a head.
  // The extra row is that of the maximum and denominator other(head).  A head is one warp's, and so are its other() and
  // store(), which one lane of it calls.
  template <class Other, class Store>
  __device__ void factors(Other other, Store store) {
    if constexpr (HG <= T::WARPS) {
      if (warp < HG) factors_of(warp, other, store);
    } else {
#pragma unroll 1
      for (int hg = warp; hg < HG; hg += T::WARPS) factors_of(hg, other, store);
    }
  }
  template <class Other, class Store>
  __device__ __forceinline__ void factors_of(int hg, Other other, Store store) {
    static_assert(T::WARPS < 32, "a lane a row");
    const float2 extra = lane == T::WARPS ? other(hg) : make_float2(-INFINITY, 0.f);
    const float mine = lane < T::WARPS ? state.row_max[lane][hg] : extra.x;
    const float sum = lane < T::WARPS ? state.row_sum[lane][hg] : extra.y;
    float top = mine;
#pragma unroll
    for (int step = 16; step; step >>= 1) top = fmaxf(top, __shfl_xor_sync(kFull, top, step));
    const float factor = exp2_approx(mine - top);
    float denominator = factor * sum;
#pragma unroll
    for (int step = 16; step; step >>= 1) denominator += __shfl_xor_sync(kFull, denominator, step);
    if (lane < T::WARPS) state.row_max[lane][hg] = factor;
    if (lane == T::WARPS) store(hg, top, denominator, factor);
  }

  // Rows of the warps [WARPS][HG][D] and the window -> one partial result: [HG][D] sums of codes (of both, unless
  // values are rotated), [HG][D] of the window, [HG][2] maximum and denominator.
  __device__ void combine(float* partial, Vectors rows) {
    __syncthreads();
    factors([&](int hg) { return make_float2(state.window_max[hg], state.window_sum[hg]); },
            [&](int hg, float maximum, float sum, float factor) {
      state.window_max[hg] = factor;
      *reinterpret_cast<float2*>(partial + 2 * (HG * D + hg)) = make_float2(maximum, sum);
    });
    __syncthreads();
    const bool apart = p.value_rotation != nullptr;
    for (int i = threadIdx.x; i < HG * D / 2; i += kThreads) {
      const int hg = i / (D / 2);
      float2 sum = make_float2(0.f, 0.f), other = reinterpret_cast<const float2*>(state.window)[i];
      other.x *= state.window_max[hg], other.y *= state.window_max[hg];
#pragma unroll
      for (int w = 0; w < T::WARPS; ++w) {
        const float factor = state.row_max[w][hg];
        const float2 row = reinterpret_cast<const float2*>(rows[w])[i];
        sum.x += factor * row.x, sum.y += factor * row.y;
      }
      float2* to = reinterpret_cast<float2*>(partial);
      to[i] = apart ? sum : make_float2(sum.x + other.x, sum.y + other.y);
      if (apart) to[HG * D / 2 + i] = other;
    }
    __syncthreads();
  }
};

// The kernel's body: this block's spans, one after the other.  Block: attend(), load_tables(), wait_for_tables().
template <class T, class Block>
__device__ void decode_spans(const PagedDecodeParams& p, Block& block) {
  const int sets = p.kv_heads * p.head_sets;
  const bool tables_differ = p.key_table_heads > 1 || p.value_table_heads > 1;
  // With equal lengths the block begins with this set.
  const int guess = small_quotient(blockIdx.x * (p.batch * sets), p.grid);
  int loaded = p.by_head_sets.quotient(guess - small_quotient(guess, sets) * sets);
  block.load_tables(loaded);

  const Schedule schedule(p, block.lane);
  if (int(blockIdx.x) >= schedule.blocks) {
    block.wait_for_tables();
    return;
  }
  int unit = schedule.begin(blockIdx.x), base;
  const int end = schedule.begin(blockIdx.x + 1);
  for (int b = schedule.find(unit, block.lane, base); unit < end; ++b) {
    const Sequence s = sequence(p, b);
    const int next = base + s.units() * sets;
    while (unit < end && unit < next) {
      const int set = small_quotient(unit - base, s.units());
      const int set_begin = base + set * s.units(), set_end = set_begin + s.units();
      const int stop = min(end, set_end);
      const int h = p.by_head_sets.quotient(set), sub = set - h * p.head_sets, id = b * sets + set;
      const int from = set_begin == unit ? blockIdx.x : schedule.owner(set_begin);
      const int count = (set_end == stop ? blockIdx.x : schedule.owner(set_end - 1)) - from + 1;
      const int first = s.first_group + unit - set_begin;
      const int last = s.first_group + min(stop - set_begin, s.groups);

      const bool needs_tables = first < last && loaded != h && tables_differ;
      if (needs_tables) loaded = h;
      if (set_begin == unit && threadIdx.x == 0) p.spans[id] = make_int2(from, count);
      block.attend(s, b, h, sub, first, last, blockIdx.x - from, count, needs_tables,
                   p.partials + (int64_t(blockIdx.x) + id) * partial_floats(T::D, T::HG));
      unit = stop;
    }
    base = next;
  }
}

}  // namespace million
