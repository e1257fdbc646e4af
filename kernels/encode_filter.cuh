// Nearest of 256 centroids of four dims: scores on tensor cores tell which eight can hold it, fp32 decides among these.
//
// |c|^2 / 2 - x.c orders centroids as their distance does.  With x and c relative to the mean of the centroids, scaled
// by a power of two so that the largest |c_j| lies in [1, 2), and each split into two fp16 numbers, one m16n8k16 holds
// 16 points and 8 centroids:
//     k   0..3: x_high c_high   4..7: x_low c_high   8..11: x_high c_low   12..14: 2^-10 times 2^9 |c|^2 as three fp16.
// A lane meets its 64 scores of a point in 8 groups of 8 and keeps the least score of the best group, which group it is
// (in the lowest bits), and the least score of all others.  If they lie further apart than all rounding, the nearest
// centroid is in the best group, and the four lanes of the quad compute those 8 distances as the scan does: the lowest
// index at the least squared distance in fp32.  Otherwise the warp scans all centroids for that point.
//
// Rounding.  Let X be the largest |x_j| and r the distance of the nearest of the eight, in the scaled units.  A
// centroid as near as that has |c_j| <= Y = X + r, so the magnitudes of its score's terms add up to 6 Y^2 at most.  The
// products that are left out and the fp16 remainders lose 12 * 2^-22 Y^2 (where they are subnormal 2^-22 Y, and 2^-35
// of the norm), 16 additions in the matrix unit 16 * 2^-23 * 6 Y^2, the index in the lowest five bits 2^-18 * 6 Y^2:
// 2^-14.7 Y^2 in all.  The distances that decide are off by 6 * 2^-24 r^2.  Twice all that, for two centroids, is below
// 2^-13 Y^2 + 2^-20 Y + 2^-32.  (A centroid further away errs more, but is further away by more than that.)  Points
// with X > 64 are scanned.
//
// Scanned are 0.3 % of the points of a normal distribution and of Student's t with 4 degrees of freedom.
//
// Cost a point: 64 matrix columns, 1.4 comparisons a centroid and ~25 instructions for the eight, against 11
// instructions a centroid of a scan.
#pragma once

#include "common.cuh"

namespace million {

__device__ __forceinline__ float distance4(float4 x, float4 c) {
  float difference = x.x - c.x;
  float sum = difference * difference;
  difference = x.y - c.y, sum = fmaf(difference, difference, sum);
  difference = x.z - c.z, sum = fmaf(difference, difference, sum);
  difference = x.w - c.w;
  return fmaf(difference, difference, sum);
}

// fp16 pairs of two numbers and of what is left of them.
__device__ __forceinline__ void split2(float a, float b, uint32_t& high, uint32_t& low) {
  const __half2 pair = __floats2half2_rn(a, b);
  const __half2 rest = __floats2half2_rn(a - __low2float(pair), b - __high2float(pair));
  high = *reinterpret_cast<const uint32_t*>(&pair), low = *reinterpret_cast<const uint32_t*>(&rest);
}

// One subspace for 128 points of a warp.
class Filter {
 public:
  static constexpr int kTiles = 8, kPoints = 16 * kTiles;

  // All lanes call it; centroids [256, 4].
  __device__ explicit Filter(const float* __restrict__ centroids)
      : centroids_(reinterpret_cast<const float4*>(centroids)), lane_(threadIdx.x % 32), t_(lane_ % 4) {
    float4 own[kCentroids / 32];
    float sum[4] = {};
#pragma unroll
    for (int k = 0; k < kCentroids / 32; ++k) {
      own[k] = __ldg(centroids_ + 32 * k + lane_);
      sum[0] += own[k].x, sum[1] += own[k].y, sum[2] += own[k].z, sum[3] += own[k].w;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
    middle_ = make_float4(sum[0] / kCentroids, sum[1] / kCentroids, sum[2] / kCentroids, sum[3] / kCentroids);
    float largest = 0.f;
#pragma unroll
    for (int k = 0; k < kCentroids / 32; ++k) largest = fmaxf(largest, size(relative(own[k], 1.f)));
#pragma unroll
    for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    // Where squares leave the range of normal numbers nothing is a number, and all points are scanned.
    const int exponent = int(__float_as_uint(largest) >> 23) - 127;
    scale_ = abs(exponent) <= 56 ? __uint_as_float(uint32_t(127 - exponent) << 23) : NAN;
  }

  // Codes of point(0) .. point(kPoints - 1), each handed to store(row, code) by one lane.
  template <class Point, class Store>
  __device__ void run(Point point, Store store) const {
    const int g = lane_ / 4;
    uint32_t a[kTiles][4];
    float best[kTiles][2], other[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = relative(point(16 * m + 8 * half + g), scale_);
        uint32_t high, low;
        split2(t_ % 2 ? x.z : x.x, t_ % 2 ? x.w : x.y, high, low);
        a[m][half] = t_ < 2 ? high : low;
        a[m][half + 2] = t_ < 2 ? high : t_ == 2 ? 0x14001400u : 0x1400u;  // 2^-10
        best[m][half] = other[m][half] = INFINITY;
      }
#pragma unroll 1
    for (int group = 0; group < 8; ++group) {
      uint32_t b[4][2];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float4 c = relative(__ldg(centroids_ + 32 * group + 8 * n + g), scale_);
        uint32_t high, low;
        split2(t_ % 2 ? -c.z : -c.x, t_ % 2 ? -c.w : -c.y, high, low);
        b[n][0] = high;
        b[n][1] = t_ < 2 ? low : norm(c);
      }
      const uint32_t mark = 4 * group + t_;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float scores[4][4] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) mma(scores[n], a[m][0], a[m][1], a[m][2], a[m][3], b[n][0], b[n][1]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float least = fminf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
          for (int n = 1; n < 4; ++n) least = fminf(least, fminf(scores[n][2 * half], scores[n][2 * half + 1]));
          least = __uint_as_float((__float_as_uint(least) & ~31u) | mark);
          other[m][half] = fminf(other[m][half], fmaxf(best[m][half], least));
          best[m][half] = fminf(best[m][half], least);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) decide(16 * m + 8 * half, best[m][half], other[m][half], point, store);
  }

