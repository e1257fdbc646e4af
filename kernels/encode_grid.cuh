// Encoding of two dims a subspace through a grid: the plane of a subspace is cut into cells, each with the list of the
// centroids that can be the nearest of some point in it, and a point is compared to those of its cell only.
//
// Exactness.  The result is that of the scan in encode.cuh, bit for bit: the lowest index at the least squared distance
// as fp32 computes it.  A centroid c is left out of a cell's list only if another, c', is nearer to *every* point of
// the cell by more than all rounding.  |x - c|^2 - |x - c'|^2 is linear in x, so over a box with centre m and half
// sides hx, hy, with q = c - m, its least value is
//     |q|^2 - |q'|^2 - 2 hx |qx - q'x| - 2 hy |qy - q'y|,
// which must exceed 2^-19 (|q|^2 + |qx| Sx + |qy| Sy + hx^2 + hy^2) for q and for q' (S = |m| + h): twice a bound of
// the errors of q, of these sums, and of the distances that the lookup computes (relative 2^-22).  Cells are widened by
// 2^-9 of their size against the rounding of a point's cell number.  Of equal centroids only the first is listed.
//
// The 32 x 32 cells lie between the 9th and the 248th of the centroids' coordinates on each axis, plus a twentieth;
// cells at the border reach 64 cells further out.  Points beyond, and points in cells with more than 8 candidates, are
// scanned, by the 32 lanes of a warp together.  For keys and values of a 5M-parameter model, with and without rotation,
// lists that are met hold 2.7 to 3.6 candidates (4.6 for samples of Student's t with 4 degrees of freedom), the longest
// of 32 holds 4 to 6, and no point is scanned.
//
// Cost.  Building takes ~1000 instructions a cell, with divergence ~0.3 ms on an H200 for keys and values of 32 heads.
// A lookup is bound by shared memory: 32 lanes take ~2.7 passes for every half of a warp that reads 8 bytes at random,
// so ~40 passes for the list and 5 to 6 candidates (the most among 32 lanes), and 10 more for the operands of the
// rotation.  134M points (32K tokens, 32 heads, 64 subspaces, keys and values) then take 0.9 ms.
#pragma once

#include "encode.cuh"

#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

constexpr int kCoarse = 8, kFine = kSide / kCoarse;  // a coarse cell is 4 x 4 cells
constexpr float kReach = 64.f;                       // cells that the border cells extend outwards

// A list is ascending and repeats its last candidate up to kListed, so it cannot begin with 255, 0.
constexpr uint2 kTooMany = {0x000000ff, 0};

// A box of cells along one axis: centre and half side relative to the frame's origin; centre without the extension.
struct Span {
  float middle, half, core;
  __device__ Span(int first, int last, float cell) {
    const float low = first == 0 ? -0.5f - kReach : first - 0.5f;
    const float high = last == kSide - 1 ? kSide - 0.5f + kReach : last + 0.5f;
    middle = 0.5f * (low + high) * cell;
    half = (0.5f * (high - low) + 0x1p-9f) * cell;
    core = 0.5f * (first + last) * cell;
  }
};

// One centroid seen from a box.
struct Seen {
  float2 q;
  float least, most;  // |q|^2 less or more all that rounding can do
};

struct Box {
  Span x, y;
  __device__ Seen see(float2 c) const {
    Seen seen;
    seen.q = make_float2(c.x - x.middle, c.y - y.middle);
    const float square = fmaf(seen.q.y, seen.q.y, seen.q.x * seen.q.x);
    const float spread = fabsf(seen.q.x) * (fabsf(x.middle) + x.half) + fabsf(seen.q.y) * (fabsf(y.middle) + y.half);
    // The last term stands above the rounding of denormal numbers.
    const float slack = fmaf(0x1p-19f, square + spread + x.half * x.half + y.half * y.half, 1e-42f);
    seen.least = square - slack, seen.most = square + slack;
    return seen;
  }
  // Whether `other` is nearer than `one` to all points of the box.
  __device__ bool beats(const Seen& other, const Seen& one) const {
    const float reach = x.half * fabsf(one.q.x - other.q.x) + y.half * fabsf(one.q.y - other.q.y);
    return one.least - other.most > (2.f + 0x1p-18f) * reach;
  }
  __device__ float from_core(float2 c) const {
    const float dx = c.x - x.core, dy = c.y - y.core;
    return fmaf(dy, dy, dx * dx);
  }
};

