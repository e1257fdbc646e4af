#include "../encode_launch.cuh"

template cudaError_t million::encode_codes<128, false>(const EncodeParams&, int, cudaStream_t);
