/* AVX-512 VNNI: 64 products an instruction; 24 sums in registers. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include <immintrin.h>
#include <string.h>

#include "epilogue.h"

/* Of sixteen rows, rows[i] holding row (i % 4 + i / 4 * 8) in its lower half and the fourth after it in its upper half: make
 * out[j] the sixteen j-th 32-bit words. */
static inline __attribute__((always_inline)) void transpose(const __m512i rows[8], __m512i out[8]) {
    __m512i pairs[8], fours[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        out[i] = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        out[4 + i] = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
    }
}

/* The levels of both codes in two of every word's four bytes, which `twice` names: each byte's low code, then its high one. */
static inline __attribute__((always_inline)) __m512i look_up(__m512i words, __m512i twice, __m512i lut) {
    __m512i low = _mm512_shuffle_epi8(words, twice), high = _mm512_srli_epi16(low, 4);
    __m512i codes = _mm512_ternarylogic_epi32(_mm512_set1_epi16(0x00ff), low, high, 0xca);
    return _mm512_shuffle_epi8(lut, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    const __m512i first = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13));
    const __m512i second = _mm512_add_epi8(first, _mm512_set1_epi8(2));
    for (int k = 0; k < depth; k += 64) {
        int left = (depth - k) / 2, quads = depth - k >= 64 ? 16 : (depth - k) / 4;
        __mmask32 mask = left >= 32 ? 0xffffffffu : (1u << left) - 1;
        for (int n = 0; n < PANEL; n += 16) {
            __m512i rows[8], words[8];
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                int row = n + i % 4 + i / 4 * 8;
                const uint8_t *from = codes + row * stride + k / 2;
                __m256i lower = _mm256_maskz_loadu_epi8(row < features ? mask : 0, from);
                __m256i upper = _mm256_maskz_loadu_epi8(row + 4 < features ? mask : 0, from + 4 * stride);
                rows[i] = _mm512_inserti64x4(_mm512_castsi256_si512(lower), upper, 1);
            }
            transpose(rows, words);
            uint8_t *to = panel + (k / 4 * PANEL + n) * 4;
            if (quads == 16) {
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    _mm512_store_si512(to + 2 * i * PANEL * 4, look_up(words[i], first, lut));
                    _mm512_store_si512(to + (2 * i + 1) * PANEL * 4, look_up(words[i], second, lut));
                }
            } else
                for (int q = 0; q < quads; q++)
                    _mm512_store_si512(to + q * PANEL * 4, look_up(words[q / 2], q % 2 ? second : first, lut));
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