constexpr int kGridThreads = 256;
constexpr int kKept = 24;  // candidates of a cell between the two prunings

// Grid (Hc * M): the lists of one subspace.  centroids [Hc, M, 256, 2].
template <int M>
__global__ void __launch_bounds__(kGridThreads) grid_kernel(const float* __restrict__ centroids, Grids grids) {
  static_assert(kGridThreads == kCentroids, "a thread for each centroid");
  constexpr int kRank = 8;
  __shared__ float2 points[kCentroids];
  __shared__ uint32_t repeats[kCentroids / 32];  // bit: a lower index has the same centroid
  __shared__ float bounds[2][4];                 // of an axis: least, 9th, 248th, largest coordinate
  __shared__ uint8_t coarse[kCoarse * kCoarse][kCentroids];
  __shared__ int coarse_count[kCoarse * kCoarse];
  __shared__ uint8_t kept[kKept][kGridThreads];
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  points[thread] = __ldg(reinterpret_cast<const float2*>(centroids) + int64_t(blockIdx.x) * kCentroids + thread);
  __syncthreads();
  {
    const float2 own = points[thread];
    int rank_x = 0, rank_y = 0;
    bool repeated = false;
#pragma unroll 8
    for (int c = 0; c < kCentroids; ++c) {
      const float2 other = points[c];
      const bool before = c < thread;
      rank_x += other.x < own.x || (other.x == own.x && before);
      rank_y += other.y < own.y || (other.y == own.y && before);
      repeated |= other.x == own.x && other.y == own.y && before;
    }
    constexpr int kRanks[4] = {0, kRank, kCentroids - 1 - kRank, kCentroids - 1};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (rank_x == kRanks[k]) bounds[0][k] = own.x;
      if (rank_y == kRanks[k]) bounds[1][k] = own.y;
    }
    const uint32_t ballot = __ballot_sync(0xffffffffu, repeated);
    if (lane == 0) repeats[warp] = ballot;
  }
  __syncthreads();
  // Every thread computes the same frame.  An axis without extent takes what it has, then the other's.
  float low[2], width[2];
#pragma unroll
  for (int axis = 0; axis < 2; ++axis) {
    low[axis] = bounds[axis][1], width[axis] = bounds[axis][2] - bounds[axis][1];
    if (!(width[axis] > 0.f)) low[axis] = bounds[axis][0], width[axis] = bounds[axis][3] - bounds[axis][0];
  }
  if (!(width[0] > 0.f)) width[0] = width[1] > 0.f ? width[1] : 1.f;
  if (!(width[1] > 0.f)) width[1] = width[0];
  const float2 cell = make_float2(width[0] * (1.1f / kSide), width[1] * (1.1f / kSide));
  const float2 origin =
      make_float2(low[0] - 0.05f * width[0] + 0.5f * cell.x, low[1] - 0.05f * width[1] + 0.5f * cell.y);
  if (thread == 0) grids.frames[blockIdx.x] = {origin, make_float2(1.f / cell.x, 1.f / cell.y)};
  points[thread].x -= origin.x, points[thread].y -= origin.y;
  __syncthreads();

  // Coarse cells: a warp each, eight centroids a lane.  What the centroid nearest to the middle beats is dropped.
  for (int big = warp; big < kCoarse * kCoarse; big += kGridThreads / 32) {
    const int X = big % kCoarse * kFine, Y = big / kCoarse * kFine;
    const Box box{Span(X, X + kFine - 1, cell.x), Span(Y, Y + kFine - 1, cell.y)};
    uint32_t distance = 0xffffffffu;
    int nearest = 0;
#pragma unroll
    for (int k = 0; k < kCentroids / 32; ++k) {
      const uint32_t bits = __float_as_uint(box.from_core(points[32 * k + lane]));
      if (bits < distance) distance = bits, nearest = 32 * k + lane;
    }
    const uint32_t least = __reduce_min_sync(0xffffffffu, distance);
    nearest = __reduce_min_sync(0xffffffffu, distance == least ? uint32_t(nearest) : uint32_t(kCentroids - 1));
    const Seen best = box.see(points[nearest]);
    int count = 0;
    for (int k = 0; k < kCentroids / 32; ++k) {
      const bool stays = !box.beats(best, box.see(points[32 * k + lane])) && !(repeats[k] >> lane & 1);
      const uint32_t ballot = __ballot_sync(0xffffffffu, stays);
      if (stays) coarse[big][count + __popc(ballot & ((1u << lane) - 1))] = uint8_t(32 * k + lane);
      count += __popc(ballot);
    }
    if (lane == 0) coarse_count[big] = count;
  }
  __syncthreads();

  // Cells: a thread each, from the list of the coarse cell; sixteen neighbours share it.
  const int head = blockIdx.x / M, s = blockIdx.x % M;
  uint2* lists = grids.lists + (int64_t(head) * (M / 4) + s / 4) * kCells * 4 + s % 4;
  for (int i = thread; i < kCells; i += kGridThreads) {
    const int big = i / (kFine * kFine), small = i % (kFine * kFine);
    const int X = big % kCoarse * kFine + small % kFine, Y = big / kCoarse * kFine + small / kFine;
    const Box box{Span(X, X, cell.x), Span(Y, Y, cell.y)};
    const int n = coarse_count[big];
    float distance = INFINITY;
    int nearest = n ? coarse[big][0] : 0;
    for (int k = 0; k < n; ++k) {
      const int c = coarse[big][k];
      const float found = box.from_core(points[c]);
      if (found < distance) distance = found, nearest = c;
    }
    const Seen best = box.see(points[nearest]);
    int count = 0;
    for (int k = 0; k < n && count <= kKept; ++k) {
      const int c = coarse[big][k];
      if (box.beats(best, box.see(points[c]))) continue;
      if (count < kKept) kept[count][thread] = uint8_t(c);
      ++count;
    }
    uint32_t words[2] = {0, 0};
    int listed = count <= kKept ? 0 : kListed + 1;
    int last = 0;
    for (int k = 0; k < count && listed <= kListed; ++k) {
      const int c = kept[k][thread];
      const Seen one = box.see(points[c]);
      bool beaten = false;
      for (int other = 0; other < count && !beaten; ++other)
        beaten = box.beats(box.see(points[kept[other][thread]]), one);
      if (beaten) continue;
      if (listed < 4) words[0] |= uint32_t(c) << 8 * listed;
      else if (listed < kListed) words[1] |= uint32_t(c) << 8 * (listed - 4);
      last = c;
      ++listed;
    }
    for (int k = listed; k < kListed; ++k) {
      if (k < 4) words[0] |= uint32_t(last) << 8 * k;
      else words[1] |= uint32_t(last) << 8 * (k - 4);
    }
    lists[(Y * kSide + X) * 4] = listed >= 1 && listed <= kListed ? make_uint2(words[0], words[1]) : kTooMany;
  }
}

