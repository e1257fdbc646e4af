// Launch of one instantiation; instances/*.cu include this and name the shapes.
#pragma once

#include "decode_paged.cuh"
#include "launch.h"

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

// Warps and ring depth: registers bound the warps (see results/LOG.md), shared memory the ring.
template <int D, int MK, int MV, int HG>
struct Tile {
  static constexpr int kWarps = HG == 1 ? (MILLION_SHARED_KIB >= 227 ? 16 : 8) : 8;
  static constexpr int kStages = MILLION_SHARED_KIB >= 227 ? (HG == 1 ? 3 : 4) : (D == 128 ? 2 : 3);
};

template <int D, int MK, int MV, int HG>
cudaError_t paged_decode(const PagedDecodeParams& params, int blocks, cudaStream_t stream) {
  using T = PagedDecode<D, MK, MV, HG, Tile<D, MK, MV, HG>::kWarps, Tile<D, MK, MV, HG>::kStages>;
  if constexpr (T::kSharedBytes > MILLION_SHARED_KIB * 1024) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = paged_decode_kernel<T>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
    if (error != cudaSuccess) return error;
    kernel<<<blocks, T::kThreads, T::kSharedBytes, stream>>>(params);
    return cudaGetLastError();
  }
}

}  // namespace million

#define MILLION_INSTANTIATE_DECODE(D, MK, MV, HG) \
  template cudaError_t million::paged_decode<D, MK, MV, HG>(const PagedDecodeParams&, int, cudaStream_t);
