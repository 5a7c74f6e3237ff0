/* Panels one after another, for kernels that define
 *   decode(weights, feature, panel)       the levels of FEATURES features from the `feature`-th; past the last one, anything
 *   multiply(strip, panel, depth, rows, start, sums)       sums[row][FEATURES] = start[row] + strip . panel
 *   write_output(tile_output)       write_tile, or what does the same quicker
 * and strips that are rows. */
#ifndef FP4DIT_CODEBOOK_PANELS_H
#define FP4DIT_CODEBOOK_PANELS_H

#include "codebook_epilogue.h"

static void multiply_panels(const codebook_problem *p, const codebook_block *b, int64_t panel, int64_t end) {
    const codebook_weights *w = &p->weights;
    const int64_t bytes = TOKENS * padded_depth(w->depth), last = b->first + b->count;
    for (; panel < end; panel++) {
        const int64_t feature = panel * FEATURES;
        const int8_t *strip = b->strips;
        const int32_t *start = b->start;
        if (w->features - feature < FEATURES) memset(b->panel, 0, FEATURES * padded_depth(w->depth));
        decode(w, feature, b->panel);
        for (int64_t token = b->first; token < last; token += TOKENS) {
            tile_output o = output_at(p, b, token, feature);
            for (int d = 0; d < p->digits; d++, strip += bytes, start += TOKENS)
                multiply(strip, b->panel, w->depth, o.tokens, start, b->sums + d * TOKENS * FEATURES);
            write_output(&o);
        }
    }
    end_streams();
}

/* Rows as they are, padded with zeros. Sums wrap, and end exact. */
static __attribute__((unused)) void pack_rows(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *start,
                                              int offset) {
    for (int m = 0; m < rows; m++, tokens += depth, strip += padded_depth(depth)) {
        memcpy(strip, tokens, depth);
        memset(strip + depth, 0, padded_depth(depth) - depth);
        start[m] = offset ? (int32_t)(-(uint32_t)offset * (uint32_t)sum_row(tokens, (int)depth)) : 0;
    }
}

#endif
