// Encoding of one dim a subspace: centroids are sorted once, and a point finds its nearest by binary search.
//
// Exactness.  The result is that of the scan in encode.cuh, bit for bit: the lowest index at the least squared distance
// as fp32 computes it.  x - c is rounded, and so is its square, but both keep the order: along sorted centroids the
// computed distance falls (or stays) up to x and rises (or stays) beyond it.  So the least is at one of the two
// centroids beside x, and what equals it lies side by side around them.  Usually that is one centroid, as a look at
// its neighbour tells; else all of the run are visited.  Of equal centroids only the first is listed; the places that
// this leaves are at the end, with centroids of infinity and codes of 255.  A point with no finite distance gets 0.
//
// The search reads 8 words of a tree laid out by levels, [node][t], so that the lanes of four subspaces do not meet in
// the banks of shared memory and the first levels are without conflicts.
#pragma once

#include "encode.cuh"

#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

// Grid (Hc * M), 256 threads: centroids [Hc, M, 256, 1] -> `sorted`.
static __global__ void __launch_bounds__(kCentroids) sort_kernel(const float* __restrict__ centroids,
                                                                 SortedCentroids sorted) {
  __shared__ __align__(16) float values[kCentroids];
  const int thread = threadIdx.x;
  const int64_t first = int64_t(blockIdx.x) * kCentroids;
  float own = __ldg(centroids + first + thread);
  values[thread] = own;
  __syncthreads();
  // Runs through all centroids, four a load.
  const auto count = [&](auto counted) {
    int n = 0;
#pragma unroll 8
    for (int c = 0; c < kCentroids; c += 4) {
      const float4 four = *reinterpret_cast<const float4*>(values + c);
      n += counted(c, four.x) + counted(c + 1, four.y) + counted(c + 2, four.z) + counted(c + 3, four.w);
    }
    return n;
  };
  const bool repeated = count([&](int c, float value) { return value == own && c < thread; }) > 0;
  __syncthreads();
  if (repeated) values[thread] = own = INFINITY;
  __syncthreads();
  const int rank = count([&](int c, float value) { return value < own || (value == own && c < thread); });
  sorted.values[first + rank] = own;
  sorted.codes[first + rank] = uint8_t(repeated ? kCentroids - 1 : thread);
}

template <int D_, bool BF16_>
struct SortedEncode {
  static constexpr int D = D_, M = D_;
  static constexpr bool kBF16 = BF16_;
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kTiles = MILLION_SHARED_KIB >= 163 ? 4 : 2;  // of eight subspaces: a block's share
  static constexpr int kBlocks = D / 8 / kTiles;                    // that share a head's tokens
  static constexpr int kPiece = 4 * kTiles;                         // bytes a lane stores of every 16 tokens
  static constexpr int kWarpTokens = 32;                            // that a warp takes at a time
  static constexpr int kBlockTokens = kWarps * kWarpTokens;         // that a block takes at a time
  static constexpr int kMostTokens = 8 * kBlockTokens;              // and in all, at most
  // Subspaces of a block: 8 * i + 2 * t + j, i < kTiles, t < 4, j < 2; tables of t side by side.
  struct Table {
    float tree[kCentroids][4];    // node k has the children 2k and 2k + 1; node 0 is unused
    float values[kCentroids][4];  // ascending
    uint8_t codes[kCentroids][4];
  };
  struct Shared {
    Table tables[kTiles][2];
    SplitColumns<D, BF16_, kTiles> columns;
    uint32_t slots[kTiles][2][32];          // where in the image a lane's codes of tokens g and g + 8 go
    uint8_t image[kWarps][2][32 * kPiece];  // codes of two groups of 16 tokens
  };
  static_assert(sizeof(Shared) <= MILLION_SHARED_KIB * 1024, "the block does not fit");

  // Which lane's piece of a group holds the code of (token, s); a block's codes of a group are whole pieces.
  __host__ __device__ static int owner(Layout layout, int token, int s) {
    const int local = s % (8 * kTiles);
    switch (layout) {
      case Layout::kRow:
        return token * 2 + local / kPiece;
      case Layout::kTransposed:
        return (16 * local + token) / kPiece;
      case Layout::kFragmentKeys:
        return 4 * (token % 8) + s / 2 % 4;
      default:
        return 4 * (s / 2 % 8) + token % 8 / 2;
    }
  }

  // The first byte in a group of the piece of `lane` in block `part`: from one code that it holds.
  __host__ __device__ static int piece(Layout layout, int part, int lane) {
    int token, local;
    switch (layout) {
      case Layout::kRow:
        token = lane / 2, local = lane % 2 * kPiece;
        break;
      case Layout::kTransposed:
        token = lane * kPiece % 16, local = lane * kPiece / 16;
        break;
      case Layout::kFragmentKeys:
        token = lane / 4, local = lane % 4 * 2;
        break;
      default:
        token = lane % 4 * 2, local = lane / 4 * 2;
    }
    return group_position<D, M>(layout, token, part * 8 * kTiles + local) / kPiece * kPiece;
  }
};

// Centroids of one subspace, of lanes with the same t.
struct Sorted {
  const float* values;
  const uint8_t* codes;
  float x;

