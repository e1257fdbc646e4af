// Launch of the encoding kernels for one head_dim and dtype; instances/*.cu include this.
#pragma once

#include "encode.cuh"
#include "encode_grid.cuh"
#include "encode_sorted.cuh"
#include "launch.h"

namespace million {

template <class Kernel>
cudaError_t allow_shared(Kernel kernel, size_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
}

template <class T>
cudaError_t scan(const EncodeParams& params, cudaStream_t stream) {
  constexpr size_t kShared = sizeof(typename T::Shared);
  if (const cudaError_t error = allow_shared(encode_kernel<T>, kShared); error != cudaSuccess) return error;
  const dim3 grid((params.tokens + T::kTokens - 1) / T::kTokens, params.batch * params.pages.kv_heads);
  encode_kernel<T><<<grid, T::kThreads, kShared, stream>>>(params);
  return cudaGetLastError();
}

// Tokens of a block: as many as leave four blocks a multiprocessor, for a block first loads all its tables.
template <class T>
int tokens_of_block(int heads, int tokens, int multiprocessors) {
  int chunk = T::kBlockTokens;
  const auto blocks = [&](int size) { return int64_t(T::kBlocks) * heads * ((tokens + size - 1) / size); };
  while (chunk < T::kMostTokens && blocks(2 * chunk) >= 4 * multiprocessors) chunk *= 2;
  return chunk;
}

// Launches the kernel of T, whose tables `prepare` makes, for chunks of tokens.
template <class T, class Prepare>
cudaError_t in_chunks(void (*kernel)(EncodeParams, int), const EncodeParams& params, cudaStream_t stream,
                      Prepare prepare) {
  constexpr size_t kShared = sizeof(typename T::Shared);
  if (const cudaError_t error = allow_shared(kernel, kShared); error != cudaSuccess) return error;
  int device, multiprocessors;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int heads = params.batch * params.pages.kv_heads;
  const int chunk = tokens_of_block<T>(heads, params.tokens, multiprocessors);
  prepare(params.quantizer.centroid_heads * T::M);
  const dim3 grid(T::kBlocks, (params.tokens + chunk - 1) / chunk, heads);
  kernel<<<grid, T::kThreads, kShared, stream>>>(params, chunk);
  return cudaGetLastError();
}

template <int D, int M, bool BF16>
cudaError_t encode(const EncodeParams& params, cudaStream_t stream) {
  const float* centroids = params.quantizer.centroids;
  if constexpr (D == 2 * M) {
    using T = GridEncode<D, M, BF16>;
    if (params.grids.lists != nullptr)
      return in_chunks<T>(grid_encode_kernel<T>, params, stream, [&](int subspaces) {
        grid_kernel<M><<<subspaces, kGridThreads, 0, stream>>>(centroids, params.grids);
      });
  }
  if constexpr (D == M) {
    using T = SortedEncode<D, BF16>;
    if (params.sorted.values != nullptr)
      return in_chunks<T>(sorted_encode_kernel<T>, params, stream, [&](int subspaces) {
        sort_kernel<<<subspaces, kCentroids, 0, stream>>>(centroids, params.sorted);
      });
  }
  return scan<Encode<D, M, BF16>>(params, stream);
}

template <int D, bool BF16>
cudaError_t encode_codes(const EncodeParams& params, int m, cudaStream_t stream) {
  if (m == D) return encode<D, D, BF16>(params, stream);
  if (m == D / 2) return encode<D, D / 2, BF16>(params, stream);
  if (m == D / 4) return encode<D, D / 4, BF16>(params, stream);
  if (m == D / 8) return encode<D, D / 8, BF16>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
