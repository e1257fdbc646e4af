// x R on tensor cores with the accuracy of an fp32 product.
//
// x is exactly fp16 or bf16, R is fp32.  R is split into terms of x's type whose sum is R: two of fp16 (11 + 11 bits,
// after scaling each column by a power of two so that its largest entry lies in [2^13, 2^14); what is lost is below
// 2^-22 of the entry or 2^-38 of the column's largest), three of bf16 (8 + 8 + 8 bits, nothing is lost).  Products are
// exact in the fp32 accumulators; the leading term has accumulators of its own, so that D / 16 additions of full size
// are rounded where a scalar loop rounds D.
//
// The order of the summation index is free as long as both operands share it: lane t of a quad takes the dims
// 32 j + 8 t .. + 7 of a row as one 16-byte load, which feeds the matrix instructions 2 j and 2 j + 1.
#pragma once

#include "common.cuh"

namespace million {

// c += a * b, m16n8k16, fp32 accumulation.
template <bool BF16>
__device__ __forceinline__ void mma_rows(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  if constexpr (BF16) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    mma(c, a0, a1, a2, a3, b0, b1);
  }
}

// Rows g and g + 8 of 16, as lane 4 g + t holds them: dims 32 j + 8 t .. + 7 of each.
template <int D>
struct Rows {
  static constexpr int kPieces = D / 32;
  uint4 low[kPieces], high[kPieces];

  // `first` is the element of row 0; rows from `count` on are zeros.  `aligned`: 16-byte loads are possible.
  __device__ __forceinline__ void load(const uint16_t* first, int64_t stride, int count, bool aligned) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const uint16_t* x = first + g * stride + 8 * t;
#pragma unroll
    for (int j = 0; j < kPieces; ++j) low[j] = high[j] = make_uint4(0, 0, 0, 0);
    if (aligned) {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (g < count) low[j] = __ldg(reinterpret_cast<const uint4*>(x + 32 * j));
        if (g + 8 < count) high[j] = __ldg(reinterpret_cast<const uint4*>(x + 8 * stride + 32 * j));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kPieces; ++j) {
        if (g < count) low[j] = load_words(x + 32 * j);
        if (g + 8 < count) high[j] = load_words(x + 8 * stride + 32 * j);
      }
    }
  }

 private:
  __device__ __forceinline__ static uint4 load_words(const uint16_t* x) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(x);
    return make_uint4(__ldg(words), __ldg(words + 1), __ldg(words + 2), __ldg(words + 3));
  }
};

// Columns of R, split, in the order in which lanes read them: TILES of eight columns.
template <int D, bool BF16, int TILES>
struct SplitColumns {
  static constexpr int kTerms = BF16 ? 3 : 2, kPieces = D / 32;
  uint4 terms[TILES][kPieces][kTerms][32];  // eight consecutive k at one column
  float scale[TILES][8];                    // what x times the terms is multiplied by

  // Tile i holds the columns column(i) .. + 7 of rotation [D, D].  All threads of the block call it, a multiple of 32.
  template <class Column>
  __device__ void load(const float* __restrict__ rotation, Column column) {
    constexpr int kSegments = D / 8;  // threads of one column, neighbours in a warp
    for (int i = threadIdx.x; i < TILES * 8 * kSegments; i += blockDim.x) {
      const int tile = i / kSegments / 8, g = i / kSegments % 8, segment = i % kSegments;
      const float* source = rotation + 8 * segment * D + column(tile) + g;
      float values[8], largest = 0.f;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        values[k] = __ldg(source + k * D);
        largest = fmaxf(largest, fabsf(values[k]));
      }
#pragma unroll
      for (int step = 1; step < kSegments; step *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      // The exponent of the largest entry, from its bits; a column of zeros or of extremes keeps a finite factor.
      const int exponent = BF16 ? 0 : min(max(int(__float_as_uint(largest) >> 23) - 127 - 13, -120), 120);
      const float factor = __uint_as_float(uint32_t(127 - exponent) << 23);
      if (segment == 0) scale[tile][g] = __uint_as_float(uint32_t(127 + exponent) << 23);
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        uint32_t words[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const uint32_t even = take(values[2 * k], term ? 1.f : factor);
          words[k] = even | take(values[2 * k + 1], term ? 1.f : factor) << 16;
        }
        terms[tile][segment / 4][term][4 * g + segment % 4] = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }

  // Rows g and g + 8 of each x R at the columns 2 t, 2 t + 1 of a tile: result[n][0], [1] and [2], [3].
  template <int N>
  __device__ __forceinline__ void multiply(const Rows<D> (&x)[N], int tile, float (&result)[N][4]) const {
    const int lane = threadIdx.x % 32;
    float rest[N][4] = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) result[n][i] = 0.f;
#pragma unroll
    for (int j = 0; j < kPieces; ++j)
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        const uint4 b = terms[tile][j][term][lane];
#pragma unroll
        for (int n = 0; n < N; ++n) {
          float(&sums)[4] = term ? rest[n] : result[n];
          mma_rows<BF16>(sums, x[n].low[j].x, x[n].high[j].x, x[n].low[j].y, x[n].high[j].y, b.x, b.y);
          mma_rows<BF16>(sums, x[n].low[j].z, x[n].high[j].z, x[n].low[j].w, x[n].high[j].w, b.z, b.w);
        }
      }
    const float2 factor = *reinterpret_cast<const float2*>(&scale[tile][2 * (lane % 4)]);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) result[n][i] = (result[n][i] + rest[n][i]) * (i % 2 ? factor.y : factor.x);
  }

 private:
  // The nearest value of x's type to value * factor, as bits; `value` becomes what is left.
  __device__ __forceinline__ static uint32_t take(float& value, float factor) {
    value *= factor;
    if constexpr (BF16) {
      const __nv_bfloat16 part = __float2bfloat16_rn(value);
      value -= __bfloat162float(part);
      return __bfloat16_as_ushort(part);
    } else {
      const __half part = __float2half_rn(value);
      value -= __half2float(part);
      return __half_as_ushort(part);
    }
  }
};

}  // namespace million
