// Decode attention over contiguous codes by a lookup table of scores, in 99 KiB of shared memory (131 KiB for 128 key
// codes a token).
//
// For GPUs whose blocks cannot hold both centroid tables of the paged kernel, and to measure the layout of values alone.
// A block takes one query head and a span of tokens.  It tabulates q . centroid for every subspace and code (fp16), so
// keys are never decoded: a thread sums its token's M entries.  Values are looked up by a warp, a lane owning fixed
// dims.  How value codes are read is the policy `Values`: by rows, a byte a lane and token, or transposed inside a page,
// 16 tokens a load.  Sums and softmax state are fp32, exponents base 2.
#pragma once

#include "lookup_params.h"

namespace million {

// Codes of one value subspace for 16 consecutive tokens, as bytes of four words.
template <int M>
struct RowValues {
  static __device__ __forceinline__ uint4 load(const uint8_t* codes, int64_t token, int m, int /*page_size*/) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) words[i] |= uint32_t(__ldg(codes + (token + 4 * i + j) * M + m)) << (8 * j);
    }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
};

template <int M>
struct TransposedValues {
  static __device__ __forceinline__ uint4 load(const uint8_t* codes, int64_t token, int m, int page_size) {
    const int64_t page = token / page_size;
    return __ldg(reinterpret_cast<const uint4*>(codes + (page * M + m) * page_size + token % page_size));
  }
};

template <int D_, int MK_, int MV_>
struct LookupDecode {
  static constexpr int D = D_, MK = MK_, MV = MV_;
  static constexpr int kThreads = 512, kWarps = kThreads / 32;
  static constexpr int kTile = kThreads;              // tokens whose probabilities are in shared memory
  static constexpr int kScoreRow = kCentroids + 2;    // halves; the padding keeps the filling free of bank conflicts
  static constexpr int kWords = D / 2;                // half pairs of a centroid row
  static constexpr int kLaneWords = kWords / 32;
  static constexpr int kValueTableBytes = kCentroids * D * 2;
  static constexpr int kScoreTableBytes = MK * kScoreRow * 2;
  static constexpr int kRowsBytes = kWarps * D * 4;  // the warps' sums, in place of the score table
  static constexpr int kMiddleBytes = kScoreTableBytes > kRowsBytes ? kScoreTableBytes : kRowsBytes;
  static constexpr int kSharedBytes = kValueTableBytes + kMiddleBytes + (D + kTile / 2 + 2 * kWarps + 2) * 4;
  static_assert(kSharedBytes <= (MK == 128 ? 131 : 99) * 1024, "small GPUs");
  static constexpr int kCodes = D / MV == 1 ? 2 : 1;  // that select a word: one for each half, or one

  // The lane's k-th word of a centroid row, and the subspace whose code selects it or its lower half.
  static __device__ __forceinline__ int word(int lane, int k) {
    return D / MV <= 2 || kLaneWords == 1 ? lane + 32 * k : 2 * lane + k;
  }
  static __device__ __forceinline__ int subspace(int lane, int k) { return 2 * word(lane, k) / (D / MV); }
};