template <int D_, int M_, bool BF16_>
struct GridEncode {
  static constexpr int D = D_, M = M_;
  static constexpr bool kBF16 = BF16_;
  static_assert(D == 2 * M, "a grid lies in a plane");
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kTiles = MILLION_SHARED_KIB >= 227 ? 4 : 2;  // of eight dims: a block's share of the columns
  static constexpr int kBlocks = D / 8 / kTiles;                    // that share a head's tokens
  static constexpr int kPiece = 2 * kTiles;                         // bytes a lane stores of every 16 tokens
  static constexpr int kWarpTokens = 32;                            // that a warp takes at a time
  static constexpr int kBlockTokens = kWarps * kWarpTokens;         // that a block takes at a time
  static constexpr int kMostTokens = 8 * kBlockTokens;              // and in all, at most
  struct Shared {
    uint2 lists[kTiles][kCells][4];
    float2 centroids[kTiles][kCentroids][4];
    SplitColumns<D, BF16_, kTiles> columns;
    GridFrame frames[kTiles][4];
    uint32_t slots[kTiles][32];           // where in the image a lane's codes of tokens g and g + 8 go
    uint8_t image[kWarps][2][32 * kPiece];  // codes of two groups of 16 tokens
  };
  static_assert(sizeof(Shared) <= MILLION_SHARED_KIB * 1024, "the block does not fit");

  // Tile i of block `part`.  Fragment order of keys pairs units M / 8 apart in a lane's bytes, so a block takes both.
  __host__ __device__ static int tile(Layout layout, int part, int i) {
    if (layout != Layout::kFragmentKeys) return part * kTiles + i;
    return part * (kTiles / 2) + i % (kTiles / 2) + i / (kTiles / 2) * (M / 8);
  }

  // Which lane's piece of a group holds the code of (token, s), s being of tile i of block `part`.
  __host__ __device__ static int owner(Layout layout, int token, int s, int i) {
    switch (layout) {
      case Layout::kRow:
        return token * 2 + (4 * i + s % 4) / kPiece;
      case Layout::kTransposed:
        return (16 * (4 * i + s % 4) + token) / kPiece;
      case Layout::kFragmentKeys:
        return 4 * (token % 8) + s % 4;
      default:
        return 4 * (s % 8) + token % 8 / 2;
    }
  }

