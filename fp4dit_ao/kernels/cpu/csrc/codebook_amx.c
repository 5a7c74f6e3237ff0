/* AMX: 16 x 16 sums of 64 products each an instruction. Two tiles of tokens, two of features, four of their sums.
 *
 * A tile of tokens is sixteen of them, 64 levels each. A tile of weights is [k / 4][feature][k % 4]: sixteen rows are looked up and
 * transposed in registers. Of every eight input features, the even ones come first, then the odd ones, as codes lie in bytes. */
#include "codebook.h"
#ifdef FP4DIT_AMX
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-int8")
#include "amx.h"
#include "codebook_epilogue.h"

enum { TILE = SIDE * STEP /* bytes */ };

/* [rows / SIDE][k / STEP][SIDE][STEP]; rows that are missing are zero. */
static void pack(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *start) {
    const __m512i halves = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    (void)start;
    for (int m = 0; m < (rows + SIDE - 1) / SIDE * SIDE; m++, tokens += depth) {
        int8_t *to = strip + m / SIDE * SIDE * padded_depth(depth) + m % SIDE * STEP;
        for (int64_t k = 0; k < depth; k += STEP, to += TILE) {
            const __mmask64 mask = m >= rows ? 0 : depth - k < STEP ? (1ull << (depth - k)) - 1 : ~0ull;
            __m512i levels = _mm512_maskz_loadu_epi8(mask, tokens + k);
            _mm512_store_si512(to, _mm512_shuffle_epi8(levels, halves));
        }
    }
}

/* Lane l is sixteen bytes of row 4 * l + i of sixteen rows. */
INLINE __m512i every_fourth(const uint8_t *const rows[SIDE], int i, int64_t at) {
    __m512i x = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(rows[i] + at)));
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(rows[4 + i] + at)), 1);
    x = _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(rows[8 + i] + at)), 2);
    return _mm512_inserti32x4(x, _mm_loadu_si128((const __m128i *)(rows[12 + i] + at)), 3);
}

/* Row d of `to`, two tile rows apart, is the d-th dwords of sixteen rows. */
INLINE void store_transposed(const __m512i x[4], uint8_t *to) {
    __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
    __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, b));
    _mm512_store_si512(to + 2 * STEP, _mm512_unpackhi_epi64(a, b));
    _mm512_store_si512(to + 4 * STEP, _mm512_unpacklo_epi64(c, d));
    _mm512_store_si512(to + 6 * STEP, _mm512_unpackhi_epi64(c, d));
}

/* Sixteen features to tiles that lie 2 * TILE apart. */
static void decode_tiles(const codebook_weights *w, int64_t feature, uint8_t *to) {
    const __m512i low = _mm512_set1_epi8(15);
    const uint8_t *rows[SIDE], *index[SIDE], *tables[SIDE];
    for (int n = 0; n < SIDE; n++) {
        const int64_t row = feature + n < w->features ? feature + n : w->features - 1;
        rows[n] = w->codes + row * w->depth / 2;
        index[n] = index_row(w, row);
    }
    for (int64_t g = 0, k = 0; k < w->depth; g++) {
        __m512i table[4];
        for (int n = 0; n < SIDE; n++) {
            tables[n] = w->tables[nibble(index[n], g)];
            __builtin_prefetch(rows[n] + (k + FEATURES * w->depth) / 2, 0, 2); /* of the next panel */
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) table[i] = every_fourth(tables, i, 0);
        for (const int64_t end = k + w->group; k < end; k += 32) {
            __m512i even[4], odd[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                __m512i codes = every_fourth(rows, i, k / 2);
                even[i] = _mm512_shuffle_epi8(table[i], _mm512_and_si512(codes, low));
                odd[i] = _mm512_shuffle_epi8(table[i], _mm512_and_si512(_mm512_srli_epi16(codes, 4), low));
            }
            uint8_t *half = to + k / STEP * 2 * TILE + k % STEP * SIDE;
            store_transposed(even, half);
            store_transposed(odd, half + STEP);
        }
    }
}

static void decode(const codebook_weights *w, int64_t feature, uint8_t *panel) {
    decode_tiles(w, feature, panel);
    if (feature + SIDE < w->features) decode_tiles(w, feature + SIDE, panel + TILE);
}

/* Tokens are loaded with a hint not to keep them, so that the panel stays in the first-level cache. */
static void multiply(const int8_t *strip, const uint8_t *panel, int64_t depth, int rows, const int32_t *start, int32_t *sums) {
    const int64_t row = FEATURES * sizeof *sums;
    (void)start;
    MEMORY_BARRIER();
    zero_tiles();
    MULTIPLY_TILES(_tile_stream_loadd, _tile_dpbssd, strip, padded_depth(depth) * SIDE, STEP, TILE, panel, TILE, STEP, 2 * TILE,
                   padded_depth(depth) / STEP, rows > SIDE)
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + SIDE, row);
    _tile_stored(2, sums + SIDE * FEATURES, row);
    _tile_stored(3, sums + SIDE * FEATURES + SIDE, row);
    MEMORY_BARRIER();
}

/* As write_tile. The instruction takes subnormal numbers for 0 and keeps a NaN's bits: then the tile is written as others. */
static int write_bfloat16(const tile_output *o) {
    enum { NAN_OR_SUBNORMAL = 0x01 | 0x20 | 0x80 };
    const int past = o->past && !(((uintptr_t)o->out | (uintptr_t)o->stride) % 64);
    __m512 scale[2], bias[2], y[2];
    __mmask16 special = 0;
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        scale[i] = _mm512_loadu_ps(o->row_scale + i * SIDE);
        bias[i] = o->bias ? _mm512_loadu_ps(o->bias + i * SIDE) : _mm512_set1_ps(-0.0f);
    }
    char *out = o->out;
    for (int token = 0; token < o->tokens; token++, out += o->stride) {
        const __m512 token_scale = _mm512_set1_ps(o->token_scale[token]);
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(o->sums + token * FEATURES + i * SIDE));
            y[i] = _mm512_add_ps(_mm512_mul_ps(_mm512_mul_ps(sum, token_scale), scale[i]), bias[i]);
            special = _kor_mask16(special, _mm512_fpclass_ps_mask(y[i], NAN_OR_SUBNORMAL));
        }
        __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]);
        if (past) _mm512_stream_si512((__m512i *)out, halves);
        else _mm512_storeu_si512(out, halves);
    }
    return !special;
}

static void write_output(const tile_output *o) {
    if (o->type == BFLOAT16 && o->digits == 1 && o->features == FEATURES && write_bfloat16(o)) return;
    write_tile(o);
}

#include "codebook_panels.h"

const codebook_kernel codebook_amx = {
    .name = "amx", .group = 32, .least = 9, .begin = tiles_begin, .end = tiles_end, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
