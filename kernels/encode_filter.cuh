// Nearest of 256 centroids of four or eight dims: scores on tensor cores tell which eight can hold it, fp32 decides
// among these.
//
// |c|^2 / 2 - x.c orders centroids as their distance does.  With x and c relative to the mean of the centroids, scaled
// by a power of two so that the largest |c_j| lies in [1, 2), and each split into two fp16 numbers, one m16n8k16 holds
// 16 points and 8 centroids of four dims:
//     k   0..3: x_high c_high   4..7: x_low c_high   8..11: x_high c_low   12..14: 2^-10 times 2^9 |c|^2 as three fp16.
// Of eight dims two of them do:
//     k   0..7: x_high c_high   8..15: x_low c_high;   0..7: x_high c_low   8..10: the norm.
// A lane meets its 64 scores of a point in 8 groups of 8 and keeps the least score of the best group, which group it is
// (in the lowest bits), and the least score of all others.  If they lie further apart than all rounding, the nearest
// centroid is in the best group, and the four lanes of the quad compute those 8 distances as the scan does: the lowest
// index at the least squared distance in fp32.  Otherwise the warp scans all centroids for that point.
//
// Rounding.  Let X be the largest |x_j| and r the distance of the nearest of the eight, in the scaled units.  A
// centroid as near as that has |c_j| <= Y = X + r, so the magnitudes of its score's terms add up to 6 Y^2 at most (four
// dims).  The products that are left out and the fp16 remainders lose 12 * 2^-22 Y^2 (where they are subnormal 2^-22 Y,
// and 2^-35 of the norm), 16 additions in the matrix unit 16 * 2^-23 * 6 Y^2, the index in the lowest five bits
// 2^-18 * 6 Y^2: 2^-14.7 Y^2 in all.  The distances that decide are off by 6 * 2^-24 r^2.  Twice all that, for two
// centroids, is below 2^-13 Y^2 + 2^-20 Y + 2^-32.  With eight dims 24 * 2^-22 Y^2 (2^-21 Y), 32 * 2^-23 * 12 Y^2 and
// 2^-18 * 12 Y^2 are lost, 2^-13.3 Y^2 in all, and off by 10 * 2^-24 r^2: below 2^-12 Y^2 + 2^-19 Y + 2^-32.  (A
// centroid further away errs more, but is further away by more than that.)  Points with X > 64 are scanned.
//
// Scanned are 0.3 % of the points of a normal distribution and of Student's t with 4 degrees of freedom (four dims), and
// 0.7 % of those of a normal distribution in eight dims.
//
// Cost a point: 64 matrix columns, 1.4 comparisons a centroid and ~25 instructions for the eight, against 11
// instructions a centroid of a scan.
#pragma once

#include "common.cuh"

namespace million {

template <int DSUB>
struct Point {
  float x[DSUB];
  __device__ __forceinline__ static Point load(const float* __restrict__ source) {  // 16-byte aligned
    Point p;
#pragma unroll
    for (int j = 0; j < DSUB; j += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(source + j));
      p.x[j] = four.x, p.x[j + 1] = four.y, p.x[j + 2] = four.z, p.x[j + 3] = four.w;
    }
    return p;
  }
};

template <int DSUB>
__device__ __forceinline__ float squared_distance(const Point<DSUB>& x, const Point<DSUB>& c) {
  float sum = 0.f;
#pragma unroll
  for (int j = 0; j < DSUB; ++j) {
    const float difference = x.x[j] - c.x[j];
    sum = j ? fmaf(difference, difference, sum) : difference * difference;
  }
  return sum;
}

// fp16 pairs of two numbers and of what is left of them.
__device__ __forceinline__ void split2(float a, float b, uint32_t& high, uint32_t& low) {
  const __half2 pair = __floats2half2_rn(a, b);
  const __half2 rest = __floats2half2_rn(a - __low2float(pair), b - __high2float(pair));
  high = *reinterpret_cast<const uint32_t*>(&pair), low = *reinterpret_cast<const uint32_t*>(&rest);
}

// One subspace for 128 points of a warp.
template <int DSUB>
class Filter {
 public:
  using P = Point<DSUB>;
  static_assert(DSUB == 4 || DSUB == 8, "one or two matrix instructions");
  static constexpr int kTiles = 8, kPoints = 16 * kTiles;

