/* AMX: 16 x 16 sums of 64 products each an instruction. Tokens and weights are laid out as for AVX-512 VNNI.
 *
 * Two tiles of tokens, by two of features, have four tiles of a group's int32 sums. While one group's are multiplied, those of the
 * group before are added to the float sums. */
#include "tile.h"

#include "targets.h"
#ifdef FP4DIT_AMX
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,amx-tile,amx-int8")
#include "amx.h"

/* Two tiles of tokens, and of features: a slice of the panel, [k / 4][SLICE][k % 4]. */
enum { TOKENS = 2 * SIDE, SLICE = 2 * SIDE };

static void unpack(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel) {
    tile_avx512vnni.unpack(codes, stride, features, depth, table, panel);
}

static int32_t pack(const int8_t *tokens, int depth, int8_t *to) { return tile_avx512vnni.pack(tokens, depth, to); }

/* A group's sums of a slice and up to TOKENS tokens. */
static void dot_group(const int8_t *tokens, int64_t row, int count, const uint8_t *weights, int depth, int32_t *sums) {
    enum { ACROSS = SLICE * 4, SUMS_ROW = SLICE * sizeof *sums };
    MEMORY_BARRIER();
    zero_tiles();
    MULTIPLY_TILES(_tile_loadd, _tile_dpbssd, tokens, SIDE * row, row, TILE_ROW, weights, SIDE * 4, ACROSS, TILE_ROW * SLICE,
                   depth / TILE_ROW, count > SIDE)
    _tile_stored(0, sums, SUMS_ROW);
    _tile_stored(1, sums + SIDE, SUMS_ROW);
    if (count > SIDE) {
        _tile_stored(2, sums + SIDE * SLICE, SUMS_ROW);
        _tile_stored(3, sums + SIDE * SLICE + SIDE, SUMS_ROW);
    }
    MEMORY_BARRIER();
}

/* y += scale * sums, or y = scale * sums */
INLINE void add_group(const int32_t *sums, const float *scale, int count, const int first, float *y) {
    const __m512 scales[2] = {_mm512_loadu_ps(scale), _mm512_loadu_ps(scale + SIDE)};
    for (int m = 0; m < count; m++, sums += SLICE, y += PANEL)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            const __m512 before = first ? _mm512_setzero_ps() : _mm512_load_ps(y + SIDE * j);
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + SIDE * j));
            _mm512_store_ps(y + SIDE * j, _mm512_fmadd_ps(sum, scales[j], before));
        }
}

static void multiply(const product *p) {
    int32_t sums[2][TOKENS * SLICE] __attribute__((aligned(64)));
    const int64_t row = p->groups * p->depth;
    for (int n = 0; n < PANEL; n += SLICE)
        for (int m = 0; m < p->rows; m += TOKENS) {
            const int count = p->rows - m < TOKENS ? p->rows - m : TOKENS;
            float *y = p->sums + m * PANEL + n;
            for (int g = 0; g <= p->groups; g++) {
                if (g < p->groups)
                    dot_group(p->tokens + m * row + g * p->depth, row, count, p->panel + n * row + g * p->depth * SLICE, p->depth,
                              sums[g % 2]);
                if (g == 1 && p->first) add_group(sums[0], p->scale + n, count, 1, y);
                else if (g) add_group(sums[(g - 1) % 2], p->scale + (g - 1) * PANEL + n, count, 0, y);
            }
        }
}

static void write(const float *sums, int rows, const float *token_scale, const float *bias, int features, void *out,
                  ptrdiff_t stride, int type, int past) {
    tile_avx512vnni.write(sums, rows, token_scale, bias, features, out, stride, type, past);
}

const tile_kernel tile_amx = {
    .name = "amx", .group = TILE_ROW, .least = 12, .spare = TOKENS, .begin = tiles_begin, .end = tiles_end, .unpack = unpack,
    .pack = pack, .multiply = multiply, .write = write,
};
END_TARGET
#endif
