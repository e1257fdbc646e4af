// The forms of the queries that score codes, once a head for all blocks of the decode kernels.
//
// A block takes up to kRows rows (head of the group, origin) of one KV head of one sequence; a thread owns a dim, and
// holds that column of the map in registers.
#pragma once

#include "query_params.h"

namespace million {

template <int D>
struct QueryMap {
  static constexpr int kThreads = D, kRows = 16;
};

template <int D>
__global__ void __launch_bounds__(D) map_queries_kernel(const __grid_constant__ QueryParams p) {
  constexpr int kRows = QueryMap<D>::kRows;
  __shared__ __align__(16) float turned[kRows][D];
  wait_for_previous_launch();
  const int b = blockIdx.y / p.kv_heads, h = blockIdx.y % p.kv_heads, d = threadIdx.x;
  const int rows = p.group * p.origins, first = blockIdx.x * kRows, count = min(kRows, rows - first);
  const int64_t head = int64_t(b) * p.kv_heads * p.group + h * p.group;
  // An origin past the text serves no code; the first is always there.
  const int used = max(1, (p.lengths[b] + p.every - 1) / p.every);

  // The other dim of the pair, and the sign of its sine when a vector is turned back.
  int other = d, pair = 0;
  float sign = 0.f;
  if (p.angles != nullptr && d < 2 * p.pairs) {
    pair = p.neighbours ? d / 2 : d % p.pairs;
    const bool second = p.neighbours ? d & 1 : d >= p.pairs;
    other = p.neighbours ? d ^ 1 : second ? d - p.pairs : d + p.pairs;
    sign = second ? -1.f : 1.f;
  }
  bool any = false;
  for (int r = 0; r < count; ++r) {
    const int hg = (first + r) / p.origins, origin = (first + r) % p.origins;
    if (origin >= used) continue;
    any = true;
    float x = load_element(p.q, (head + hg) * D + d, p.dtype);
    if (sign != 0.f) {
      const float2 angle = __ldg(p.angles + origin * p.pairs + pair);
      x = x * angle.x + sign * load_element(p.q, (head + hg) * D + other, p.dtype) * angle.y;
    }
    turned[r][d] = x;
  }
  if (!any) return;  // the same for all threads
  float column[D];
  if (p.map != nullptr) {
    const float* map = p.map + (p.map_heads > 1 ? h : 0) * int64_t(D) * D;
#pragma unroll
    for (int e = 0; e < D; ++e) column[e] = __ldg(map + e * D + d);
  }
  __syncthreads();
#pragma unroll 1
  for (int r = 0; r < count; ++r) {
    if ((first + r) % p.origins >= used) continue;
    float x = turned[r][d];
    if (p.map != nullptr) {
      const float4* row = reinterpret_cast<const float4*>(turned[r]);
      float sums[4] = {};
#pragma unroll
      for (int e = 0; e < D / 4; ++e) {
        const float4 four = row[e];
        sums[0] = fmaf(four.x, column[4 * e], sums[0]), sums[1] = fmaf(four.y, column[4 * e + 1], sums[1]);
        sums[2] = fmaf(four.z, column[4 * e + 2], sums[2]), sums[3] = fmaf(four.w, column[4 * e + 3], sums[3]);
      }
      x = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    }
    p.out[(head * p.origins + first + r) * D + d] = x;
  }
}

}  // namespace million
