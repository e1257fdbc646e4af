// The grids of encode_grid.cuh in memory: known to the host too.
#pragma once

#include <vector_types.h>

namespace million {

constexpr int kSide = 32, kCells = kSide * kSide;  // cells of a subspace's plane
constexpr int kListed = 8;                         // candidates of a cell, a byte each

struct GridFrame {
  float2 origin, inverse;  // the centre of cell (0, 0); cells per unit
};

constexpr int kGridBytes = sizeof(GridFrame) + kCells * kListed;  // of one subspace

// Candidates by cell, for the subspaces of a quantizer.
struct Grids {
  uint2* lists;       // [Hc, M / 4, cells, 4], or null: scan all centroids
  GridFrame* frames;  // [Hc, M]
};

}  // namespace million
