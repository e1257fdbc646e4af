// Launch of one instantiation; instances/*.cu include this and name the shapes.
#pragma once

#include "decode_mma.cuh"
#include "launch.h"
#include "merge.cuh"

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

inline cudaError_t launch_early(void (*kernel)(PagedDecodeParams), int blocks, int threads, int shared_bytes,
                                const PagedDecodeParams& params, cudaStream_t stream) {
  cudaLaunchAttribute early;  // starts while the kernel ahead drains; ignored before compute capability 9.0
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = MILLION_SHARED_KIB >= 227;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Warps and ring depth: registers bound the warps, shared memory the ring.  What does not fit gets a ring of two
// stages, then fewer warps.
template <int D, int MK, int MV, int HG>
struct Tile {
  template <int WARPS, int STAGES>
  static constexpr bool fits() {
    using T = MmaDecode<D, MK, MV, HG, WARPS, STAGES>;
    return sizeof(typename MmaBlock<T>::Shared) <= MILLION_SHARED_KIB * 1024;
  }
  template <int WARPS, int STAGES>
  static auto choose() {
    if constexpr (fits<WARPS, STAGES>() || WARPS == 1) return MmaDecode<D, MK, MV, HG, WARPS, STAGES>();
    else if constexpr (STAGES > 2) return choose<WARPS, 2>();
    else return choose<WARPS - (WARPS > 4 ? 2 : 1), STAGES>();
  }
  static constexpr bool kLarge = MILLION_SHARED_KIB >= 227;
  static constexpr int kWarps = kLarge ? (HG == 1 ? 16 : HG == 4 ? 12 : 8) : (HG == 1 ? 8 : 4);
  using Type = decltype(choose<kWarps, !kLarge && HG != 4 ? 2 : 3>());
};

template <int D, int MK, int MV, int HG>
cudaError_t paged_decode(const PagedDecodeParams& params, cudaStream_t stream) {
  using T = typename Tile<D, MK, MV, HG>::Type;
  constexpr int kShared = sizeof(typename MmaBlock<T>::Shared);
  constexpr bool kFits = kShared <= MILLION_SHARED_KIB * 1024;
  static_assert(MILLION_SHARED_KIB < (D == 128 ? 163 : 99) || kFits, "the tile does not fit");
  if constexpr (!kFits) {
    return cudaErrorInvalidConfiguration;
  } else {
    const auto kernel = mma_decode_kernel<T>;
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
    if (error != cudaSuccess) return error;
    error = launch_early(kernel, params.grid, T::kThreads, kShared, params, stream);
    if (error != cudaSuccess) return error;
    using M = Merge<D, HG>;
    return launch_early(merge_kernel<M>, params.batch * params.kv_heads * params.group, M::kThreads, 0, params, stream);
  }
}

}  // namespace million

#define MILLION_INSTANTIATE_DECODE(D, MK, MV, HG) \
  template cudaError_t million::paged_decode<D, MK, MV, HG>(const PagedDecodeParams&, cudaStream_t);
