// One instance of the GEMM template; the macros are its compile-time parameters.
#include LOWBIT_HEADER
#include <lowbit/gemm.cuh>

using Unit = lowbit::Unit<LOWBIT_DECODER, LOWBIT_GROUP, LOWBIT_SCALE, lowbit::Offset::LOWBIT_OFFSET>;
using Kernel = lowbit::Gemm<LOWBIT_DECODER, Unit, LOWBIT_TYPE, LOWBIT_TOKENS, LOWBIT_STAGES>;

extern "C" __global__ void __launch_bounds__(Kernel::WARPS * 32, 1)
    lowbit_gemm(const char* weights, const float* codebook, const __half* x, const LOWBIT_TYPE* bias, LOWBIT_TYPE* y,
                float* partial, int* arrived, int tokens, int in_features, int out_features, int x_stride, int y_stride, int tiles,
                int steps, int items, float zero, float factor) {
  Kernel::run({weights, codebook, x, partial, arrived, tokens, in_features, out_features, x_stride, y_stride, tiles, steps,
               items, zero, factor},
              bias, y);
}
