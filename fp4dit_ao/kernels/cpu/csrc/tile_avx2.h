/* AVX2, included once with VNNI's dot product of four bytes (DOT) and once without; 3 rows x 16 features in registers. */
#include <immintrin.h>
#include <string.h>

#include "epilogue.h"

enum { SLICE = 16 /* features in registers: the panel is [PANEL / SLICE][k / 4][SLICE][k % 4] */ };

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    const __m256i lut = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
    const __m128i low = _mm_set1_epi8(15);
    for (int n = 0; n < PANEL; n++) {
        const uint8_t *row = codes + n * stride;
        for (int k = 0; k < depth; k += 32) {
            uint8_t bytes[16] = {0};
            int left = (depth - k) / 2;
            uint32_t words[8];
            if (n < features) memcpy(bytes, row + k / 2, left < 16 ? left : 16);
            __m128i packed = _mm_loadu_si128((const __m128i *)bytes);
            __m128i a = _mm_and_si128(packed, low), b = _mm_and_si128(_mm_srli_epi16(packed, 4), low);
            __m256i both = _mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b));
            _mm256_storeu_si256((__m256i *)words, _mm256_shuffle_epi8(lut, both));
            int quads = left >= 16 ? 8 : left / 2;
            for (int q = 0; q < quads; q++) memcpy(panel + ((n / SLICE * (depth / 4) + k / 4 + q) * SLICE + n % SLICE) * 4, words + q, 4);
        }
    }
}

/* Some rows and SLICE features from the `n`-th, over all groups: float sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const product *p, const int rows, int m0, int n) {
    const ptrdiff_t stride = padded(p->depth), row = p->groups * stride;
    const uint8_t *w = p->panel + n * p->groups * p->depth;
    float *sums = p->sums + m0 * PANEL + n;
    __m256 y[3][2];
#pragma GCC unroll 3
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) y[m][j] = p->first ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + m * PANEL + 8 * j);
    for (int g = 0; g < p->groups; g++) {
        const int8_t *tokens = p->tokens + m0 * row + g * stride;
        __m256i dot[3][2];
#pragma GCC unroll 3
        for (int m = 0; m < rows; m++) dot[m][0] = dot[m][1] = _mm256_set1_epi32(p->start[g * p->stride + m0 + m]);
        for (int q = 0; q < p->depth / 4; q++, w += SLICE * 4) {
            __m256i w0 = _mm256_load_si256((const __m256i *)w), w1 = _mm256_load_si256((const __m256i *)(w + 32));
#pragma GCC unroll 3
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, tokens + m * row + 4 * q, 4);
                __m256i a = _mm256_set1_epi32(four);
                dot[m][0] = DOT(dot[m][0], w0, a);
                dot[m][1] = DOT(dot[m][1], w1, a);
            }
        }
#pragma GCC unroll 3
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++)
                y[m][j] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[m][j]), _mm256_loadu_ps(p->scale + g * PANEL + n + 8 * j),
                                          y[m][j]);
    }
#pragma GCC unroll 3
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) _mm256_storeu_ps(sums + m * PANEL + 8 * j, y[m][j]);
}

static void multiply(const product *p) {
    for (int n = 0; n < PANEL; n += SLICE)
        for (int m = 0; m < p->rows; m += 3) switch (p->rows - m) {
            case 1: tile(p, 1, m, n); break;
            case 2: tile(p, 2, m, n); break;
            default: tile(p, 3, m, n);
            }
}
