/* Each element several times in a row; for four halves, one multiplication of 64 bits. */
#include <stdint.h>
#include <string.h>

int64_t repeat_halves(const uint16_t *from, uint16_t *to, int64_t count, int64_t times) {
    if (times % 4 == 0) {
        for (int64_t i = 0; i < count; i++) {
            uint64_t four = from[i] * UINT64_C(0x0001000100010001);
            for (int64_t j = 0; j < times; j += 4) memcpy(to + i * times + j, &four, sizeof four);
        }
        return 0;
    }
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < times; j++) to[i * times + j] = from[i];
    return 0;
}

int64_t repeat_words(const uint32_t *from, uint32_t *to, int64_t count, int64_t times) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < times; j++) to[i * times + j] = from[i];
    return 0;
}
