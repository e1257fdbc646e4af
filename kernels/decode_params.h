// What one launch of the paged decode kernel reads and writes.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace million {

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
  int* counters;                // [B * Hkv * head_sets], zero before and after every launch
  float* partials;              // (grid + B * Hkv * head_sets) * partial_floats()
  float scale;
  int batch, kv_heads, group, head_sets, page_size, residual, table_width;
  int key_table_heads, value_table_heads, key_rotation_heads, value_rotation_heads;
  Dtype dtype;
};

// Floats of a partial result: HG heads, each D sums of codes, D of the window, a maximum and a denominator.
constexpr int64_t partial_floats(int head_dim, int heads) { return int64_t(heads) * (2 * head_dim + 2); }

}  // namespace million
