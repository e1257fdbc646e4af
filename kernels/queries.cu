// Launch of the query mapping.
#include "queries.cuh"

#include "early.cuh"
#include "launch.h"

namespace million {

namespace {

template <int D>
cudaError_t map_queries(const QueryParams& p, cudaStream_t stream) {
  using T = QueryMap<D>;
  const int chunks = (p.group * p.origins + T::kRows - 1) / T::kRows;
  return launch_early(map_queries_kernel<D>, dim3(chunks, p.batch * p.kv_heads), T::kThreads, 0, p, stream);
}

}  // namespace

cudaError_t launch_map_queries(const QueryParams& params, int head_dim, cudaStream_t stream) {
  if (head_dim == 128) return map_queries<128>(params, stream);
  if (head_dim == 64) return map_queries<64>(params, stream);
  return cudaErrorInvalidValue;
}

}  // namespace million