  // All lanes call it; centroids [256, DSUB].
  __device__ explicit Filter(const float* __restrict__ centroids)
      : centroids_(centroids), lane_(threadIdx.x % 32), t_(lane_ % 4) {
    float largest = 0.f;
    if constexpr (DSUB == 4) {
      P own[kCentroids / 32];
      float sum[DSUB] = {};
#pragma unroll
      for (int k = 0; k < kCentroids / 32; ++k) {
        own[k] = centroid(32 * k + lane_);
#pragma unroll
        for (int j = 0; j < DSUB; ++j) sum[j] += own[k].x[j];
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < DSUB; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
#pragma unroll
      for (int j = 0; j < DSUB; ++j) middle_[j] = sum[j] / kCentroids;
#pragma unroll
      for (int k = 0; k < kCentroids / 32; ++k) largest = fmaxf(largest, size(relative(own[k], 1.f)));
#pragma unroll
      for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    } else {
      float sum[2] = {};
#pragma unroll
      for (int c = lane_ / 4; c < kCentroids; c += 8) {
        const float2 own = centroid_part(c);
        sum[0] += own.x, sum[1] += own.y;
      }
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
#pragma unroll
        for (int j = 0; j < 2; ++j) sum[j] += __shfl_xor_sync(0xffffffffu, sum[j], step);
#pragma unroll
      for (int j = 0; j < 2; ++j) middle_[j] = sum[j] / kCentroids;
#pragma unroll
      for (int c = lane_ / 4; c < kCentroids; c += 8) {
        const float2 own = relative(centroid_part(c), 1.f);
        largest = fmaxf(largest, fmaxf(fabsf(own.x), fabsf(own.y)));
      }
#pragma unroll
      for (int step = 1; step < 32; step *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    // Where squares leave the range of normal numbers nothing is a number, and all points are scanned.
    const int exponent = int(__float_as_uint(largest) >> 23) - 127;
    scale_ = abs(exponent) <= 56 ? __uint_as_float(uint32_t(127 - exponent) << 23) : NAN;
  }

  // Codes of point(0) .. point(kPoints - 1), each handed to store(row, code) by one lane; point.part(row, j) has the
  // dims j and j + 1 of a point.
  template <class Source, class Store>
  __device__ void run(Source point, Store store) const {
    const int g = lane_ / 4;
    uint32_t a[kTiles][4];
    float best[kTiles][2], other[kTiles][2];
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * m + 8 * half + g;
        uint32_t high, low;
        if constexpr (DSUB == 4) {
          const P x = relative(point(row), scale_);
          split2(t_ % 2 ? x.x[2] : x.x[0], t_ % 2 ? x.x[3] : x.x[1], high, low);
          a[m][half] = t_ < 2 ? high : low;
          a[m][half + 2] = t_ < 2 ? high : norm_factor(t_ - 2);
        } else {
          const float2 x = relative(point.part(row, 2 * t_), scale_);
          split2(x.x, x.y, high, low);
          a[m][half] = high, a[m][half + 2] = low;
        }
        best[m][half] = other[m][half] = INFINITY;
      }
#pragma unroll 1
    for (int group = 0; group < 8; ++group) {
      uint32_t b[4][DSUB == 4 ? 2 : 3];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int code = 32 * group + 8 * n + g;
        uint32_t high, low;
        if constexpr (DSUB == 4) {
          const P c = relative(centroid(code), scale_);
          split2(t_ % 2 ? -c.x[2] : -c.x[0], t_ % 2 ? -c.x[3] : -c.x[1], high, low);
          const float square = fmaf(c.x[3], c.x[3], fmaf(c.x[2], c.x[2], fmaf(c.x[1], c.x[1], c.x[0] * c.x[0])));
          b[n][0] = high;
          b[n][1] = t_ < 2 ? low : norm(square, t_ == 2);
        } else {
          const float2 c = relative(centroid_part(code), scale_);
          split2(-c.x, -c.y, high, low);
          float square = fmaf(c.y, c.y, c.x * c.x);
          square += __shfl_xor_sync(0xffffffffu, square, 1);
          square += __shfl_xor_sync(0xffffffffu, square, 2);
          b[n][0] = high, b[n][1] = low, b[n][2] = t_ < 2 ? norm(square, t_ == 0) : 0u;
        }
      }
      const uint32_t mark = 4 * group + t_;
      const uint32_t constant = t_ < 2 ? norm_factor(t_) : 0u;  // of eight dims
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        float scores[4][4] = {};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          if constexpr (DSUB == 4) {
            mma(scores[n], a[m][0], a[m][1], a[m][2], a[m][3], b[n][0], b[n][1]);
          } else {
            mma(scores[n], a[m][0], a[m][1], a[m][2], a[m][3], b[n][0], b[n][0]);
            mma(scores[n], a[m][0], a[m][1], constant, constant, b[n][1], b[n][2]);
          }
        }
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
  template <class Source, class Store>
  __device__ __forceinline__ void decide(int first, float best, float other, Source point, Store store) const {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float its_best = __shfl_xor_sync(0xffffffffu, best, step);
      const float its_other = __shfl_xor_sync(0xffffffffu, other, step);
      other = fminf(fminf(other, its_other), fmaxf(best, its_best));
      best = fminf(best, its_best);
    }
    const P x = point(first + lane_ / 4);
    // Of the group's four matrices of eight columns the lane takes the t-th, at the columns of the lane that found it.
    const uint32_t mark = __float_as_uint(best) & 31;
    int code = 8 * mark + 8 * t_ - 6 * (mark % 4);  // 32 * group + 8 * t + 2 * (mark % 4)
    const float* two = centroids_ + code * DSUB;
    const float even = squared_distance(x, P::load(two)), odd = squared_distance(x, P::load(two + DSUB));
    float distance = odd < even ? odd : even;
    code += odd < even;
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      const float its_distance = __shfl_xor_sync(0xffffffffu, distance, step);
      const int its_code = __shfl_xor_sync(0xffffffffu, code, step);
      if (its_distance < distance || (its_distance == distance && its_code < code))
        distance = its_distance, code = its_code;
    }
    float X;
    if constexpr (DSUB == 4) {
      X = size(relative(x, scale_));
    } else {
      const float2 part = relative(point.part(first + lane_ / 4, 2 * t_), scale_);
      X = fmaxf(fabsf(part.x), fabsf(part.y));
      X = fmaxf(X, __shfl_xor_sync(0xffffffffu, X, 1));
      X = fmaxf(X, __shfl_xor_sync(0xffffffffu, X, 2));
    }
    const float Y = fmaf(sqrtf(distance), scale_, X);
    // Not clear either if one of them is not a number.
    constexpr float kSquare = DSUB == 4 ? 0x1p-13f : 0x1p-12f, kLinear = DSUB == 4 ? 0x1p-20f : 0x1p-19f;
    const bool clear = other - best > fmaf(fmaf(kSquare, Y, kLinear), Y, 0x1p-32f) && X <= 64.f;
    for (uint32_t left = __ballot_sync(0xffffffffu, !clear && t_ == 0); left; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int scanned = scan(point(first + source / 4));
      if (lane_ == source) code = scanned;
    }
    if (t_ == 0) store(first + lane_ / 4, code);
  }

