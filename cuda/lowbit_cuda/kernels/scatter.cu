// One instance of the scatter template; the macros are its compile-time parameters.
#include LOWBIT_HEADER
#include <lowbit/scatter.cuh>

using Unit = lowbit::Unit<LOWBIT_DECODER, LOWBIT_GROUP, LOWBIT_SCALE, lowbit::Offset::LOWBIT_OFFSET>;
using Kernel = lowbit::Scatter<LOWBIT_DECODER, Unit, LOWBIT_TYPE>;

extern "C" __global__ void __launch_bounds__(Kernel::WARPS * 32)
    lowbit_scatter(const char* weights, const float* codebook, const int* source, LOWBIT_TYPE* out, int rows, int in_features,
                   int length, long long units, int across, float zero) {
  Kernel::run(weights, codebook, source, out, rows, in_features, length, units, across, zero);
}
