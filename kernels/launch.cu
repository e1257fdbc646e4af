// Selection of the instantiation of the paged decode.
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

}  // namespace

cudaError_t launch_paged_decode(const PagedDecodeParams& params, DecodeShape shape, cudaStream_t stream) {
  if (shape.head_dim == 128) return decode_heads<128>(params, shape, stream);
  if (shape.head_dim == 64) return decode_heads<64>(params, shape, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
