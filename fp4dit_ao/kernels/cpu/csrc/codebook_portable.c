/* Plain C, for any processor; the compiler vectorises it as it can. The specification of the other kernels. */
#include "codebook.h"

#include "codebook_epilogue.h"

static void decode(const codebook_weights *w, int64_t feature, uint8_t *panel) {
    for (int64_t n = feature; n < feature + FEATURES && n < w->features; n++, panel += padded_depth(w->depth)) {
        const uint8_t *codes = w->codes + n * w->depth / 2, *index = index_row(w, n);
        for (int64_t g = 0, k = 0; k < w->depth; g++) {
            const uint8_t *table = w->tables[nibble(index, g)];
            for (const int64_t end = k + w->group; k < end; k++) panel[k] = table[nibble(codes, k)];
        }
    }
}

static void multiply(const int8_t *strip, const uint8_t *panel, int64_t depth, int rows, const int32_t *start, int32_t *sums) {
    const int64_t stride = padded_depth(depth);
    for (int m = 0; m < rows; m++, strip += stride)
        for (int n = 0; n < FEATURES; n++) {
            const int8_t *w = (const int8_t *)panel + n * stride;
            int32_t sum = start[m];
            for (int64_t k = 0; k < depth; k++) sum += strip[k] * w[k];
            sums[m * FEATURES + n] = sum;
        }
}

#define write_output write_tile
#include "codebook_panels.h"

static void pack(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *start) {
    pack_rows(tokens, depth, rows, strip, start, 0);
}

const codebook_kernel codebook_portable = {.name = "portable", .group = 1, .pack = pack, .multiply = multiply_panels};
