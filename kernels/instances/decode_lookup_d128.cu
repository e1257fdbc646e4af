#include "../lookup_launch.cuh"

template cudaError_t million::lookup_decode<128>(const LookupDecodeParams&, int, int, int, cudaStream_t);
