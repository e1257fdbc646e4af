// Launch of the lookup-table decode of one head_dim; instances/*.cu include this.
#pragma once

#include "decode_lookup.cuh"
#include "launch.h"

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

template <int D, int MK, int MV>
cudaError_t lookup_values(const LookupDecodeParams& p, int splits, cudaStream_t stream) {
  using T = LookupDecode<D, MK, MV>;
  if constexpr (T::kSharedBytes > MILLION_SHARED_KIB * 1024) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = p.value_layout == Layout::kTransposed ? lookup_decode_kernel<T, TransposedValues>
                                                              : lookup_decode_kernel<T, RowValues>;
    constexpr auto kShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
    const cudaError_t error = cudaFuncSetAttribute(kernel, kShared, T::kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<dim3(p.batch * p.kv_heads * p.group, splits), T::kThreads, T::kSharedBytes, stream>>>(p);
    return cudaGetLastError();
  }
}

template <int D, int MK>
cudaError_t lookup_keys(const LookupDecodeParams& p, int m_values, int splits, cudaStream_t stream) {
  if (m_values == D) return lookup_values<D, MK, D>(p, splits, stream);
  if (m_values == D / 2) return lookup_values<D, MK, D / 2>(p, splits, stream);
  if (m_values == D / 4) return lookup_values<D, MK, D / 4>(p, splits, stream);
  if (m_values == D / 8) return lookup_values<D, MK, D / 8>(p, splits, stream);
  return cudaErrorInvalidValue;
}

template <int D>
cudaError_t lookup_decode(const LookupDecodeParams& p, int m_keys, int m_values, int splits, cudaStream_t stream) {
  if (m_keys == D) return lookup_keys<D, D>(p, m_values, splits, stream);
  if (m_keys == D / 2) return lookup_keys<D, D / 2>(p, m_values, splits, stream);
  if (m_keys == D / 4) return lookup_keys<D, D / 4>(p, m_values, splits, stream);
  if (m_keys == D / 8) return lookup_keys<D, D / 8>(p, m_values, splits, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
