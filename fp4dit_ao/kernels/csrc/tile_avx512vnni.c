/* AVX-512 VNNI: 64 products an instruction; 24 sums in registers. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include <immintrin.h>
#include <string.h>

#include "epilogue.h"

/* Transpose sixteen rows of sixteen 32-bit words. */
static inline __attribute__((always_inline)) void transpose(__m512i r[16]) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
    }
}

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    const __m256i low = _mm256_set1_epi8(15);
    for (int k = 0; k < depth; k += 64) {
        int left = (depth - k + 1) / 2;
        __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        int quads = depth - k >= 64 ? 16 : (depth - k) / 4;
        for (int n = 0; n < PANEL; n += 16) {
            __m512i rows[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; i++) {
                __m256i packed = _mm256_setzero_si256();
                if (n + i < features) packed = _mm256_maskz_loadu_epi8(mask, codes + (n + i) * stride + k / 2);
                __m256i a = _mm256_and_si256(packed, low), b = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
                /* bytes of a and b in turns; within 128-bit lanes, so that the 64-bit quarters come out as 0 2 | 1 3 */
                __m256i x = _mm256_unpacklo_epi8(a, b), y = _mm256_unpackhi_epi8(a, b);
                __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
                rows[i] = _mm512_shuffle_epi8(lut, _mm512_shuffle_i32x4(both, both, 0xd8));
            }
            transpose(rows);
            uint8_t *to = panel + (k / 4 * PANEL + n) * 4;
            for (int q = 0; q < quads; q++) _mm512_store_si512((__m512i *)(to + q * PANEL * 4), rows[q]);
        }
    }
}

/* sum += weights . tokens, four bytes a lane. In assembly, because GCC 12 spills the sums around the intrinsic. */
#define DOT(sum, weights, tokens) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(tokens))

static inline __attribute__((always_inline)) void tile(const int rows, const int8_t *tokens, ptrdiff_t stride,
                                                       const uint8_t *panel, int depth, const int32_t *token_sums,
                                                       const float *scale, float *sums) {
    __m512i dot[ROWS][4];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++) {
        __m512i start = _mm512_set1_epi32(-128 * token_sums[m]);
        dot[m][0] = dot[m][1] = dot[m][2] = dot[m][3] = start;
    }
#pragma GCC unroll 4
    for (int q = 0; q < depth / 4; q++) {
        const uint8_t *w = panel + q * PANEL * 4;
        __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 64);
        __m512i w2 = _mm512_load_si512(w + 128), w3 = _mm512_load_si512(w + 192);
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++) {
            int32_t four;
            memcpy(&four, tokens + m * stride + 4 * q, 4);
            __m512i a = _mm512_set1_epi32(four);
            DOT(dot[m][0], w0, a);
            DOT(dot[m][1], w1, a);
            DOT(dot[m][2], w2, a);
            DOT(dot[m][3], w3, a);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512 product = _mm512_cvtepi32_ps(dot[m][j]), s = _mm512_loadu_ps(scale + 16 * j);
            float *to = sums + m * PANEL + 16 * j;
            _mm512_store_ps(to, _mm512_fmadd_ps(product, s, _mm512_load_ps(to)));
        }
}

static void multiply(const int8_t *tokens, ptrdiff_t stride, int rows, const uint8_t *panel, int depth,
                     const int32_t *token_sums, const float *scale, float *sums) {
    for (; rows >= ROWS; rows -= ROWS, tokens += ROWS * stride, token_sums += ROWS, sums += ROWS * PANEL)
        tile(ROWS, tokens, stride, panel, depth, token_sums, scale, sums);
    switch (rows) {
    case 1: tile(1, tokens, stride, panel, depth, token_sums, scale, sums); break;
    case 2: tile(2, tokens, stride, panel, depth, token_sums, scale, sums); break;
    case 3: tile(3, tokens, stride, panel, depth, token_sums, scale, sums); break;
    case 4: tile(4, tokens, stride, panel, depth, token_sums, scale, sums); break;
    case 5: tile(5, tokens, stride, panel, depth, token_sums, scale, sums);
    }
}

const tile_kernel tile_avx512vnni = {"avx512vnni", 128, unpack, multiply, sum_row, write_rows};
#endif
