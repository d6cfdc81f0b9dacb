/* Transposes of matrices of 32-bit words and of 16-bit scales: what streams down columns need to become streams along rows.

   Eight vectors of eight words, rows of a tile, become its columns in three steps of eight shuffles each:

       step 1   [ a0 b0 a1 b1 | a4 b4 a5 b5 ] ...      words of neighbouring rows side by side
       step 2   [ a0 b0 c0 d0 | a4 b4 c4 d4 ] ...      pairs of words
       step 3   [ a0 b0 c0 d0 e0 f0 g0 h0 ]   ...      halves
*/
#include "vectors.h"

static void tile(const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride) {
    v8 rows[8];
    for (int i = 0; i < 8; i++) rows[i] = load8(from + i * from_stride);
    turn8(rows);
    for (int i = 0; i < 8; i++) store8(to + i * to_stride, rows[i]);
}

/* Write the transpose of (rows, columns) words to (columns, rows); strides count words.
   A block of 16 x 16 reads and writes whole cache lines. */
int64_t turn_words(
    const uint32_t *from, int64_t from_stride, uint32_t *to, int64_t to_stride, int64_t rows, int64_t columns
) {
    int64_t whole_rows = rows & ~15, whole_columns = columns & ~15;
    for (int64_t r = 0; r < whole_rows; r += 16)
        for (int64_t c = 0; c < whole_columns; c += 16)
            for (int part = 0; part < 4; part++) {
                int64_t i = r + 8 * (part >> 1), j = c + 8 * (part & 1);
                tile(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
            }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; c++)
            to[c * to_stride + r] = from[r * from_stride + c];
    return 0;
}

/* The same for elements of 16 bits. */
int64_t turn_halves(
    const uint16_t *from, int64_t from_stride, uint16_t *to, int64_t to_stride, int64_t rows, int64_t columns
) {
    for (int64_t block = 0; block < columns; block += 32) {
        int64_t end = block + 32 < columns ? block + 32 : columns;
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = block; c < end; c++) to[c * to_stride + r] = from[r * from_stride + c];
    }
    return 0;
}
