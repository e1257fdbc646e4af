// Launcher of the append kernel.
#include "append.cuh"
#include "launch.h"

namespace million {

namespace {

template <int D, int MK, int MV>
cudaError_t append(const AppendParams& params, cudaStream_t stream) {
  using K = Append<D, MK>;
  using V = Append<D, MV>;
  const dim3 grid(params.batch * params.keys.pages.kv_heads, K::kBlocks + V::kBlocks);
  append_kernel<K, V><<<grid, K::kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <int D, int MK>
cudaError_t append_values(const AppendParams& params, int m_values, cudaStream_t stream) {
  if (m_values == D) return append<D, MK, D>(params, stream);
  if (m_values == D / 2) return append<D, MK, D / 2>(params, stream);
  if (m_values == D / 4) return append<D, MK, D / 4>(params, stream);
  if (m_values == D / 8) return append<D, MK, D / 8>(params, stream);
  return cudaErrorInvalidValue;
}

template <int D>
cudaError_t append_codes(const AppendParams& params, int m_keys, int m_values, cudaStream_t stream) {
  if (m_keys == D) return append_values<D, D>(params, m_values, stream);
  if (m_keys == D / 2) return append_values<D, D / 2>(params, m_values, stream);
  if (m_keys == D / 4) return append_values<D, D / 4>(params, m_values, stream);
  if (m_keys == D / 8) return append_values<D, D / 8>(params, m_values, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_append(const AppendParams& params, int head_dim, int m_keys, int m_values, cudaStream_t stream) {
  if (head_dim == 128) return append_codes<128>(params, m_keys, m_values, stream);
  if (head_dim == 64) return append_codes<64>(params, m_keys, m_values, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
