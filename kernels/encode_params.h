// What the encoding kernels read and write.
#pragma once

#include <cstdint>

#include "common.cuh"
#include "encode_grid_shape.h"

namespace million {

// Pages of codes of one side.  With a block table, `codes` is a pool [pages, Hkv, page bytes]; without one it is
// [B, Hkv, table_width, page bytes] and page i of a sequence is its i-th.
struct CodePages {
  uint8_t* codes;
  const int* block_table;  // [B, table_width], or null
  int table_width, page_size, kv_heads;
  Layout layout;
};

struct Quantizer {
  const float* centroids;  // [Hc, M, 256, dsub]
  const float* rotation;   // [Hr, D, D] (x_rot = x R), or null
  int centroid_heads, rotation_heads;
};

// Centroids of one dim in ascending order, of all subspaces of a quantizer (encode_sorted.cuh).
struct SortedCentroids {
  float* values;   // [Hc, M, 256], or null: scan all centroids
  uint8_t* codes;  // [Hc, M, 256] what the centroids' numbers were
};

constexpr int kSortedBytes = kCentroids * 5;  // of one subspace

struct EncodeParams {
  const void* x;  // [B, Hkv, T, D], strides below, the last dimension dense
  int64_t stride_batch, stride_head, stride_token;
  Quantizer quantizer;
  CodePages pages;
  Grids grids;             // of subspaces of two dims
  SortedCentroids sorted;  // of one
  int batch, tokens, start;  // x holds the positions start .. start + tokens - 1; multiples of 16
  Dtype dtype;
};

// One side of an append.
struct AppendSide {
  const void* x;  // [B, Hkv, D], strides below
  int64_t stride_batch, stride_head;
  void* window;  // [B, Hkv, R, D]
  Quantizer quantizer;
  CodePages pages;
};

struct AppendParams {
  AppendSide keys, values;
  const int* lengths;  // [B], the new token included
  int batch, residual;
  Dtype dtype;
};

}  // namespace million
