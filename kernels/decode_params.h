// What one launch of the paged decode kernel reads and writes.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.cuh"

namespace million {

// Division by a number known on the host, for dividends below 2^31: n / d = n * m >> (31 + l), l = ceil(log2 d) and
// m = ceil(2^(31 + l) / d) (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct Divider {
  uint32_t m = 0x80000000u, l = 0;
  Divider() = default;
  explicit Divider(uint32_t d) : l(0) {
    while ((1u << l) < d) ++l;
    m = uint32_t(((uint64_t(1) << (31 + l)) + d - 1) / d);
  }
#ifdef __CUDACC__
  __device__ int quotient(int n) const { return int(uint64_t(uint32_t(n)) * m >> (31 + l)); }
#endif
};

// B sequences, Hq = G * Hkv query heads, D head_dim, M subspaces a side, P page size, R residual window.
// lengths[b] counts all tokens of sequence b, the newest included; of these
//     coded = max(0, lengths[b] - (R - P)) / P * P
// are codes in pages, the rest exact in the window's ring (position p in slot p mod R).
struct PagedDecodeParams {
  const void* q;                // [B, Hq, D]
  void* out;                    // [B, Hq, D]
  const uint8_t* key_pool;      // [pages, Hkv, P / 16, 16 * MK], fragment order
  const uint8_t* value_pool;    // [pages, Hkv, P / 16, 16 * MV], fragment order
  const int* block_table;       // [B, table_width]
  const int* lengths;           // [B]
  const int* first_valid;       // [B] left padding, or null
  const __half* key_table;      // [Hc, 256, D] centroids, code-major
  const __half* value_table;    // [Hc, 256, D]
  const float* key_rotation;    // [Hr, D, D] (x_rot = x R), or null
  const float* value_rotation;  // [Hr, D, D], or null
  const void* key_window;       // [B, Hkv, R, D]
  const void* value_window;     // [B, Hkv, R, D]
  int2* spans;                  // [B * Hkv * head_sets] first block and number of blocks of a set, written
  float* partials;              // (grid + B * Hkv * head_sets) * partial_floats(), written
  float scale;
  int batch, kv_heads, group, head_sets, page_size, residual, table_width, grid;
  Divider by_page_size, by_page_groups, by_residual, by_head_sets, by_grid;
  int key_table_heads, value_table_heads, key_rotation_heads, value_rotation_heads;
  Dtype dtype;
};

// Floats of a partial result: HG heads, each D sums of codes, D of the window, a maximum and a denominator.
constexpr int64_t partial_floats(int head_dim, int heads) { return int64_t(heads) * (2 * head_dim + 2); }

}  // namespace million
