// What one launch of the query mapping reads and writes.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace million {

// Keys are coded relative to the origin of their block of `every` positions (million_cli/pq/rebase.py) and then mapped.
// So a query has a form for each block: turned back by the angle of its origin, then times the map.
struct QueryParams {
  const void* q;          // [B, Hq, D]
  const float* map;       // [Hr, D, D] (q R), or null
  const float2* angles;   // [origins, pairs] cosine and sine of each origin's angle, or null: one origin, at 0
  const int* lengths;     // [B] tokens: origins past them are left out
  float* out;             // [B, Hq, origins, D]
  int batch, kv_heads, group, map_heads, origins, pairs, every;
  bool neighbours;        // pairs of dims (2 i, 2 i + 1) instead of (i, i + pairs)
  Dtype dtype;
};

constexpr int kNeverRebased = 1 << 30;  // positions of a block where there is one only

}  // namespace million
