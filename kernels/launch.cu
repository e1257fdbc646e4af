// Selection of the instantiation by the shape of a call.
#include "launch.h"

namespace million {

namespace {

template <int D, int MK, int HG>
cudaError_t decode_values(const PagedDecodeParams& params, DecodeShape s, cudaStream_t stream) {
  if (s.m_values == D) return paged_decode<D, MK, D, HG>(params, stream);
  if (s.m_values == D / 2) return paged_decode<D, MK, D / 2, HG>(params, stream);
  if (s.m_values == D / 4) return paged_decode<D, MK, D / 4, HG>(params, stream);
  if (s.m_values == D / 8) return paged_decode<D, MK, D / 8, HG>(params, stream);
  return cudaErrorInvalidValue;
}

template <int D, int HG>
cudaError_t decode_codes(const PagedDecodeParams& params, DecodeShape s, cudaStream_t stream) {
  if (s.m_keys == D) return decode_values<D, D, HG>(params, s, stream);
  if (s.m_keys == D / 2) return decode_values<D, D / 2, HG>(params, s, stream);
  if (s.m_keys == D / 4) return decode_values<D, D / 4, HG>(params, s, stream);
  if (s.m_keys == D / 8) return decode_values<D, D / 8, HG>(params, s, stream);
  return cudaErrorInvalidValue;
}

template <int D>
cudaError_t decode_heads(const PagedDecodeParams& params, DecodeShape s, cudaStream_t stream) {
  if (s.heads == 1) return decode_codes<D, 1>(params, s, stream);
  if (s.heads == 4) return decode_codes<D, 4>(params, s, stream);
  if (s.heads == 8) return decode_codes<D, 8>(params, s, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_paged_decode(const PagedDecodeParams& params, DecodeShape shape, cudaStream_t stream) {
  if (shape.head_dim == 128) return decode_heads<128>(params, shape, stream);
  if (shape.head_dim == 64) return decode_heads<64>(params, shape, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_lookup_decode(const LookupDecodeParams& params, int head_dim, int m_keys, int m_values, int splits,
                                 cudaStream_t stream) {
  if (head_dim == 128) return lookup_decode<128>(params, m_keys, m_values, splits, stream);
  if (head_dim == 64) return lookup_decode<64>(params, m_keys, m_values, splits, stream);
  return cudaErrorInvalidValue;
}

cudaError_t launch_encode(const EncodeParams& params, int head_dim, int m, cudaStream_t stream) {
  const bool wide = params.dtype == Dtype::kBFloat16;
  if (head_dim == 128) return (wide ? encode_codes<128, true> : encode_codes<128, false>)(params, m, stream);
  if (head_dim == 64) return (wide ? encode_codes<64, true> : encode_codes<64, false>)(params, m, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
