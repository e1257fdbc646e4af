// Encoding in one kernel: optional rotation, nearest centroid by a scan (two dims a subspace) or a filter (four, see
// encode_filter.cuh), write in the layout of the pages.  encode_grid.cuh serves long inputs in subspaces of two dims.
//
// The nearest centroid is the lowest index at the least sum of squared differences in fp32, subtracted and squared
// directly as the torch codec does: |c|^2 / 2 - x.c would cancel for vectors far from the origin.
#pragma once

#include "encode_filter.cuh"
#include "encode_params.h"
#include "encode_rotate.cuh"
#include "layout.cuh"

namespace million {

// Codes of N points (one subspace) among 256 centroids [256, DSUB]; every lane of a warp reads the same centroids.
template <int DSUB, int N>
__device__ __forceinline__ void nearest(const float (&x)[N][DSUB], const float* __restrict__ centroids, int (&code)[N]) {
  float best[N];
#pragma unroll
  for (int n = 0; n < N; ++n) best[n] = INFINITY, code[n] = 0;
  constexpr int kPerLoad = 4 / DSUB;
#pragma unroll 4
  for (int c = 0; c < kCentroids; c += kPerLoad) {
    const float4 load = __ldg(reinterpret_cast<const float4*>(centroids + c * DSUB));
    const float values[4] = {load.x, load.y, load.z, load.w};
#pragma unroll
    for (int k = 0; k < kPerLoad; ++k)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        float distance = 0.f;
#pragma unroll
        for (int j = 0; j < DSUB; ++j) {
          const float difference = x[n][j] - values[k * DSUB + j];
          distance = j ? fmaf(difference, difference, distance) : difference * difference;
        }
        if (distance < best[n]) best[n] = distance, code[n] = c + k;
      }
  }
}

// First byte of chunk `chunk` (16 bytes, of M) of the group that starts at `position`.
__device__ __forceinline__ uint8_t* group_chunk(const CodePages& pages, int b, int h, int position, int M, int chunk) {
  const int slot = position / pages.page_size, in_page = position % pages.page_size;
  const int64_t page_bytes = int64_t(pages.page_size) * M;
  int64_t page;
  if (pages.block_table != nullptr) {
    page = int64_t(__ldg(pages.block_table + int64_t(b) * pages.table_width + slot)) * pages.kv_heads + h;
  } else {
    page = (int64_t(b) * pages.kv_heads + h) * pages.table_width + slot;
  }
  const int64_t inside = pages.layout == Layout::kTransposed ? int64_t(chunk) * pages.page_size + in_page
                                                             : int64_t(in_page) * M + chunk * 16;
  return pages.codes + page * page_bytes + inside;
}

// Elements of x from token `first` of head h on, and whether rows can be loaded 16 bytes at a time.
struct EncodeRows {
  const uint16_t* x;
  bool aligned;
  __device__ EncodeRows(const EncodeParams& p, int b, int h, int first)
      : x(static_cast<const uint16_t*>(p.x) + b * p.stride_batch + h * p.stride_head + first * p.stride_token),
        aligned(reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                (p.stride_batch | p.stride_head | p.stride_token) % 8 == 0) {}
};

__device__ __forceinline__ const float* rotation_of_head(const Quantizer& q, int h, int D) {
  return q.rotation + (q.rotation_heads > 1 ? h : 0) * int64_t(D) * D;
}

template <int D_, int M_, bool BF16_>
struct Encode {
  static constexpr int D = D_, M = M_, kDsub = D / M, kTokens = 128, kThreads = 256;
  static constexpr bool kBF16 = BF16_;
  static constexpr int kColumnTiles = 2;  // of the rotation, at a time
  struct Shared {
    SplitColumns<D, BF16_, kColumnTiles> columns;
    uint4 image[kTokens * M / 16];
    float tile[kTokens * (D + 1)];
  };
};