 private:
  // The eight points first + g: what their quads found, in code.
  template <class Point, class Store>
  __device__ __forceinline__ void decide(int first, float best, float other, Point point, Store store) const {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float its_best = __shfl_xor_sync(0xffffffffu, best, step);
      const float its_other = __shfl_xor_sync(0xffffffffu, other, step);
      other = fminf(fminf(other, its_other), fmaxf(best, its_best));
      best = fminf(best, its_best);
    }
    const float4 x = point(first + lane_ / 4);
    // Of the group's four matrices of eight columns the lane takes the t-th, at the columns of the lane that found it.
    const uint32_t mark = __float_as_uint(best) & 31;
    int code = 8 * mark + 8 * t_ - 6 * (mark % 4);  // 32 * group + 8 * t + 2 * (mark % 4)
    const float even = distance4(x, __ldg(centroids_ + code)), odd = distance4(x, __ldg(centroids_ + code + 1));
    float distance = odd < even ? odd : even;
    code += odd < even;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float its_distance = __shfl_xor_sync(0xffffffffu, distance, step);
      const int its_code = __shfl_xor_sync(0xffffffffu, code, step);
      if (its_distance < distance || (its_distance == distance && its_code < code))
        distance = its_distance, code = its_code;
    }
    const float X = size(relative(x, scale_)), Y = fmaf(sqrtf(distance), scale_, X);
    // Not clear either if one of them is not a number.
    const bool clear = other - best > fmaf(fmaf(0x1p-13f, Y, 0x1p-20f), Y, 0x1p-32f) && X <= 64.f;
    for (uint32_t left = __ballot_sync(0xffffffffu, !clear && t_ == 0); left; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int scanned = scan(point(first + source / 4));
      if (lane_ == source) code = scanned;
    }
    if (t_ == 0) store(first + lane_ / 4, code);
  }

  // All centroids for one point, eight a lane.
  __device__ int scan(float4 x) const {
    float best = INFINITY;
    int code = 0;
#pragma unroll
    for (int k = 0; k < kCentroids / 32; ++k) {
      const float distance = distance4(x, __ldg(centroids_ + 32 * k + lane_));
      if (distance < best) best = distance, code = 32 * k + lane_;
    }
    const uint32_t bits = __float_as_uint(best), least = __reduce_min_sync(0xffffffffu, bits);
    return __reduce_min_sync(0xffffffffu, bits == least ? code : kCentroids - 1);
  }

  __device__ __forceinline__ float4 relative(float4 x, float scale) const {
    return make_float4((x.x - middle_.x) * scale, (x.y - middle_.y) * scale, (x.z - middle_.z) * scale,
                       (x.w - middle_.w) * scale);
  }

  __device__ __forceinline__ static float size(float4 x) {
    return fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w)));
  }

  // 2^9 |c|^2 in three fp16: lane t = 2 holds the first two, t = 3 the last.
  __device__ __forceinline__ uint32_t norm(float4 c) const {
    const float value = 512.f * fmaf(c.w, c.w, fmaf(c.z, c.z, fmaf(c.y, c.y, c.x * c.x)));
    const __half first = __float2half_rn(value);
    const float rest = value - __half2float(first);
    const __half second = __float2half_rn(rest);
    const __half third = __float2half_rn(rest - __half2float(second));
    return t_ == 2 ? __half_as_ushort(first) | uint32_t(__half_as_ushort(second)) << 16 : __half_as_ushort(third);
  }

  const float4* centroids_;
  int lane_, t_;
  float4 middle_;
  float scale_;
};

}  // namespace million
