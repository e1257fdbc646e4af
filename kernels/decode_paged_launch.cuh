// Launch of one instantiation; instances/*.cu include this and name the shapes.
#pragma once

#include "decode_paged.cuh"
#include "launch.h"

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

// Warps and ring depth: registers bound the warps, shared memory the ring.
template <int D, int HG>
struct Tile {
  static constexpr bool kLarge = MILLION_SHARED_KIB >= 227;
  static constexpr int kWarps = HG == 1 ? (kLarge ? 16 : 8) : (kLarge ? 12 : 4);
  static constexpr int kStages = HG == 1 && !kLarge ? 2 : 3;
};

template <int D, int MK, int MV, int HG>
cudaError_t paged_decode(const PagedDecodeParams& params, int blocks, cudaStream_t stream) {
  using T = PagedDecode<D, MK, MV, HG, Tile<D, HG>::kWarps, Tile<D, HG>::kStages>;
  static_assert(MILLION_SHARED_KIB < 163 || T::kSharedBytes <= MILLION_SHARED_KIB * 1024, "the tile does not fit");
  if constexpr (T::kSharedBytes > MILLION_SHARED_KIB * 1024) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = paged_decode_kernel<T>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
    if (error != cudaSuccess) return error;
    cudaLaunchAttribute early;  // starts while the kernel ahead drains; ignored before compute capability 9.0
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = MILLION_SHARED_KIB >= 227;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(T::kThreads);
    config.dynamicSmemBytes = T::kSharedBytes;
    config.stream = stream;
    config.attrs = &early;
    config.numAttrs = 1;
    return cudaLaunchKernelEx(&config, kernel, params);
  }
}

}  // namespace million

#define MILLION_INSTANTIATE_DECODE(D, MK, MV, HG) \
  template cudaError_t million::paged_decode<D, MK, MV, HG>(const PagedDecodeParams&, int, cudaStream_t);