// Grid (tiles of 128 tokens, B * Hkv).
template <class T>
__global__ void __launch_bounds__(T::kThreads) encode_kernel(const __grid_constant__ EncodeParams p) {
  constexpr int D = T::D, M = T::M, kDsub = T::kDsub, kTokens = T::kTokens;
  static_assert(kTokens == T::kThreads / 32 * 16, "a warp rotates 16 tokens");
  extern __shared__ __align__(16) uint8_t memory[];
  typename T::Shared& shared = *reinterpret_cast<typename T::Shared*>(memory);
  float* tile = shared.tile;
  uint8_t* image = reinterpret_cast<uint8_t*>(shared.image);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int b = blockIdx.y / p.pages.kv_heads, h = blockIdx.y % p.pages.kv_heads;
  const int first = blockIdx.x * kTokens, count = min(kTokens, p.tokens - first);
  const EncodeRows rows(p, b, h, first);
  if (p.quantizer.rotation == nullptr) {
    for (int i = threadIdx.x; i < kTokens * D / 2; i += T::kThreads) {
      const int token = i / (D / 2), pair = i % (D / 2);
      float2 value = make_float2(0.f, 0.f);
      if (token < count)
        value = unpack2(*reinterpret_cast<const uint32_t*>(rows.x + token * p.stride_token + 2 * pair), p.dtype);
      tile[token * (D + 1) + 2 * pair] = value.x;
      tile[token * (D + 1) + 2 * pair + 1] = value.y;
    }
  } else {
    Rows<D> x[1];
    x[0].load(rows.x + int64_t(warp) * 16 * p.stride_token, p.stride_token, count - warp * 16, rows.aligned);
    const float* rotation = rotation_of_head(p.quantizer, h, D);
    for (int column = 0; column < D; column += 8 * T::kColumnTiles) {
      __syncthreads();
      shared.columns.load(rotation, [=](int i) { return column + 8 * i; });
      __syncthreads();
#pragma unroll
      for (int i = 0; i < T::kColumnTiles; ++i) {
        float rotated[1][4];
        shared.columns.multiply(x, i, rotated);
        float* out = tile + (warp * 16 + lane / 4) * (D + 1) + column + 8 * i + lane % 4 * 2;
        out[0] = rotated[0][0], out[1] = rotated[0][1];
        out[8 * (D + 1)] = rotated[0][2], out[8 * (D + 1) + 1] = rotated[0][3];
      }
    }
  }
  __syncthreads();
  const float* centroids = p.quantizer.centroids + (p.quantizer.centroid_heads > 1 ? h : 0) * int64_t(kCentroids) * D;
  const auto store = [&](int token, int s, int code) {
    image[token / 16 * 16 * M + group_position<D, M>(p.pages.layout, token % 16, s)] = uint8_t(code);
  };
  for (int s = warp; s < M; s += T::kThreads / 32) {
    if constexpr (kDsub == 4) {
      static_assert(kTokens == Filter::kPoints, "a warp takes one subspace of all tokens");
      const auto point = [&](int token) {
        const float* x = tile + token * (D + 1) + s * 4;
        return make_float4(x[0], x[1], x[2], x[3]);
      };
      Filter(centroids + s * kCentroids * 4).run(point, [&](int token, int code) { store(token, s, code); });
    } else {
      float x[4][kDsub];
      int code[4];
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int j = 0; j < kDsub; ++j) x[n][j] = tile[(lane + 32 * n) * (D + 1) + s * kDsub + j];
      nearest<kDsub, 4>(x, centroids + s * kCentroids * kDsub, code);
#pragma unroll
      for (int n = 0; n < 4; ++n) store(lane + 32 * n, s, code[n]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count / 16 * M; i += T::kThreads) {
    const int group = i / M, piece = i % M;
    *reinterpret_cast<uint4*>(group_chunk(p.pages, b, h, p.start + first + group * 16, M, piece)) =
        shared.image[i];
  }
}

template <int D_, int M_>
struct Append {
  static constexpr int D = D_, M = M_, kDsub = D / M, kThreads = 128;
  static constexpr int kSubspaces = 8;  // a block's share of a flush
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