  // The first byte in a group of the piece of `lane`: from one code that it holds.
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
        token = lane / 4, local = lane % 4;
        break;
      default:
        token = lane % 4 * 2, local = lane / 4;
    }
    const int s = 4 * tile(layout, part, local / 4) + local % 4;
    return group_position<D, M>(layout, token, s) / kPiece * kPiece;
  }
};

struct Found {
  float distance;
  uint32_t at;  // 32 * index
};

// Candidates FIRST .. FIRST + COUNT - 1 of a list; `centroids` are those of the lane's subspace, 32 bytes apart.
template <int FIRST, int COUNT>
__device__ __forceinline__ void compare(uint2 list, float2 x, const uint8_t* centroids, Found& best) {
#pragma unroll
  for (int k = FIRST; k < FIRST + COUNT; ++k) {
    const uint32_t word = k < 4 ? list.x : list.y;
    const uint32_t at = (k % 4 == 0 ? word << 5 : word >> (8 * (k % 4) - 5)) & 0x1fe0;
    const float2 c = *reinterpret_cast<const float2*>(centroids + at);
    const float dx = x.x - c.x, dy = x.y - c.y;
    const float distance = fmaf(dy, dy, dx * dx);
    if (k == 0 || distance < best.distance) best = {distance, at};
  }
}

// The scan of all centroids for one point, which all lanes of the warp hold.
__device__ __forceinline__ int scan_together(float2 x, const float2 (*centroids)[4], int t) {
  float best = INFINITY;
  int code = 0;
#pragma unroll
  for (int k = 0; k < kCentroids / 32; ++k) {
    const float2 c = centroids[32 * k + threadIdx.x % 32][t];
    const float dx = x.x - c.x, dy = x.y - c.y;
    const float distance = fmaf(dy, dy, dx * dx);
    if (distance < best) best = distance, code = 32 * k + threadIdx.x % 32;
  }
  const uint32_t bits = __float_as_uint(best), least = __reduce_min_sync(0xffffffffu, bits);
  return __reduce_min_sync(0xffffffffu, bits == least ? code : kCentroids - 1);
}