template <class T, template <int> class Values>
__global__ void __launch_bounds__(T::kThreads) lookup_decode_kernel(const __grid_constant__ LookupDecodeParams p) {
  constexpr int D = T::D, MK = T::MK, MV = T::MV, kWarps = T::kWarps;
  extern __shared__ __align__(128) uint8_t shared[];
  uint32_t* value_table = reinterpret_cast<uint32_t*>(shared);
  __half* score_table = reinterpret_cast<__half*>(shared + T::kValueTableBytes);
  float* rows = reinterpret_cast<float*>(shared + T::kValueTableBytes);
  float* q = reinterpret_cast<float*>(shared + T::kValueTableBytes + T::kMiddleBytes);
  __half* probabilities = reinterpret_cast<__half*>(q + D);
  float* warp_values = q + D + T::kTile / 2;
  float* warp_sums = warp_values + kWarps;
  int* flag = reinterpret_cast<int*>(warp_sums + kWarps);

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = blockIdx.x, b = row / (p.kv_heads * p.group), h = row % (p.kv_heads * p.group) / p.group;
  const int64_t head = int64_t(b) * p.kv_heads + h;
  const int length = p.lengths[b], first_valid = p.first_valid ? p.first_valid[b] : 0;
  const int old = length - (p.residual - p.page_size);
  const int coded = old > 0 ? old / p.page_size * p.page_size : 0;
  const int groups = coded / kGroupTokens;
  const int begin = int(int64_t(groups) * blockIdx.y / gridDim.y) * kGroupTokens;
  const int end = int(int64_t(groups) * (blockIdx.y + 1) / gridDim.y) * kGroupTokens;
  const float log_scale = p.scale * kLog2e;

  auto block_max = [&](float value) {
#pragma unroll
    for (int step = 16; step; step >>= 1) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    if (lane == 0) warp_values[warp] = value;
    __syncthreads();
    value = warp_values[lane % kWarps];
#pragma unroll
    for (int step = 16; step; step >>= 1) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
  };

  float sums[T::kLaneWords][2] = {};
  float top = -1e30f, denominator = 0.f;  // the denominator of this thread's tokens

  if (begin < end) {
    const __half* values = p.value_table + (p.value_table_heads > 1 ? h : 0) * int64_t(kCentroids) * D;
    for (int i = threadIdx.x; i < T::kValueTableBytes / 16; i += T::kThreads)
      cp_async<16>(value_table + 4 * i, reinterpret_cast<const uint4*>(values) + i);
    cp_async_commit();
    for (int d = threadIdx.x; d < D; d += T::kThreads) {
      float value = load_element(p.q, int64_t(row) * D + d, p.dtype);
      if (p.key_rotation != nullptr) {
        const float* rotation = p.key_rotation + (p.key_rotation_heads > 1 ? h : 0) * int64_t(D) * D;
        value = 0.f;
#pragma unroll 8
        for (int e = 0; e < D; ++e)
          value = fmaf(load_element(p.q, int64_t(row) * D + e, p.dtype), __ldg(rotation + e * D + d), value);
      }
      q[d] = value * log_scale;
    }
    __syncthreads();
    const __half* keys = p.key_table + (p.key_table_heads > 1 ? h : 0) * int64_t(kCentroids) * D;
    for (int i = threadIdx.x; i < kCentroids * MK; i += T::kThreads) {
      const int code = i / MK, m = i % MK;
      float sum = 0.f;
      if constexpr (MK == D) sum = q[m] * __half2float(keys[code * D + m]);
#pragma unroll
      for (int j = 0; j + 1 < D / MK; j += 2) {
        const float2 pair = unpack2(__ldg(reinterpret_cast<const uint32_t*>(keys + code * D + m * (D / MK) + j)), Dtype::kHalf);
        sum += q[m * (D / MK) + j] * pair.x + q[m * (D / MK) + j + 1] * pair.y;
      }
      score_table[m * T::kScoreRow + code] = __float2half_rn(sum);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  const uint8_t* key_codes = p.key_codes + head * p.capacity * MK;
  const uint8_t* value_codes = p.value_codes + head * p.capacity * MV;
  for (int tile = begin; tile < end; tile += T::kTile) {
    const int token = tile + threadIdx.x;
    float score = -INFINITY;
    if (token < end && token >= first_valid) {
      score = 0.f;
      constexpr int kPiece = MK < 16 ? MK : 16;  // bytes of a load
#pragma unroll
      for (int c = 0; c < MK / kPiece; ++c) {
        uint4 piece;
        if constexpr (kPiece == 16) {
          piece = __ldg(reinterpret_cast<const uint4*>(key_codes + int64_t(token) * MK) + c);
        } else {
          const uint2 half = __ldg(reinterpret_cast<const uint2*>(key_codes + int64_t(token) * MK));
          piece = make_uint4(half.x, half.y, 0, 0);
        }
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
        for (int j = 0; j < kPiece; ++j)
          score += __half2float(score_table[(16 * c + j) * T::kScoreRow + (words[j / 4] >> (8 * (j % 4)) & 255)]);
      }
    }
    const float next = fmaxf(top, block_max(score));
    const float factor = exp2_approx(top - next), probability = exp2_approx(score - next);
    top = next;
    denominator = denominator * factor + probability;
    probabilities[threadIdx.x] = __float2half_rn(probability);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < T::kLaneWords; ++k) sums[k][0] *= factor, sums[k][1] *= factor;
    for (int group = warp; group * kGroupTokens < min(T::kTile, end - tile); group += kWarps) {
      uint4 codes[T::kCodes][T::kLaneWords];
#pragma unroll
      for (int j = 0; j < T::kCodes; ++j)
#pragma unroll
        for (int k = 0; k < T::kLaneWords; ++k)
          codes[j][k] = k && T::subspace(0, k) == T::subspace(0, 0)
                            ? codes[j][0]
                            : Values<MV>::load(value_codes, tile + group * kGroupTokens, T::subspace(lane, k) + j,
                                               p.page_size);
#pragma unroll
      for (int i = 0; i < kGroupTokens; ++i) {
        const float weight = __half2float(probabilities[group * kGroupTokens + i]);
#pragma unroll
        for (int k = 0; k < T::kLaneWords; ++k) {
          float2 pair;
#pragma unroll
          for (int j = 0; j < T::kCodes; ++j) {
            const uint32_t words[4] = {codes[j][k].x, codes[j][k].y, codes[j][k].z, codes[j][k].w};
            const uint32_t code = words[i / 4] >> (8 * (i % 4)) & 255;
            const float2 both = unpack2(value_table[code * T::kWords + T::word(lane, k)], Dtype::kHalf);
            if (j == 0) pair.x = both.x;
            if (j == T::kCodes - 1) pair.y = both.y;
          }
          sums[k][0] += weight * pair.x, sums[k][1] += weight * pair.y;
        }
      }
    }
    __syncthreads();
  }

  // The warps' sums of codes, then of this block's share of the window, each under its own maximum.
  __syncthreads();
  float* partial = p.partials + (int64_t(row) * gridDim.y + blockIdx.y) * (2 * D + 4);
  auto finish = [&](float maximum, float* to, float* ml) {
#pragma unroll
    for (int step = 16; step; step >>= 1) denominator += __shfl_xor_sync(~0u, denominator, step);
    if (lane == 0) warp_sums[warp] = denominator;
#pragma unroll
    for (int k = 0; k < T::kLaneWords; ++k)
      reinterpret_cast<float2*>(rows)[warp * T::kWords + T::word(lane, k)] = make_float2(sums[k][0], sums[k][1]);
    __syncthreads();
    for (int d = threadIdx.x; d < D; d += T::kThreads) {
      float sum = 0.f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += rows[w * D + d];
      to[d] = sum;
    }
    if (threadIdx.x == 0) {
      float total = 0.f;
      for (int w = 0; w < kWarps; ++w) total += warp_sums[w];
      ml[0] = maximum, ml[1] = total;
    }
    __syncthreads();
  };
  finish(top, partial, partial + 2 * D);

  // Window: a warp a token, a lane the dims of its words.
  float window_top = -1e30f, window_sum = 0.f;
#pragma unroll
  for (int k = 0; k < T::kLaneWords; ++k) sums[k][0] = sums[k][1] = 0.f;
  for (int position = max(coded, first_valid) + blockIdx.y * kWarps + warp; position < length;
       position += gridDim.y * kWarps) {
    const int64_t at = (head * p.residual + position % p.residual) * D;
    float score = 0.f;
    float2 v[T::kLaneWords];
#pragma unroll
    for (int k = 0; k < T::kLaneWords; ++k) {
      const int w = T::word(lane, k);
      const float2 key = unpack2(__ldg(static_cast<const uint32_t*>(p.key_window) + at / 2 + w), p.dtype);
      const float2 query = unpack2(__ldg(static_cast<const uint32_t*>(p.q) + int64_t(row) * D / 2 + w), p.dtype);
      v[k] = unpack2(__ldg(static_cast<const uint32_t*>(p.value_window) + at / 2 + w), p.dtype);
      score += key.x * query.x + key.y * query.y;
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) score += __shfl_xor_sync(~0u, score, step);
    score *= log_scale;
    const float next = fmaxf(window_top, score);
    const float factor = exp2_approx(window_top - next), weight = exp2_approx(score - next);
    window_top = next;
    window_sum = window_sum * factor + weight;
#pragma unroll
    for (int k = 0; k < T::kLaneWords; ++k) {
      sums[k][0] = sums[k][0] * factor + weight * v[k].x;
      sums[k][1] = sums[k][1] * factor + weight * v[k].y;
    }
  }
  const float common = block_max(window_top);
  const float factor = exp2_approx(window_top - common);
#pragma unroll
  for (int k = 0; k < T::kLaneWords; ++k) sums[k][0] *= factor, sums[k][1] *= factor;
  denominator = lane == 0 ? window_sum * factor : 0.f;
  finish(common, partial + D, partial + 2 * D + 2);

  // The last block of the query head adds the parts up.
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    const int arrived = atomicAdd(p.counters + row, 1);
    *flag = arrived == int(gridDim.y) - 1;
    if (*flag) p.counters[row] = 0;
  }
  __syncthreads();
  if (!*flag) return;
  __threadfence();
  const float* parts = p.partials + int64_t(row) * gridDim.y * (2 * D + 4);
  float* rotated = rows;  // [D] of codes, [D] of the window
  for (int d = threadIdx.x; d < D; d += T::kThreads) {
    float maximum = -INFINITY, total = 0.f, of_codes = 0.f, of_window = 0.f;
    for (unsigned i = 0; i < gridDim.y; ++i) {
      const float* part = parts + i * int64_t(2 * D + 4);
      maximum = fmaxf(maximum, fmaxf(__ldcg(part + 2 * D), __ldcg(part + 2 * D + 2)));
    }
    for (unsigned i = 0; i < gridDim.y; ++i) {
      const float* part = parts + i * int64_t(2 * D + 4);
      const float codes_weight = exp2_approx(__ldcg(part + 2 * D) - maximum);
      const float window_weight = exp2_approx(__ldcg(part + 2 * D + 2) - maximum);
      total += codes_weight * __ldcg(part + 2 * D + 1) + window_weight * __ldcg(part + 2 * D + 3);
      of_codes += codes_weight * __ldcg(part + d), of_window += window_weight * __ldcg(part + D + d);
    }
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    rotated[d] = of_codes * inverse, rotated[D + d] = of_window * inverse;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < D; d += T::kThreads) {
    float value = rotated[d];
    if (p.value_rotation != nullptr) {
      const float* rotation = p.value_rotation + (p.value_rotation_heads > 1 ? h : 0) * int64_t(D) * D;
      value = 0.f;
      for (int e = 0; e < D; ++e) value = fmaf(rotated[e], __ldg(rotation + d * D + e), value);
    }
    store_element(p.out, int64_t(row) * D + d, value + rotated[D + d], p.dtype);
  }
}

}  // namespace million
