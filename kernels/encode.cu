// Launchers of the encoding kernels.
#include "encode.cuh"
#include "encode_grid.cuh"
#include "launch.h"

namespace million {

namespace {

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

template <class T>
cudaError_t through_grids(const EncodeParams& params, cudaStream_t stream) {
  constexpr size_t kShared = sizeof(typename T::Shared);
  if (const cudaError_t error = allow_shared(grid_encode_kernel<T>, kShared); error != cudaSuccess) return error;
  int device, multiprocessors;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const int heads = params.batch * params.pages.kv_heads;
  const int chunk = tokens_of_block<T>(heads, params.tokens, multiprocessors);
  grid_kernel<T::M><<<params.quantizer.centroid_heads * T::M, kGridThreads, 0, stream>>>(params.quantizer.centroids,
                                                                                          params.grids);
  const dim3 grid(T::kBlocks, (params.tokens + chunk - 1) / chunk, heads);
  grid_encode_kernel<T><<<grid, T::kThreads, kShared, stream>>>(params, chunk);
  return cudaGetLastError();
}

template <int D, int M, bool BF16>
cudaError_t encode(const EncodeParams& params, cudaStream_t stream) {
  if constexpr (D == 2 * M) {
    if (params.grids.lists != nullptr) return through_grids<GridEncode<D, M, BF16>>(params, stream);
  }
  return scan<Encode<D, M, BF16>>(params, stream);
}

template <bool BF16>
cudaError_t encode_shape(const EncodeParams& params, int head_dim, int m, cudaStream_t stream) {
  if (head_dim == 128 && m == 64) return encode<128, 64, BF16>(params, stream);
  if (head_dim == 128 && m == 32) return encode<128, 32, BF16>(params, stream);
  if (head_dim == 64 && m == 32) return encode<64, 32, BF16>(params, stream);
  if (head_dim == 64 && m == 16) return encode<64, 16, BF16>(params, stream);
  return cudaErrorInvalidValue;
}

template <int D, int MK, int MV>
cudaError_t append(const AppendParams& params, cudaStream_t stream) {
  using K = Append<D, MK>;
  using V = Append<D, MV>;
  const dim3 grid(params.batch * params.keys.pages.kv_heads, K::kBlocks + V::kBlocks);
  append_kernel<K, V><<<grid, K::kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <int D>
cudaError_t append_codes(const AppendParams& params, int m_keys, int m_values, cudaStream_t stream) {
  constexpr int kFine = D / 2, kCoarse = D / 4;
  if (m_keys == kFine && m_values == kFine) return append<D, kFine, kFine>(params, stream);
  if (m_keys == kFine && m_values == kCoarse) return append<D, kFine, kCoarse>(params, stream);
  if (m_keys == kCoarse && m_values == kFine) return append<D, kCoarse, kFine>(params, stream);
  if (m_keys == kCoarse && m_values == kCoarse) return append<D, kCoarse, kCoarse>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_encode(const EncodeParams& params, int head_dim, int m, cudaStream_t stream) {
  if (params.dtype == Dtype::kHalf) return encode_shape<false>(params, head_dim, m, stream);
  return encode_shape<true>(params, head_dim, m, stream);
}

cudaError_t launch_append(const AppendParams& params, int head_dim, int m_keys, int m_values, cudaStream_t stream) {
  if (head_dim == 128) return append_codes<128>(params, m_keys, m_values, stream);
  if (head_dim == 64) return append_codes<64>(params, m_keys, m_values, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
