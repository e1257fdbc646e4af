// Launchers: free of torch.  Each returns the first CUDA error, or cudaErrorInvalidValue for what is not compiled.
#pragma once

#include <cuda_runtime.h>

#include "decode_params.h"
#include "encode_params.h"
#include "lookup_params.h"

namespace million {

// Shape of a decode: what selects the instantiation.
struct DecodeShape {
  int head_dim, m_keys, m_values, heads;  // heads: query heads of a block, 1, 4 or 8
};

cudaError_t launch_paged_decode(const PagedDecodeParams& params, DecodeShape shape, cudaStream_t stream);
cudaError_t launch_lookup_decode(const LookupDecodeParams& params, int head_dim, int m_keys, int m_values, int splits,
                                 cudaStream_t stream);
cudaError_t launch_encode(const EncodeParams& params, int head_dim, int m, cudaStream_t stream);
cudaError_t launch_append(const AppendParams& params, int head_dim, int m_keys, int m_values, cudaStream_t stream);

// One instantiation of the decode kernel, defined in instances/.
template <int D, int MK, int MV, int HG>
cudaError_t paged_decode(const PagedDecodeParams& params, cudaStream_t stream);

// The lookup-table decode of one head_dim, defined in instances/.
template <int D>
cudaError_t lookup_decode(const LookupDecodeParams& params, int m_keys, int m_values, int splits, cudaStream_t stream);

// Encoding of one head_dim and dtype, defined in instances/.
template <int D, bool BF16>
cudaError_t encode_codes(const EncodeParams& params, int m, cudaStream_t stream);

}  // namespace million
