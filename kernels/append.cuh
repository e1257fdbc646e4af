// Append: the new token of each sequence into the window; where that makes a page of old tokens, their codes by a scan.
#pragma once

#include "encode.cuh"

namespace million {

template <int D_, int M_>
struct Append {
  static constexpr int D = D_, M = M_, kDsub = D / M, kThreads = 128;
  static constexpr int kSubspaces = kDsub == 1 ? 16 : kDsub == 8 ? 4 : 8;  // a block's share of a flush
  static constexpr int kBlocks = M / kSubspaces;
  static constexpr int kTokens = 64;  // encoded at a time
  static constexpr int kShared = kTokens * (D + 1) + kTokens * (kSubspaces * kDsub + 1);  // floats
};

// One (sequence, KV head) of one side: store the new token; encode the window's oldest page if it is due.
template <class T>
__device__ void append_side(const AppendParams& p, const AppendSide& side, int part, float* shared) {
  constexpr int D = T::D, M = T::M, kDsub = T::kDsub, kDims = T::kSubspaces * kDsub;
  const int b = blockIdx.x / side.pages.kv_heads, h = blockIdx.x % side.pages.kv_heads;
  const int length = p.lengths[b], P = side.pages.page_size;
  if (length <= 0) return;
  uint16_t* window = static_cast<uint16_t*>(side.window) + int64_t(blockIdx.x) * p.residual * D;
  if (part == 0)
    for (int d = threadIdx.x; d < D; d += T::kThreads)
      window[(length - 1) % p.residual * D + d] =
          static_cast<const uint16_t*>(side.x)[b * side.stride_batch + h * side.stride_head + d];

  const int old = length - (p.residual - P);  // coded tokens once `length` is a multiple of P past R - P
  if (old <= 0 || old % P) return;
  const int begin = old - P;
  float* rows = shared;                         // [64][D + 1] the page's vectors
  float* points = shared + T::kTokens * (D + 1);  // [64][kDims + 1] this block's dims of them, rotated
  for (int first = 0; first < P; first += T::kTokens) {
    const int count = min(T::kTokens, P - first);
    __syncthreads();
    for (int i = threadIdx.x; i < count * D / 2; i += T::kThreads) {
      const int token = i / (D / 2), pair = i % (D / 2);
      const int64_t element = int64_t((begin + first + token) % p.residual) * D + 2 * pair;
      const float2 value = unpack2(*reinterpret_cast<const uint32_t*>(window + element), p.dtype);
      rows[token * (D + 1) + 2 * pair] = value.x;
      rows[token * (D + 1) + 2 * pair + 1] = value.y;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * kDims; i += T::kThreads) {
      const int token = i / kDims, d = part * kDims + i % kDims;
      float value = rows[token * (D + 1) + d];
      if (side.quantizer.rotation != nullptr) {
        const float* rotation = rotation_of_head(side.quantizer, h, D);
        value = 0.f;
#pragma unroll 16
        for (int e = 0; e < D; ++e) value = fmaf(rows[token * (D + 1) + e], __ldg(rotation + e * D + d), value);
      }
      points[token * (kDims + 1) + i % kDims] = value;
    }
    __syncthreads();
    const float* centroids =
        side.quantizer.centroids + (side.quantizer.centroid_heads > 1 ? h : 0) * int64_t(kCentroids) * D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = warp; k < T::kSubspaces; k += T::kThreads / 32) {
      const int s = part * T::kSubspaces + k;
      float x[2][kDsub];
      int code[2];
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int j = 0; j < kDsub; ++j) x[n][j] = points[(lane + 32 * n) * (kDims + 1) + k * kDsub + j];
      nearest<kDsub, 2>(x, centroids + s * kCentroids * kDsub, code);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int token = lane + 32 * n;
        if (token >= count) continue;
        const int at = group_position<D, M>(side.pages.layout, token % 16, s);
        group_chunk(side.pages, b, h, begin + first + token / 16 * 16, M, at / 16)[at % 16] = uint8_t(code[n]);
      }
    }
  }
}

// Grid (B * Hkv, append blocks of keys + of values).
template <class K, class V>
__global__ void __launch_bounds__(K::kThreads) append_kernel(const __grid_constant__ AppendParams p) {
  static_assert(K::kThreads == V::kThreads, "one block size");
  __shared__ float shared[K::kShared > V::kShared ? K::kShared : V::kShared];
  if (int(blockIdx.y) < K::kBlocks) {
    append_side<K>(p, p.keys, blockIdx.y, shared);
  } else {
    append_side<V>(p, p.values, blockIdx.y - K::kBlocks, shared);
  }
}

}  // namespace million