// Grid (blocks of columns, chunks of `chunk` tokens, B * Hkv): blocks that read the same tokens run side by side.
template <class T>
__global__ void __launch_bounds__(T::kThreads) grid_encode_kernel(const __grid_constant__ EncodeParams p, int chunk) {
  constexpr int D = T::D, M = T::M, kTiles = T::kTiles;
  extern __shared__ __align__(16) uint8_t memory[];
  typename T::Shared& shared = *reinterpret_cast<typename T::Shared*>(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int b = blockIdx.z / p.pages.kv_heads, h = blockIdx.z % p.pages.kv_heads;
  const Layout layout = p.pages.layout;
  const bool rotated = p.quantizer.rotation != nullptr;
  const auto tile_of = [=](int i) { return T::tile(layout, blockIdx.x, i); };
  {
    const int set = p.quantizer.centroid_heads > 1 ? h : 0;
    for (int i = 0; i < kTiles; ++i) {
      const int64_t tile = int64_t(set) * (M / 4) + tile_of(i);
      const uint4* lists = reinterpret_cast<const uint4*>(p.grids.lists + tile * kCells * 4);
      for (int k = threadIdx.x; k < kCells * 2; k += T::kThreads)
        cp_async<16>(reinterpret_cast<uint4*>(shared.lists[i]) + k, lists + k);
      const float2* centroids = reinterpret_cast<const float2*>(p.quantizer.centroids) + tile * kCentroids * 4;
      for (int k = threadIdx.x; k < kCentroids * 4; k += T::kThreads)
        shared.centroids[i][k % kCentroids][k / kCentroids] = __ldg(centroids + k);
      if (threadIdx.x < 4) shared.frames[i][threadIdx.x] = p.grids.frames[tile * 4 + threadIdx.x];
      if (threadIdx.x < 32) {
        uint32_t slots = 0;
        for (int half = 0; half < 2; ++half) {
          const int token = g + 8 * half, s = 4 * tile_of(i) + t;
          const int inside = group_position<D, M>(layout, token, s) % T::kPiece;
          slots |= uint32_t(T::owner(layout, token, s, i) * T::kPiece + inside) << 16 * half;
        }
        shared.slots[i][lane] = slots;
      }
    }
    cp_async_commit();
    if (rotated)
      shared.columns.load(rotation_of_head(p.quantizer, h, D), [=](int i) { return 8 * tile_of(i); });
    cp_async_wait<0>();
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
      float2 point[4];  // tokens g, g + 8, g + 16, g + 24 of subspace 4 * tile + t
      if (rotated) {
        float sums[2][4];
        shared.columns.multiply(x, i, sums);
#pragma unroll
        for (int n = 0; n < 4; ++n) point[n] = make_float2(sums[n / 2][n % 2 * 2], sums[n / 2][n % 2 * 2 + 1]);
      } else {
        const uint16_t* column = rows.x + 8 * tile_of(i) + 2 * t;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          uint32_t bits = 0;
          if (g + 8 * n < count) bits = __ldg(reinterpret_cast<const uint32_t*>(column + (g + 8 * n) * p.stride_token));
          point[n] = unpack2(bits, T::kBF16 ? Dtype::kBFloat16 : Dtype::kHalf);
        }
      }
      const GridFrame frame = shared.frames[i][t];
      const uint8_t* centroids = reinterpret_cast<const uint8_t*>(&shared.centroids[i][0][t]);
      uint2 list[4];
      uint32_t scanned = 0;  // bit n: point n needs the scan
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float ux = (point[n].x - frame.origin.x) * frame.inverse.x;
        const float uy = (point[n].y - frame.origin.y) * frame.inverse.y;
        constexpr float kMiddle = 0.5f * (kSide - 1), kLimit = 0.5f * kSide + kReach;
        // The nearest whole number, from the bits of a sum with 1.5 * 2^23.
        const int X = __float_as_int(fminf(fmaxf(ux, 0.f), kSide - 1.f) + 0x1.8p23f) & (kSide - 1);
        const int Y = __float_as_int(fminf(fmaxf(uy, 0.f), kSide - 1.f) + 0x1.8p23f) & (kSide - 1);
        list[n] = shared.lists[i][Y * kSide + X][t];
        const bool inside = fabsf(ux - kMiddle) < kLimit && fabsf(uy - kMiddle) < kLimit;
        if (!inside || (list[n].x & 0xffff) == kTooMany.x) scanned |= 1u << n;
      }
      uint32_t codes[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        Found best;
        compare<0, 4>(list[n], point[n], centroids, best);
        // Lists ascend until their last candidate repeats.
        if (__any_sync(0xffffffffu, (list[n].y & 255) > list[n].x >> 24)) {
          compare<4, 2>(list[n], point[n], centroids, best);
          if (__any_sync(0xffffffffu, (list[n].y >> 16 & 255) > (list[n].y >> 8 & 255)))
            compare<6, 2>(list[n], point[n], centroids, best);
        }
        codes[n] = best.at >> 5;
      }
      if (__any_sync(0xffffffffu, scanned)) {
#pragma unroll
        for (int n = 0; n < 4; ++n)
          for (uint32_t left = __ballot_sync(0xffffffffu, scanned >> n & 1); left; left &= left - 1) {
            const int source = __ffs(left) - 1;
            const float2 one = make_float2(__shfl_sync(0xffffffffu, point[n].x, source),
                                           __shfl_sync(0xffffffffu, point[n].y, source));
            const int code = scan_together(one, shared.centroids[i], source % 4);
            if (lane == source) codes[n] = code;
          }
      }
      const uint32_t slots = shared.slots[i][lane];
      shared.image[warp][0][slots & 0xffff] = uint8_t(codes[0]);
      shared.image[warp][0][slots >> 16] = uint8_t(codes[1]);
      shared.image[warp][1][slots & 0xffff] = uint8_t(codes[2]);
      shared.image[warp][1][slots >> 16] = uint8_t(codes[3]);
    }
    __syncwarp();
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      if (16 * m >= count) break;
      uint8_t* out = group_chunk(p.pages, b, h, p.start + first + 16 * m, M, piece / 16) + piece % 16;
      const uint8_t* codes = shared.image[warp][m] + lane * T::kPiece;
      if constexpr (T::kPiece == 8) *reinterpret_cast<uint2*>(out) = *reinterpret_cast<const uint2*>(codes);
      else *reinterpret_cast<uint32_t*>(out) = *reinterpret_cast<const uint32_t*>(codes);
    }
    __syncwarp();
  }
}

}  // namespace million
