// Encoding in one kernel: optional rotation, nearest centroid by a scan (one or two dims a subspace) or a filter (four
// or eight, see encode_filter.cuh), write in the layout of the pages.  Long inputs are served by encode_sorted.cuh in
// subspaces of one dim, by encode_grid.cuh in those of two.
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
  constexpr int kLoads = DSUB == 8 ? 2 : 1, kPerStep = 4 * kLoads / DSUB;
#pragma unroll 4
  for (int c = 0; c < kCentroids; c += kPerStep) {
    float values[4 * kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const float4 load = __ldg(reinterpret_cast<const float4*>(centroids + c * DSUB) + i);
      values[4 * i] = load.x, values[4 * i + 1] = load.y, values[4 * i + 2] = load.z, values[4 * i + 3] = load.w;
    }
#pragma unroll
    for (int k = 0; k < kPerStep; ++k)
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
  static constexpr int kResident = kDsub == 8 ? 2 : 0;  // blocks a multiprocessor that registers must allow
  struct Shared {
    SplitColumns<D, BF16_, kColumnTiles> columns;
    uint4 image[kTokens * M / 16];
    float tile[kTokens * (D + 1)];
  };
};

// Points of one subspace in rows of shared memory.
template <int DSUB, int PITCH>
struct TilePoints {
  const float* first;
  __device__ __forceinline__ Point<DSUB> operator()(int row) const {
    Point<DSUB> point;
#pragma unroll
    for (int j = 0; j < DSUB; ++j) point.x[j] = first[row * PITCH + j];
    return point;
  }
  __device__ __forceinline__ float2 part(int row, int j) const {
    return make_float2(first[row * PITCH + j], first[row * PITCH + j + 1]);
  }
};

// Grid (tiles of 128 tokens, B * Hkv).
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kResident) encode_kernel(const __grid_constant__ EncodeParams p) {
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
#pragma unroll 1
  for (int s = warp; s < M; s += T::kThreads / 32) {
    if constexpr (kDsub >= 4) {
      static_assert(kTokens == Filter<kDsub>::kPoints, "a warp takes one subspace of all tokens");
      const TilePoints<kDsub, D + 1> point = {tile + s * kDsub};
      Filter<kDsub>(centroids + s * kCentroids * kDsub).run(point, [&](int token, int code) { store(token, s, code); });
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

}  // namespace million
