/* state = word + factor * state down the lanes of rows: see checksum.py. Some lanes at a time, whose state stays in the first cache. */
#include <stdint.h>

enum { NEAR = 1 << 12 };

int64_t fold_rows(const uint32_t *words, uint32_t *restrict state, int64_t rows, int64_t lanes, int64_t factor) {
    for (int64_t start = 0; start < lanes; start += NEAR) {
        int64_t end = start + NEAR < lanes ? start + NEAR : lanes;
        for (int64_t row = 0; row < rows; row++) {
            const uint32_t *from = words + row * lanes;
            for (int64_t lane = start; lane < end; lane++) state[lane] = from[lane] + (uint32_t)factor * state[lane];
        }
    }
    return 0;
}
