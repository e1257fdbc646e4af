// Launch of one instantiation; instances/*.cu include this and name the shapes.
#pragma once

#include "decode_paged.cuh"
#include "launch.h"

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

// Warps and ring depth (0: codes go into registers); registers bound the warps, shared memory the ring.
template <int D, int HG>
struct Tile {
  static constexpr int kWarps = HG == 1 ? 16 : 8;
  static constexpr int kStages = HG == 1 ? 0 : MILLION_SHARED_KIB >= 227 ? 4 : 2;
};

template <int D, int MK, int MV, int HG>
cudaError_t paged_decode(const PagedDecodeParams& params, int blocks, cudaStream_t stream) {
  using T = PagedDecode<D, MK, MV, HG, Tile<D, HG>::kWarps, Tile<D, HG>::kStages>;
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
