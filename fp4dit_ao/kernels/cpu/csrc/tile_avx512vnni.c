/* AVX-512 VNNI: 64 products an instruction; 12 sums of a group and their 12 float sums in registers. */
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include <immintrin.h>
#include <string.h>

#include "epilogue.h"

/* A panel is two slices, [2][k / 4][SLICE][k % 4]: one at a time is in the first-level cache. */
enum { SLICE = 32 };

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

static inline __attribute__((always_inline)) __m512i look_up(__m512i codes, __m512i lut) {
    return _mm512_shuffle_epi8(lut, _mm512_and_si512(codes, _mm512_set1_epi8(15)));
}

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    const __m512i lut = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
    const ptrdiff_t slice = padded(depth) * SLICE;
    for (int k = 0; k < depth; k += 64) {
        int left = (depth - k) / 2, pairs = depth - k >= 64 ? 8 : padded(depth - k) / 8;
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
            uint8_t *to = panel + n / SLICE * slice + (k * SLICE + n % SLICE * 4);
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) {
                if (i == pairs) break;
                _mm512_store_si512(to + 2 * i * SLICE * 4, look_up(words[i], lut));
                _mm512_store_si512(to + (2 * i + 1) * SLICE * 4, look_up(_mm512_srli_epi16(words[i], 4), lut));
            }
        }
    }
}

/* Of every eight levels the even ones, then the odd ones: as the low and the high halves of four bytes of codes are looked up.
 * What is missing to the last eight is zero. */
static int32_t pack(const int8_t *tokens, int depth, int8_t *to) {
    const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    __m512i total = _mm512_setzero_si512();
    for (int k = 0; k < depth; k += 64) {
        int left = depth - k;
        __m512i levels = left >= 64 ? _mm512_loadu_si512(tokens + k) : _mm512_maskz_loadu_epi8((1ull << left) - 1, tokens + k);
        __m512i ordered = _mm512_shuffle_epi8(levels, halves);
        if (left >= 64) _mm512_storeu_si512(to + k, ordered); /* a masked store is slow */
        else _mm512_mask_storeu_epi8(to + k, ~0ull >> (64 - padded(left)), ordered);
        total = _mm512_dpbusd_epi32(total, _mm512_set1_epi8(1), levels);
    }
    return _mm512_reduce_add_epi32(total);
}

/* sum += weights . tokens, four bytes a lane. In assembly, because GCC 12 spills the sums around the intrinsic. */
#define DOT(sum, weights, tokens) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(tokens))

/* Some rows and vectors of sixteen features, over all groups: float sums stay in registers. */
static inline __attribute__((always_inline)) void tile(const product *p, const int rows, const int vectors, int m0, int n) {
    const ptrdiff_t stride = padded(p->depth), row = p->groups * stride;
    const uint8_t *w = p->panel + n * row;
    const int8_t *next = p->tokens + (m0 + rows) * row; /* the next tile's tokens, as many as these */
    float *sums = p->sums + m0 * PANEL + n;
    __m512 y[ROWS][4];
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) y[m][j] = p->first ? _mm512_setzero_ps() : _mm512_load_ps(sums + m * PANEL + 16 * j);
    for (int g = 0; g < p->groups; g++) {
        const int8_t *tokens = p->tokens + m0 * row + g * stride, *end = tokens + stride;
        __m512i dot[ROWS][4];
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) dot[m][j] = _mm512_set1_epi32(p->start[g * p->stride + m0 + m]);
#pragma GCC unroll 4
        for (; tokens < end; tokens += 4, w += SLICE * 4) {
            __m512i v[4];
            __builtin_prefetch(next);
            next += rows * 4;
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++) v[j] = _mm512_load_si512(w + j / 2 * row * SLICE + j % 2 * 64);
#pragma GCC unroll 6
            for (int m = 0; m < rows; m++) {
                int32_t four;
                memcpy(&four, tokens + m * row, 4);
                __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
                for (int j = 0; j < vectors; j++) DOT(dot[m][j], v[j], a);
            }
        }
#pragma GCC unroll 6
        for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
            for (int j = 0; j < vectors; j++)
                y[m][j] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[m][j]), _mm512_loadu_ps(p->scale + g * PANEL + n + 16 * j),
                                          y[m][j]);
    }
#pragma GCC unroll 6
    for (int m = 0; m < rows; m++)
#pragma GCC unroll 4
        for (int j = 0; j < vectors; j++) _mm512_store_ps(sums + m * PANEL + 16 * j, y[m][j]);
}

static void multiply(const product *p) {
    if (p->rows == 1) tile(p, 1, 4, 0, 0); /* of one slice there are too few sums to hide how long a dot product takes */
    else if (p->rows == 2) tile(p, 2, 4, 0, 0);
    else
        for (int n = 0; n < PANEL; n += SLICE)
            for (int m = 0; m < p->rows; m += ROWS) switch (p->rows - m) {
                case 1: tile(p, 1, 2, m, n); break;
                case 2: tile(p, 2, 2, m, n); break;
                case 3: tile(p, 3, 2, m, n); break;
                case 4: tile(p, 4, 2, m, n); break;
                case 5: tile(p, 5, 2, m, n); break;
                default: tile(p, ROWS, 2, m, n);
                }
}

/* Thirty-two sums as bfloat16, rounded to nearest even; NaN stays one. */
static inline __attribute__((always_inline)) __m512i to_bfloat16(__m512 lower, __m512 upper) {
    const __m512i half = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1), nan = _mm512_set1_epi32(0x7fc00000);
    __m512i halves[2] = {_mm512_castps_si512(lower), _mm512_castps_si512(upper)};
    __mmask16 missing[2] = {_mm512_cmp_ps_mask(lower, lower, _CMP_UNORD_Q), _mm512_cmp_ps_mask(upper, upper, _CMP_UNORD_Q)};
    __m256i words[2];
    for (int i = 0; i < 2; i++) {
        __m512i even = _mm512_and_si512(_mm512_srli_epi32(halves[i], 16), one);
        __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(halves[i], half), even);
        rounded = _mm512_mask_mov_epi32(rounded, missing[i], nan);
        words[i] = _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
    }
    return _mm512_inserti64x4(_mm512_castsi256_si512(words[0]), words[1], 1);
}

/* As write_rows; whole panels of bfloat16 past the caches, if `past` says that they are too small for the output. */
static void write(const float *sums, int rows, const float *token_scale, const float *bias, int features, void *out,
                  ptrdiff_t stride, int type, int past) {
    if (!past || type != BFLOAT16 || features != PANEL || ((uintptr_t)out | (uintptr_t)stride) % 64) {
        write_rows(sums, rows, token_scale, bias, features, out, stride, type, past);
        return;
    }
    for (int m = 0; m < rows; m++, out = (char *)out + stride, sums += PANEL) {
        __m512 y[4], scale = _mm512_set1_ps(token_scale[m]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            __m512 added = bias ? _mm512_loadu_ps(bias + 16 * j) : _mm512_setzero_ps();
            y[j] = _mm512_fmadd_ps(_mm512_load_ps(sums + 16 * j), scale, added); /* as compilers contract write_row */
        }
        _mm512_stream_si512((__m512i *)out, to_bfloat16(y[0], y[1]));
        _mm512_stream_si512((__m512i *)out + 1, to_bfloat16(y[2], y[3]));
    }
    _mm_sfence();
}

const tile_kernel tile_avx512vnni = {
    .name = "avx512vnni", .offset = 128, .group = 4, .unpack = unpack, .pack = pack, .multiply = multiply, .write = write,
};
#endif
