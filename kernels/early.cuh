// Launches that may start while the kernel ahead of them in the stream drains.
#pragma once

#include <cuda_runtime.h>

// Shared memory a block can have on the smallest GPU of the build, KiB (the build sets it).
#ifndef MILLION_SHARED_KIB
#define MILLION_SHARED_KIB 227
#endif

namespace million {

// The kernel begins with wait_for_previous_launch(); before compute capability 9.0 this is an ordinary launch.
template <class Params>
cudaError_t launch_early(void (*kernel)(Params), dim3 blocks, int threads, int shared_bytes, const Params& params,
                         cudaStream_t stream) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = MILLION_SHARED_KIB >= 227;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace million
