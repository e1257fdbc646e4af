// Selection of the instantiation, and the encoding kernels.
#include "encode.cuh"
#include "launch.h"

namespace million {

namespace {

template <int D, int HG>
cudaError_t decode_codes(const PagedDecodeParams& params, DecodeShape s, cudaStream_t stream) {
  constexpr int kFine = D / 2, kCoarse = D / 4;
  if (s.m_keys == kFine && s.m_values == kFine) return paged_decode<D, kFine, kFine, HG>(params, stream);
  if (s.m_keys == kFine && s.m_values == kCoarse) return paged_decode<D, kFine, kCoarse, HG>(params, stream);
  if (s.m_keys == kCoarse && s.m_values == kFine) return paged_decode<D, kCoarse, kFine, HG>(params, stream);
  if (s.m_keys == kCoarse && s.m_values == kCoarse)
    return paged_decode<D, kCoarse, kCoarse, HG>(params, stream);
  return cudaErrorInvalidValue;
}

template <int D>
cudaError_t decode_heads(const PagedDecodeParams& params, DecodeShape s, cudaStream_t stream) {
  if (s.heads == 1) return decode_codes<D, 1>(params, s, stream);
  if (s.heads == 4) return decode_codes<D, 4>(params, s, stream);
  if constexpr (D == 128)
    if (s.heads == 8) return decode_codes<D, 8>(params, s, stream);
  return cudaErrorInvalidValue;
}

template <int D, int M>
cudaError_t encode(const EncodeParams& params, cudaStream_t stream) {
  using T = Encode<D, M>;
  constexpr int kShared = T::kSharedBytes + 16;
  const cudaError_t error =
      cudaFuncSetAttribute(encode_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const dim3 grid((params.tokens + T::kTokens - 1) / T::kTokens, params.batch * params.pages.kv_heads);
  encode_kernel<T><<<grid, T::kThreads, kShared, stream>>>(params);
  return cudaGetLastError();
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

cudaError_t launch_paged_decode(const PagedDecodeParams& params, DecodeShape shape, cudaStream_t stream) {
  if (shape.head_dim == 128) return decode_heads<128>(params, shape, stream);
  if (shape.head_dim == 64) return decode_heads<64>(params, shape, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_encode(const EncodeParams& params, int head_dim, int m, cudaStream_t stream) {
  if (head_dim == 128 && m == 64) return encode<128, 64>(params, stream);
  if (head_dim == 128 && m == 32) return encode<128, 32>(params, stream);
  if (head_dim == 64 && m == 32) return encode<64, 32>(params, stream);
  if (head_dim == 64 && m == 16) return encode<64, 16>(params, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_append(const AppendParams& params, int head_dim, int m_keys, int m_values, cudaStream_t stream) {
  if (head_dim == 128) return append_codes<128>(params, m_keys, m_values, stream);
  if (head_dim == 64) return append_codes<64>(params, m_keys, m_values, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
