// What one launch of the contiguous lookup-table decode reads and writes.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace million {

// Letters and the meaning of lengths as in decode_params.h; P is the granularity in which tokens become codes.
struct LookupDecodeParams {
  const void* q;               // [B, Hq, D]
  void* out;                   // [B, Hq, D]
  const uint8_t* key_codes;    // [B, Hkv, capacity, MK], rows
  const uint8_t* value_codes;  // the same with MV, or transposed pages [B, Hkv, capacity / P, MV, P]
  const int* lengths;          // [B]
  const int* first_valid;      // [B] left padding, or null
  const __half* key_table;     // [Hc, 256, D] centroids, code-major
  const __half* value_table;
  const float* key_rotation;  // [Hr, D, D] (x_rot = x R), or null
  const float* value_rotation;
  const void* key_window;  // [B, Hkv, R, D], position p in slot p mod R
  const void* value_window;
  int* counters;    // [B * Hq], zero before and after every launch
  float* partials;  // [B * Hq, splits, 2 * D + 4]
  float scale;
  int64_t capacity;
  int batch, kv_heads, group, page_size, residual;
  int key_table_heads, value_table_heads, key_rotation_heads, value_rotation_heads;
  Dtype dtype;
  Layout value_layout;  // kRow or kTransposed
};

}  // namespace million