  // All centroids for one point, eight a lane.
  __device__ int scan(const P& x) const {
    float best = INFINITY;
    int code = 0;
#pragma unroll
    for (int k = 0; k < kCentroids / 32; ++k) {
      const float distance = squared_distance(x, centroid(32 * k + lane_));
      if (distance < best) best = distance, code = 32 * k + lane_;
    }
    const uint32_t bits = __float_as_uint(best), least = __reduce_min_sync(0xffffffffu, bits);
    return __reduce_min_sync(0xffffffffu, bits == least ? code : kCentroids - 1);
  }

  __device__ __forceinline__ P centroid(int code) const { return P::load(centroids_ + code * DSUB); }

  // Of eight dims a lane has two, 2 * t and the next.
  __device__ __forceinline__ float2 centroid_part(int code) const {
    return __ldg(reinterpret_cast<const float2*>(centroids_ + code * DSUB + 2 * t_));
  }
  __device__ __forceinline__ float2 relative(float2 x, float scale) const {
    return make_float2((x.x - middle_[0]) * scale, (x.y - middle_[1]) * scale);
  }

  __device__ __forceinline__ P relative(const P& p, float scale) const {
    P out;
#pragma unroll
    for (int j = 0; j < DSUB; ++j) out.x[j] = (p.x[j] - middle_[j]) * scale;
    return out;
  }

  __device__ __forceinline__ static float size(const P& p) {
    return fmaxf(fmaxf(fabsf(p.x[0]), fabsf(p.x[1])), fmaxf(fabsf(p.x[2]), fabsf(p.x[3])));
  }

  // What the parts of the norm are multiplied by: 2^-10, of which the first lane has two and the next one.
  __device__ __forceinline__ static uint32_t norm_factor(int lane) { return lane == 0 ? 0x14001400u : 0x1400u; }

  // 2^9 |c|^2, of |c|^2, in three fp16: the first two, or the last.
  __device__ __forceinline__ static uint32_t norm(float square, bool first_two) {
    const float value = 512.f * square;
    const __half first = __float2half_rn(value);
    const float rest = value - __half2float(first);
    const __half second = __float2half_rn(rest);
    const __half third = __float2half_rn(rest - __half2float(second));
    return first_two ? __half_as_ushort(first) | uint32_t(__half_as_ushort(second)) << 16 : __half_as_ushort(third);
  }

  const float* centroids_;
  int lane_, t_;
  float middle_[DSUB == 4 ? 4 : 2];  // of all dims, or of the lane's
  float scale_;
};

}  // namespace million
