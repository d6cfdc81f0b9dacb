// One instance of the GEMV template; the macros are its compile-time parameters.
#include LOWBIT_HEADER
#include <lowbit/gemv.cuh>

using Unit = lowbit::Unit<LOWBIT_DECODER, LOWBIT_GROUP, LOWBIT_SCALE, lowbit::Offset::LOWBIT_OFFSET>;
using Kernel = lowbit::Gemv<LOWBIT_DECODER, Unit, LOWBIT_TYPE, LOWBIT_TOKENS, LOWBIT_WARPS, LOWBIT_UNITS, LOWBIT_CLUSTER,
                            LOWBIT_EXACT, LOWBIT_STAGES, LOWBIT_DEPENDENT>;

extern "C" __global__ void __launch_bounds__(LOWBIT_WARPS * 32, 1)
    lowbit_gemv(const char* weights, const float* codebook, const LOWBIT_TYPE* x, const LOWBIT_TYPE* bias, LOWBIT_TYPE* y,
                int tokens, int in_features, int out_features, int x_stride, int y_stride, int tiles, int units, int batch,
                float zero) {
  Kernel::run({weights, codebook, tokens, in_features, out_features, x_stride, y_stride, tiles, units, batch, zero}, x, bias, y);
}
