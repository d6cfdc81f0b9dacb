/* One 16-bit value of every block, such as its scale: blocks are step bytes apart. */
#include <stdint.h>
#include <string.h>

int64_t halves_put(const uint16_t *from, uint8_t *to, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++) memcpy(to + step * block, from + block, 2);
    return 0;
}

int64_t halves_get(const uint8_t *from, uint16_t *to, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++) memcpy(to + block, from + step * block, 2);
    return 0;
}

/* The first block whose value, an fp16, has an exponent of all ones: NaN or infinity; -1 when none has. */
int64_t first_not_finite(const uint8_t *from, int64_t blocks, int64_t step) {
    for (int64_t block = 0; block < blocks; block++) {
        uint16_t half;
        memcpy(&half, from + step * block, 2);
        if ((half & 0x7C00) == 0x7C00) return block;
    }
    return -1;
}
