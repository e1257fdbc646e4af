// Partial results of the decode kernel -> attention: a block a query head.
#pragma once

#include "decode_params.h"

namespace million {

template <int D_, int HG_>
struct Merge {
  static constexpr int D = D_, HG = HG_, kThreads = 512, kWarps = kThreads / 32;
  static constexpr int kGroups = kThreads / D;  // threads of one dim, which share the partial results
  static constexpr int kRows = D / kWarps;      // of a rotation, a warp's
};

template <class T>
__global__ void __launch_bounds__(T::kThreads) merge_kernel(const __grid_constant__ PagedDecodeParams p) {
  constexpr int D = T::D, HG = T::HG, kLane = D / 32, kBatch = 4;
  constexpr int64_t kStride = partial_floats(D, HG);
  __shared__ float sums[2][T::kGroups][D];  // of codes (or all), of the window
  __shared__ float maxima[T::kGroups], denominators[T::kGroups];
  __shared__ float coded[D];
  const int heads = p.kv_heads * p.group, b = blockIdx.x / heads, head = blockIdx.x % heads;
  const int h = head / p.group, in_group = head % p.group, hg = in_group % HG;
  const int id = (b * p.kv_heads + h) * p.head_sets + in_group / HG;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = threadIdx.x % D, group = threadIdx.x / D;
  const bool apart = p.value_rotation != nullptr;

  float rotation[T::kRows][kLane];  // constant, so it need not wait; row d of the matrix: o[d] = sum over e of o_rot[e] R[d, e]
  if (apart) {
    const float* matrix = p.value_rotation + (p.value_rotation_heads > 1 ? h : 0) * int64_t(D) * D;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
      for (int j = 0; j < kLane; ++j) rotation[i][j] = __ldg(matrix + (warp * T::kRows + i) * D + lane + 32 * j);
  }
  wait_for_previous_launch();

  const int2 span = __ldcg(p.spans + id);
  const float* slots = p.partials + (int64_t(span.x) + id) * kStride;
  float top = -INFINITY, denominator = 0.f, sum = 0.f, window_sum = 0.f;
  for (int first = group; first < span.y; first += kBatch * T::kGroups) {  // loads of a batch are in flight together
    float2 ml[kBatch];
    float o[kBatch], window[kBatch], next = top;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const bool inside = first + j * T::kGroups < span.y;
      const float* slot = slots + (inside ? first + j * T::kGroups : 0) * kStride;
      ml[j] = __ldcg(reinterpret_cast<const float2*>(slot + 2 * HG * D) + hg);
      if (!inside) ml[j] = make_float2(-INFINITY, 0.f);
      o[j] = __ldcg(slot + hg * D + d);
      window[j] = apart ? __ldcg(slot + (HG + hg) * D + d) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) next = fmaxf(next, ml[j].x);
    const float factor = exp2_approx(top - next);
    sum *= factor, window_sum *= factor, denominator *= factor, top = next;
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const float weight = exp2_approx(ml[j].x - next);
      denominator += weight * ml[j].y, sum += weight * o[j], window_sum += weight * window[j];
    }
  }
  sums[0][group][d] = sum, sums[1][group][d] = window_sum;
  if (d == 0) maxima[group] = top, denominators[group] = denominator;
  __syncthreads();
  if (group == 0) {
    top = maxima[0];
#pragma unroll
    for (int i = 1; i < T::kGroups; ++i) top = fmaxf(top, maxima[i]);
    denominator = sum = window_sum = 0.f;
#pragma unroll
    for (int i = 0; i < T::kGroups; ++i) {
      const float weight = exp2_approx(maxima[i] - top);
      denominator += weight * denominators[i], sum += weight * sums[0][i][d], window_sum += weight * sums[1][i][d];
    }
    const float inverse = denominator > 0.f ? 1.f / denominator : 0.f;
    coded[d] = sum * inverse, sums[1][0][d] = window_sum * inverse;
    if (!apart) store_element(p.out, int64_t(blockIdx.x) * D + d, sum * inverse, p.dtype);
  }
  if (!apart) return;
  __syncthreads();
  float x[kLane];
#pragma unroll
  for (int j = 0; j < kLane; ++j) x[j] = coded[lane + 32 * j];
#pragma unroll
  for (int i = 0; i < T::kRows; ++i) {
    float dot = 0.f;
#pragma unroll
    for (int j = 0; j < kLane; ++j) dot += x[j] * rotation[i][j];
#pragma unroll
    for (int step = 16; step; step >>= 1) dot += __shfl_xor_sync(~0u, dot, step);
    const int row = warp * T::kRows + i;
    if (lane == 0) store_element(p.out, int64_t(blockIdx.x) * D + row, dot + sums[1][0][row], p.dtype);
  }
}

}  // namespace million
