// The block of the paged decode: how tables of centroids and codes come into shared memory, and the order of its work.
//
// Codes pass through a ring in shared memory, a warp's own; what is done with them is in decode_walk.cuh.
#pragma once

#include "decode_walk.cuh"

namespace million {

template <class T>
struct MmaBlock : MmaWalk<T> {
  using Base = MmaWalk<T>;
  using Base::g, Base::lane, Base::p, Base::scratch, Base::t, Base::tables, Base::warp;
  using Base::accumulate, Base::load_operand, Base::score, Base::soften, Base::store_rows;
  using Base::kColumns, Base::kKeyOffsets, Base::kMine, Base::kValueOffsets;
  using typename Base::Walk;
  static constexpr int D = T::D, HG = T::HG;
  using K = typename T::K;
  using V = typename T::V;

  struct Shared {
    uint8_t tables[T::kTableBytes];
    uint8_t ring[T::WARPS][T::kRingBytes];
    BlockState<D, HG, T::WARPS> state;
    uint64_t barrier;  // of the copy engine
  };

  uint64_t* barrier;
  uint8_t* ring;        // of the warp
  uint32_t parity = 0;  // of the barrier's next completion

  __device__ MmaBlock(const PagedDecodeParams& params, Shared& shared) : Base(params, shared.state) {
    tables = shared.tables;
    barrier = &shared.barrier;
    ring = shared.ring[warp];
    scratch = {reinterpret_cast<float*>(shared.ring[0] + T::kVector), T::kRingBytes / 4};
    if constexpr (kBulk) {
      if (threadIdx.x == 0) mbarrier_init(barrier);
      __syncthreads();
    }
  }

  // The tables of KV head h, by the copy engine where there is one and rows are contiguous.
  static constexpr bool kBulk = D == 128 && kCopyEngine;

  __device__ void load_tables(int h) {
    const int64_t size = int64_t(kCentroids) * D;
    const __half* keys = p.key_table + (p.key_table_heads > 1 ? h : 0) * size;
    const __half* values = p.value_table + (p.value_table_heads > 1 ? h : 0) * size;
    if constexpr (kBulk) {
      if (threadIdx.x == 0) {
        mbarrier_expect(barrier, T::kTableBytes);
        bulk_copy(tables, keys, T::kValueTable, barrier);
        bulk_copy(tables + T::kValueTable, values, T::kValueTable, barrier);
      }
    } else {
      copy_table(keys, 0);
      copy_table(values, T::kValueTable);
      cp_async_commit();
    }
  }
  // For all threads; then those who wait with others may read.
  __device__ void wait_for_tables() {
    if constexpr (kBulk) mbarrier_wait(barrier, parity);
    else cp_async_wait<0>();
  }
  __device__ void copy_table(const __half* source, int offset) {
    constexpr int kPieces = 2 * D / 16;  // 16-byte pieces of a row
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(source);
    for (int i = threadIdx.x; i < kCentroids * kPieces; i += T::kThreads)
      cp_async<16>(tables + offset + (i / kPieces) * T::kRow + (i % kPieces) * 16, bytes + i * 16);
  }

