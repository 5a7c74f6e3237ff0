/* Arm's dot product of four bytes (sdot, Armv8.2); 4 rows x 8 features in registers. */
#include "tile.h"
#if defined(__aarch64__)
#include <arm_neon.h>

BEGIN_TARGET(DOT_PRODUCT)
#include "epilogue.h"

enum { SLICE = 8 /* features in registers: the panel is [PANEL / SLICE][k / 4][SLICE][k % 4] */ };

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    const uint8x16_t lut = vld1q_u8(table);
    for (int n = 0; n < PANEL; n++) {
        const uint8_t *row = codes + n * stride;
        for (int k = 0; k < depth; k += 32) {
            uint8_t bytes[16] = {0}, levels[32];
            int left = (depth - k) / 2;
            if (n < features) memcpy(bytes, row + k / 2, left < 16 ? left : 16);
            const uint8x16_t packed = vld1q_u8(bytes);
            const uint8x16_t low = vandq_u8(packed, vdupq_n_u8(15)), high = vshrq_n_u8(packed, 4);
            vst1q_u8(levels, vqtbl1q_u8(lut, vzip1q_u8(low, high)));
            vst1q_u8(levels + 16, vqtbl1q_u8(lut, vzip2q_u8(low, high)));
            int quads = left >= 16 ? 8 : left / 2;
            for (int q = 0; q < quads; q++) memcpy(panel + ((n / SLICE * (depth / 4) + k / 4 + q) * SLICE + n % SLICE) * 4, levels + 4 * q, 4);
        }
    }
}

/* Some rows and SLICE features from the `n`-th, over all groups: float sums stay in registers. */
INLINE void tile(const product *p, const int rows, int m0, int n) {
    const ptrdiff_t stride = padded(p->depth), row = p->groups * stride;
    const int8_t *w = (const int8_t *)p->panel + n * p->groups * p->depth;
    float *sums = p->sums + m0 * PANEL + n;
    float32x4_t y[4][2];
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) y[m][j] = p->first ? vdupq_n_f32(0) : vld1q_f32(sums + m * PANEL + 4 * j);
    for (int g = 0; g < p->groups; g++) {
        const int8_t *tokens = p->tokens + m0 * row + g * stride;
        int32x4_t dot[4][2];
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++) dot[m][0] = dot[m][1] = vdupq_n_s32(p->start[g * p->stride + m0 + m]);
        int k = 0;
#define QUAD(quad) \
    do { \
        const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16); \
        w += SLICE * 4; \
        _Pragma("GCC unroll 4") for (int m = 0; m < rows; m++) { \
            dot[m][0] = vdotq_laneq_s32(dot[m][0], w0, t[m], quad); \
            dot[m][1] = vdotq_laneq_s32(dot[m][1], w1, t[m], quad); \
        } \
    } while (0)
        int8x16_t t[4];
        for (; k + 16 <= p->depth; k += 16) {
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) t[m] = vld1q_s8(tokens + m * row + k);
            QUAD(0);
            QUAD(1);
            QUAD(2);
            QUAD(3);
        }
        for (; k < p->depth; k += 4) {
#pragma GCC unroll 4
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, tokens + m * row + k, 4);
                t[m] = vreinterpretq_s8_s32(vdupq_n_s32(four));
            }
            QUAD(0);
        }
#undef QUAD
#pragma GCC unroll 4
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
                y[m][j] = vfmaq_f32(y[m][j], vcvtq_f32_s32(dot[m][j]), vld1q_f32(p->scale + g * PANEL + n + 4 * j));
    }
#pragma GCC unroll 4
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) vst1q_f32(sums + m * PANEL + 4 * j, y[m][j]);
}

static void multiply(const product *p) {
    for (int n = 0; n < PANEL; n += SLICE)
        for (int m = 0; m < p->rows; m += 4) switch (p->rows - m) {
            case 1: tile(p, 1, m, n); break;
            case 2: tile(p, 2, m, n); break;
            case 3: tile(p, 3, m, n); break;
            default: tile(p, 4, m, n);
            }
}

const tile_kernel tile_dotprod = {
    .name = "dotprod", .group = 4, .unpack = unpack, .pack = pack_in_order, .multiply = multiply, .write = write_rows,
};
END_TARGET
#endif
