/* Vectors of any width along the input features, included once for each instruction set, which defines:
 *   VECTOR, WIDTH        a register and its bytes; AT_ONCE tokens fit beside four features
 *   load, look_up        WIDTH bytes; the levels of WIDTH codes in a table
 *   DOT(sum, w, t)       sums of four products added to each int32
 *   OFFSET               of the levels in a table
 *   add_lanes            the sums over each of four registers */
#include "codebook_epilogue.h"

typedef int32_t four_sums __attribute__((vector_size(16)));

/* Rows of levels, one after another. A group that is no multiple of WIDTH spills into the next, which is written later. */
static void decode(const codebook_weights *w, int64_t feature, uint8_t *panel) {
    for (int64_t n = feature; n < feature + FEATURES && n < w->features; n++, panel += padded_depth(w->depth)) {
        const uint8_t *codes = w->codes + n * w->depth / 2, *index = index_row(w, n);
        for (int64_t g = 0, k = 0; k < w->depth; g++) {
            const VECTOR table = broadcast(w->tables[nibble(index, g)]);
            const int64_t end = k + w->group;
            __builtin_prefetch(codes + k / 2 + FEATURES * w->depth / 2);
            for (; k + WIDTH <= end; k += WIDTH) store(panel + k, look_up(codes + k / 2, table));
            if (k == end) continue;
            uint8_t some[WIDTH / 2] = {0};
            memcpy(some, codes + k / 2, (end - k) / 2);
            store(panel + k, look_up(some, table));
            k = end;
        }
    }
}

INLINE void tile(const int8_t *t, const uint8_t *w, int64_t stride, const int tokens, const int32_t *start, int32_t *sums) {
    VECTOR sum[AT_ONCE][4];
#pragma GCC unroll 4
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) sum[m][n] = (VECTOR){0};
    for (int64_t k = 0; k < stride; k += WIDTH) {
        VECTOR v[4];
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) v[n] = load(w + n * stride + k);
#pragma GCC unroll 4
        for (int m = 0; m < tokens; m++) {
            VECTOR a = load(t + m * stride + k);
#pragma GCC unroll 4
            for (int n = 0; n < 4; n++) DOT(sum[m][n], v[n], a);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < tokens; m++) {
        four_sums four = (four_sums)add_lanes(sum[m][0], sum[m][1], sum[m][2], sum[m][3]) + start[m];
        memcpy(sums + m * FEATURES, &four, sizeof four);
    }
}

static void multiply(const int8_t *strip, const uint8_t *panel, int64_t depth, int rows, const int32_t *start, int32_t *sums) {
    const int64_t stride = padded_depth(depth);
    for (int n = 0; n < FEATURES; n += 4, panel += 4 * stride)
        for (int m = 0; m < rows; m += AT_ONCE) {
            const int8_t *t = strip + m * stride;
            int32_t *to = sums + m * FEATURES + n;
            switch (rows - m < AT_ONCE ? rows - m : AT_ONCE) {
                case 1: tile(t, panel, stride, 1, start + m, to); break;
#if AT_ONCE > 2
                case 2: tile(t, panel, stride, 2, start + m, to); break;
                case 3: tile(t, panel, stride, 3, start + m, to); break;
#endif
                default: tile(t, panel, stride, AT_ONCE, start + m, to);
            }
        }
}

#define write_output write_tile
#include "codebook_panels.h"

static void pack(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *start) {
    pack_rows(tokens, depth, rows, strip, start, OFFSET);
}