  // One span of a set: coded groups first .. last - 1 of KV head h and this block's share of the window.
  __device__ void attend(const Sequence& s, int b, int h, int set, int first, int last, int index, int blocks,
                         bool needs_tables, float* partial) {
    const int rounds = __reduce_max_sync(kFull, max(0, (last - first - warp + T::WARPS - 1) / T::WARPS));
    Cursor<T::WARPS> cursor(p, b, h, first + warp, rounds > 0);
    typename Base::Loads loads;
    const typename Base::WindowShare share = this->window_share(s, index, blocks);
    this->load(loads, s, b, h, set, share);
    if (needs_tables) {
      wait_for_tables();
      __syncthreads();  // nobody writes or reads the old ones
      parity ^= 1;
      load_tables(h);
    }
    int write = 0;
    auto ask = [&](int round) {  // that group into the ring
      if (round < rounds) {
        const uint32_t place = cursor.place(p);
        copy_group<K::kGroupBytes>(ring + write, p.key_pool, place);
        copy_group<V::kGroupBytes>(ring + write + K::kGroupBytes, p.value_pool, place);
        cursor.next(p, round + 1 < rounds);
      }
      cp_async_commit();
      write = write == T::kVector ? 0 : write + T::kStageBytes;
    };
#pragma unroll
    for (int i = 0; i < T::STAGES - 1; ++i) ask(i);
    this->prepare_queries(loads, h, scratch);
    this->window(loads, s, b, h, share, scratch);
    if constexpr (kBulk) wait_for_tables();
    else cp_async_wait<T::STAGES - 1>();
    __syncthreads();

    Walk walk;
    load_operand(walk);
    const RowOffsets<kKeyOffsets> key_offsets([&](int x) { return K::kEntryBytes * K::entry(x, g, t); });
    const RowOffsets<kValueOffsets> value_offsets([&](int x) { return V::kEntryBytes * V::entry(x, g, t); });
#pragma unroll
    for (int i = 0; i < T::kSums; ++i) walk.sums[i][0] = walk.sums[i][1] = walk.sums[i][2] = walk.sums[i][3] = 0.f;
    int token = (first + warp) * kGroupTokens;

    // Scores of a group and values of the one before are independent, which hides their latencies.
    uint32_t value_codes[V::kLaneBytes / 4] = {};
    uint32_t probabilities[kMine] = {};
    int read = 0;
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
      cp_async_wait<T::STAGES - 2>();
      if constexpr (T::STAGES == 2) ask(round + 1);  // whose place was read in the round before
      uint32_t key_codes[K::kLaneBytes / 4];
      load_codes<K>(key_codes, ring + read);
      float scores[kColumns][4];
      score(scores, key_codes, walk, key_offsets);
      accumulate(walk, value_codes, probabilities, value_offsets);
      load_codes<V>(value_codes, ring + read + K::kGroupBytes);
      read = read == T::kVector ? 0 : read + T::kStageBytes;
      if constexpr (T::STAGES > 2) ask(round + T::STAGES - 1);
      soften(probabilities, scores, walk, token, s.first_valid);
      token += T::WARPS * kGroupTokens;
    }
    if (rounds > 0) accumulate(walk, value_codes, probabilities, value_offsets);
    cp_async_wait<0>();
    __syncwarp();  // the ring becomes the warp's row
    store_rows(walk);
    this->combine(partial, scratch);
  }

  // One group of codes, by the warp: each lane the chunks that it will read.  32 bits count 32 GiB of a pool.
  template <int BYTES>
  __device__ __forceinline__ void copy_group(uint8_t* stage, const uint8_t* pool, uint32_t group) const {
    constexpr int kPiece = BYTES < 512 ? BYTES / 32 : 16, kPieces = BYTES / kPiece;
#pragma unroll
    for (int c = 0; c < kPieces; c += 32)
      cp_async<kPiece>(stage + (c + lane) * kPiece, pool + uint64_t(group * kPieces + c + lane) * kPiece);
  }

  template <class Order>
  __device__ __forceinline__ void load_codes(uint32_t (&codes)[Order::kLaneBytes / 4], const uint8_t* stage) const {
    if constexpr (Order::kChunk == 16) {
#pragma unroll
      for (int c = 0; c < Order::kChunks; ++c) {
        const uint4 piece = *reinterpret_cast<const uint4*>(stage + (c * 32 + lane) * 16);
        codes[4 * c] = piece.x, codes[4 * c + 1] = piece.y, codes[4 * c + 2] = piece.z, codes[4 * c + 3] = piece.w;
      }
    } else if constexpr (Order::kChunk == 8) {
      const uint2 piece = *reinterpret_cast<const uint2*>(stage + lane * 8);
      codes[0] = piece.x, codes[1] = piece.y;
    } else {
      codes[0] = *reinterpret_cast<const uint32_t*>(stage + lane * 4);
    }
  }

};

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1) mma_decode_kernel(const __grid_constant__ PagedDecodeParams p) {
  extern __shared__ __align__(128) uint8_t shared[];
  using Block = MmaBlock<T>;
  Block block(p, *reinterpret_cast<typename Block::Shared*>(shared));
  wait_for_previous_launch();
  decode_spans<T>(p, block);
}

}  // namespace million