  __device__ __forceinline__ float distance(int i) const {
    const float difference = x - values[4 * i];
    return difference * difference;
  }
  // The code, `high` being the number of centroids up to x, at most 255.
  __device__ __forceinline__ int nearest(int high) const {
    const int low = max(high - 1, 0);
    const float below = distance(low), above = distance(high);
    const bool left = below < above;
    const float best = left ? below : above;
    const int beyond = left ? low - 1 : high + 1;
    const bool tied = (below == above && low != high) ||
                      (beyond >= 0 && beyond < kCentroids && distance(beyond) == best);
    int code = codes[4 * (left ? low : high)];
    if (tied) {
      for (int i = low; i >= 0 && distance(i) == best; --i) code = min(code, int(codes[4 * i]));
      for (int i = high; i < kCentroids && distance(i) == best; ++i) code = min(code, int(codes[4 * i]));
    }
    return best < INFINITY ? code : 0;
  }
};

// Grid (blocks of columns, chunks of `chunk` tokens, B * Hkv): blocks that read the same tokens run side by side.
template <class T>
__global__ void __launch_bounds__(T::kThreads) sorted_encode_kernel(const __grid_constant__ EncodeParams p, int chunk) {
  constexpr int D = T::D, M = T::M, kTiles = T::kTiles;
  extern __shared__ __align__(16) uint8_t memory[];
  typename T::Shared& shared = *reinterpret_cast<typename T::Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int b = blockIdx.z / p.pages.kv_heads, h = blockIdx.z % p.pages.kv_heads;
  const Layout layout = p.pages.layout;
  const bool rotated = p.quantizer.rotation != nullptr;
  const int first_tile = blockIdx.x * kTiles;
  {
    const int64_t first = (int64_t(p.quantizer.centroid_heads > 1 ? h : 0) * M + 8 * first_tile) * kCentroids;
    for (int k = threadIdx.x; k < 8 * kTiles * kCentroids; k += T::kThreads) {
      const int s = k / kCentroids, i = k % kCentroids, at = s % 8 / 2;
      typename T::Table& table = shared.tables[s / 8][s % 2];
      const float value = __ldcg(p.sorted.values + first + k);
      table.values[i][at] = value;
      table.codes[i][at] = __ldcg(p.sorted.codes + first + k);
      // i + 1 = odd * 2^zeros is at level 7 - zeros, the (odd / 2)-th.
      const int zeros = __ffs(i + 1) - 1;
      if (i < kCentroids - 1) table.tree[(kCentroids + i + 1) >> (zeros + 1)][at] = value;
    }
    if (threadIdx.x < 32)
      for (int i = 0; i < kTiles; ++i)
        for (int j = 0; j < 2; ++j) {
          uint32_t slots = 0;
          for (int half = 0; half < 2; ++half) {
            const int token = g + 8 * half, s = 8 * (first_tile + i) + 2 * t + j;
            const int inside = group_position<D, M>(layout, token, s) % T::kPiece;
            slots |= uint32_t(T::owner(layout, token, s) * T::kPiece + inside) << 16 * half;
          }
          shared.slots[i][j][lane] = slots;
        }
    if (rotated) shared.columns.load(rotation_of_head(p.quantizer, h, D), [=](int i) { return 8 * (first_tile + i); });
  }
  __syncthreads();

  const int piece = T::piece(layout, blockIdx.x, lane);
  const int end = min(int(blockIdx.y + 1) * chunk, p.tokens);
  for (int first = blockIdx.y * chunk + warp * T::kWarpTokens; first < end; first += T::kBlockTokens) {
    const EncodeRows rows(p, b, h, first);
    const int count = end - first;
    Rows<D> x[2];
    if (rotated) {
      x[0].load(rows.x, p.stride_token, count, rows.aligned);
      x[1].load(rows.x + 16 * p.stride_token, p.stride_token, count - 16, rows.aligned);
    }
#pragma unroll 1
    for (int i = 0; i < kTiles; ++i) {
      float point[4][2];  // tokens g, g + 8, g + 16, g + 24 of subspaces 8 * tile + 2 * t and the next
      if (rotated) {
        float sums[2][4];
        shared.columns.multiply(x, i, sums);
#pragma unroll
        for (int n = 0; n < 4; ++n) point[n][0] = sums[n / 2][n % 2 * 2], point[n][1] = sums[n / 2][n % 2 * 2 + 1];
      } else {
        const uint16_t* column = rows.x + 8 * (first_tile + i) + 2 * t;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t bits = 0;
          if (g + 8 * n < count) bits = __ldg(reinterpret_cast<const uint32_t*>(column + (g + 8 * n) * p.stride_token));
          const float2 both = unpack2(bits, T::kBF16 ? Dtype::kBFloat16 : Dtype::kHalf);
          point[n][0] = both.x, point[n][1] = both.y;
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const typename T::Table& table = shared.tables[i][j];
        const float* tree = &table.tree[0][t];
        int node[4] = {1, 1, 1, 1};
#pragma unroll
        for (int level = 0; level < 8; ++level)
#pragma unroll
          for (int n = 0; n < 4; ++n) node[n] = 2 * node[n] + (tree[4 * node[n]] <= point[n][j]);
        const uint32_t slots = shared.slots[i][j][lane];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const Sorted sorted = {&table.values[0][t], &table.codes[0][t], point[n][j]};
          const int code = sorted.nearest(node[n] - kCentroids);
          shared.image[warp][n / 2][n % 2 ? slots >> 16 : slots & 0xffff] = uint8_t(code);
        }
      }
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (16 * m >= count) break;
      uint8_t* out = group_chunk(p.pages, b, h, p.start + first + 16 * m, M, piece / 16) + piece % 16;
      const uint8_t* codes = shared.image[warp][m] + lane * T::kPiece;
      if constexpr (T::kPiece == 16) *reinterpret_cast<uint4*>(out) = *reinterpret_cast<const uint4*>(codes);
      else *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(codes);
    }
    __syncwarp();
  }
}

}  // namespace million
