/* Plain C, for any processor; the compiler vectorises it as it can. The specification of the other tiles. */
#include "epilogue.h"

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    for (int n = 0; n < PANEL; n++)
        for (int k = 0; k < depth; k++) {
            uint8_t code = n < features ? codes[n * stride + k / 2] >> (k % 2 * 4) & 15 : 0;
            panel[k / 4 * PANEL * 4 + n * 4 + k % 4] = table[code];
        }
}

static void multiply(const product *p) {
    for (int m = 0; m < p->rows; m++)
        for (int g = 0; g < p->groups; g++) {
            int32_t dot[PANEL] = {0};
            for (int q = 0; q < p->depth / 4; q++) {
                const int8_t *a = p->tokens + (m * p->groups + g) * padded(p->depth) + 4 * q;
                const int8_t *w = (const int8_t *)p->panel + (g * p->depth / 4 + q) * PANEL * 4;
                for (int n = 0; n < PANEL; n++)
                    dot[n] += a[0] * w[4 * n] + a[1] * w[4 * n + 1] + a[2] * w[4 * n + 2] + a[3] * w[4 * n + 3];
            }
            float *sums = p->sums + m * PANEL;
            const float *scale = p->scale + g * PANEL;
            for (int n = 0; n < PANEL; n++)
                sums[n] = (p->first && !g ? 0 : sums[n]) + scale[n] * (float)dot[n];
        }
}

const tile_kernel tile_portable = {
    .name = "portable", .group = 4, .unpack = unpack, .pack = pack_in_order, .multiply = multiply, .write = write_rows,
};
