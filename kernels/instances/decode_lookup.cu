#include "../decode_lookup.cuh"
#include "../launch.h"

namespace million {

namespace {

template <class T>
cudaError_t launch(const LookupDecodeParams& p, int splits, cudaStream_t stream) {
  const auto kernel = p.value_layout == Layout::kTransposed ? lookup_decode_kernel<T, TransposedValues>
                                                            : lookup_decode_kernel<T, RowValues>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<dim3(p.batch * p.kv_heads * p.group, splits), T::kThreads, T::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <int D>
cudaError_t select(const LookupDecodeParams& p, int m_keys, int m_values, int splits, cudaStream_t stream) {
  constexpr int kFine = D / 2, kCoarse = D / 4;
  if (m_keys == kFine && m_values == kFine) return launch<LookupDecode<D, kFine, kFine>>(p, splits, stream);
  if (m_keys == kFine && m_values == kCoarse) return launch<LookupDecode<D, kFine, kCoarse>>(p, splits, stream);
  if (m_keys == kCoarse && m_values == kFine) return launch<LookupDecode<D, kCoarse, kFine>>(p, splits, stream);
  if (m_keys == kCoarse && m_values == kCoarse) return launch<LookupDecode<D, kCoarse, kCoarse>>(p, splits, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_lookup_decode(const LookupDecodeParams& params, int head_dim, int m_keys, int m_values, int splits,
                                 cudaStream_t stream) {
  if (head_dim == 128) return select<128>(params, m_keys, m_values, splits, stream);
  if (head_dim == 64) return select<64>(params, m_keys, m_values, splits, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
