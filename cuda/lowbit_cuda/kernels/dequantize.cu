// One instance of the dequantize template; the macros are its compile-time parameters.
#include LOWBIT_HEADER
#include <lowbit/dequantize.cuh>

using Unit = lowbit::Unit<LOWBIT_DECODER, LOWBIT_GROUP, LOWBIT_SCALE, lowbit::Offset::LOWBIT_OFFSET>;
using Kernel = lowbit::Dequantize<LOWBIT_DECODER, Unit, LOWBIT_TYPE>;

extern "C" __global__ void __launch_bounds__(Kernel::WARPS * 32)
    lowbit_dequantize(const char* weights, const float* codebook, LOWBIT_TYPE* out, int rows, int in_features, long long units,
                      int across, float zero) {
  Kernel::run(weights, codebook, out, rows, in_features, units, across, zero);
}
