// One instance of the popcount template; the macros are its compile-time parameters.
#include <lowbit/popcount.cuh>

using Kernel = lowbit::Popcount<LOWBIT_X, LOWBIT_Y, LOWBIT_TOKENS, LOWBIT_PLANES, LOWBIT_WARPS, LOWBIT_UNITS, LOWBIT_EXACT,
                                LOWBIT_STAGES, LOWBIT_SCALED, LOWBIT_DEPENDENT>;

extern "C" __global__ void __launch_bounds__(LOWBIT_WARPS * 32, 1)
    lowbit_popcount(const char* weights, const float* scales, const float* columns, const LOWBIT_X* x, const LOWBIT_Y* bias,
                    LOWBIT_Y* y, int tokens, int in_features, int out_features, int x_stride, int y_stride, int share, int rest,
                    int units, int batch) {
  Kernel::run({weights, scales, columns, tokens, in_features, out_features, x_stride, y_stride, share, rest, units, batch}, x, bias, y);
}
