#include "../encode_launch.cuh"

template cudaError_t million::encode_codes<64, false>(const EncodeParams&, int, cudaStream_t);
