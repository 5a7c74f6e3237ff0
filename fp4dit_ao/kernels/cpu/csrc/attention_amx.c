/* Attention on AMX: scores of int8 tiles, and bfloat16 weights times values of bfloat16 tiles.
 *
 * Two tiles of queries, by two of keys, or by two of a value's features, have four tiles of sums. Products take a fraction of the
 * exponentials' time, so that heads are padded to whole tiles. Scores are in units of log 2. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "attention.h"
#ifdef FP4DIT_AMX
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,amx-tile,amx-int8,amx-bf16")
#include "amx.h"
#include "tile.h"

enum {
    QUERIES = 2 * SIDE, /* in a block */
    KEYS = 256,         /* in a block: its scores stay in the first-level cache */
    KEYS_AT_ONCE = 32,  /* two tiles of scores, or the depth of one of weights */
    LEVELS = 64,        /* of a tile's row */
    TILE = SIDE * TILE_ROW
};

typedef struct {
    int8_t *q;   /* [query / SIDE][step][SIDE][LEVELS] */
    int8_t *k;   /* [key / SIDE][step][dim % LEVELS / 4][key % SIDE][dim % 4] */
    uint16_t *v; /* [key / 32][dim / SIDE][key % 32 / 2][dim % SIDE][key % 2] */
    float *score; /* [QUERIES][KEYS]: int32 sums, then scores, then bfloat16 weights in the front half of each row */
    float *out;   /* [QUERIES][width] */
    int steps;    /* tiles for all features of a query or key */
    int width;    /* features of a value, in whole pairs of tiles */
} scratch;

static int padded_keys(int64_t keys) { return (int)((keys + KEYS_AT_ONCE - 1) / KEYS_AT_ONCE * KEYS_AT_ONCE); }

INLINE __mmask16 lanes(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (__mmask16)((1 << count) - 1); }

/* Up to SIDE tokens, from feature `from` on, as a tile; zeros where there is nothing. */
INLINE void load_rows(const int8_t *tokens, int64_t count, int64_t dim, int64_t from, int8_t *tile) {
    const __mmask64 mask = dim - from < LEVELS ? (1ull << (dim - from)) - 1 : ~0ull;
    for (int n = 0; n < SIDE; n++)
        _mm512_store_si512(tile + n * TILE_ROW, _mm512_maskz_loadu_epi8(n < count ? mask : 0, tokens + n * dim + from));
}

static void pack_queries(const int8_t *tokens, int64_t count, int64_t dim, const scratch *s) {
    int8_t *to = s->q;
    for (int n = 0; n < QUERIES; n += SIDE)
        for (int step = 0; step < s->steps; step++, to += TILE)
            load_rows(tokens + n * dim, count - n, dim, step * LEVELS, to);
}

static void pack_keys(const int8_t *tokens, int64_t keys, int64_t dim, const scratch *s) {
    int8_t rows[TILE] __attribute__((aligned(64))), *to = s->k;
    const __m512i starts = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(TILE_ROW));
    for (int64_t n = 0; n < padded_keys(keys); n += SIDE)
        for (int step = 0; step < s->steps; step++, to += TILE) {
            load_rows(tokens + n * dim, keys - n, dim, step * LEVELS, rows);
            for (int word = 0; word < LEVELS / 4; word++)
                _mm512_store_si512(to + word * TILE_ROW, _mm512_i32gather_epi32(starts, rows + 4 * word, 1));
        }
}

/* Sixteen levels as bfloat16 in the upper halves of sixteen words. */
INLINE __m512i half_levels(__mmask16 mask, const int8_t *levels) {
    return (__m512i)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, levels)));
}

static void pack_values(const int8_t *tokens, int64_t keys, int64_t dim, const scratch *s) {
    for (int64_t key = 0; key < padded_keys(keys); key += 2)
        for (int64_t d = 0; d < s->width; d += SIDE) {
            const __mmask16 mask = lanes(dim - d), first = key < keys ? mask : 0, second = key + 1 < keys ? mask : 0;
            __m512i low = half_levels(first, tokens + key * dim + d), high = half_levels(second, tokens + (key + 1) * dim + d);
            uint16_t *tile = s->v + (key / KEYS_AT_ONCE * s->width + d) * KEYS_AT_ONCE;
            _mm512_store_si512(tile + key % KEYS_AT_ONCE * SIDE, _mm512_or_si512(_mm512_srli_epi32(low, 16), high));
        }
}

/* int32 scores of `queries` queries and KEYS_AT_ONCE keys. */
static void multiply_keys(const scratch *s, int queries, const int8_t *k, float *score) {
    enum { ROW = KEYS * sizeof *score };
    MEMORY_BARRIER();
    zero_tiles();
    const int64_t next = s->steps * TILE;
    MULTIPLY_TILES(_tile_loadd, _tile_dpbssd, s->q, next, TILE_ROW, TILE, k, next, TILE_ROW, TILE, s->steps, queries > SIDE)
    _tile_stored(0, score, ROW);
    _tile_stored(1, score + SIDE, ROW);
    if (queries > SIDE) {
        _tile_stored(2, score + SIDE * KEYS, ROW);
        _tile_stored(3, score + SIDE * KEYS + SIDE, ROW);
    }
    MEMORY_BARRIER();
}

/* out += weights . values of `keys` keys, which are whole tiles. */
static void multiply_values(const scratch *s, int queries, const uint16_t *v, int keys) {
    enum { WEIGHTS_ROW = KEYS * sizeof(float) };
    const int64_t row = s->width * sizeof(float);
    MEMORY_BARRIER();
    for (int d = 0; d < s->width; d += 2 * SIDE) {
        float *out = s->out + d, *lower = out + SIDE * s->width;
        _tile_loadd(0, out, row);
        _tile_loadd(1, out + SIDE, row);
        _tile_loadd(2, lower, row);
        _tile_loadd(3, lower + SIDE, row);
        MULTIPLY_TILES(_tile_loadd, _tile_dpbf16ps, s->score, SIDE * WEIGHTS_ROW, WEIGHTS_ROW, TILE_ROW, v + d * KEYS_AT_ONCE,
                       TILE, TILE_ROW, s->width * TILE_ROW, keys / KEYS_AT_ONCE, queries > SIDE)
        _tile_stored(0, out, row);
        _tile_stored(1, out + SIDE, row);
        _tile_stored(2, lower, row);
        _tile_stored(3, lower + SIDE, row);
    }
    MEMORY_BARRIER();
}

static const float LOG2_E = 1.44269504f;

/* A query's int32 sums to scores, in place: -infinity from `count` keys to `padded`. The largest of them and `most`. */
INLINE float score_row(float *row, int count, int padded, float q_scale, const float *k_scale, const float *bias, float most) {
    const __m512 factor = _mm512_set1_ps(q_scale), log2_e = _mm512_set1_ps(LOG2_E), none = _mm512_set1_ps(-INFINITY);
    __m512 top = _mm512_set1_ps(most);
    for (int j = 0; j < padded; j += 16) {
        const __mmask16 mask = lanes(count - j);
        __m512 scale = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, k_scale + j), factor);
        __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(row + j)), scale);
        if (bias) x = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, bias + j), log2_e, x);
        x = _mm512_mask_mov_ps(none, mask, x);
        _mm512_storeu_ps(row + j, x);
        top = _mm512_max_ps(x, top); /* of a NaN and a number, the number */
    }
    return _mm512_reduce_max_ps(top);
}

/* 2^x for x <= 0, to 3e-6 of it, beside a weight's last place of 4e-3; 0 from where a result could be subnormal, which takes the
 * processor long. NaN stays NaN: of two operands, max returns the second. */
INLINE __m512 power_of_two(__m512 x) {
    const __m512 least = _mm512_set1_ps(-125.0f);
    const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    x = _mm512_max_ps(least, x);
    const __m512 whole = _mm512_roundscale_ps(x, 8), r = _mm512_sub_ps(x, whole);
    /* the polynomial of degree four with the least relative error from -1/2 to 1/2 */
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(9.570101276e-3f), r, _mm512_set1_ps(5.591785908e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402474433e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931217909e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.999992847e-1f));
    return _mm512_maskz_scalef_ps(normal, p, whole);
}

/* A query's scores to weights (with the values' scales) in bfloat16, in place; the sum of the exponentials. */
INLINE float weigh_row(float *row, int count, int padded, float most, const float *v_scale) {
    const __m512 shift = _mm512_set1_ps(most == -INFINITY ? 0 : most);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int j = 0; j < padded; j += 32) {
        __m512 w[2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
            const __m512 p = power_of_two(_mm512_sub_ps(_mm512_loadu_ps(row + j + 16 * i), shift));
            sums[i] = _mm512_add_ps(sums[i], p);
            w[i] = _mm512_mul_ps(p, _mm512_maskz_loadu_ps(lanes(count - j - 16 * i), v_scale + j + 16 * i));
        }
        _mm512_storeu_si512((uint16_t *)row + j, (__m512i)_mm512_cvtne2ps_pbh(w[1], w[0]));
    }
    return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

INLINE void scale_row(float *row, int width, float factor) {
    for (int d = 0; d < width; d += 16)
        _mm512_store_ps(row + d, _mm512_mul_ps(_mm512_load_ps(row + d), _mm512_set1_ps(factor)));
}

/* Rounds as bfloat16() does; a subnormal result is 0. */
INLINE void write_row_as_bfloat16(const float *row, int dim, float factor, uint16_t *to) {
    for (int d = 0; d < dim; d += 16) {
        const __m256i halves = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(row + d), _mm512_set1_ps(factor)));
        _mm256_mask_storeu_epi16(to + d, lanes(dim - d), halves);
    }
}

/* At most QUERIES queries of head `at`, from `first` on. */
static void attend(const attention_problem *p, int64_t at, int64_t first, int count, const scratch *s) {
    const int64_t batch = at / p->heads, head = at % p->heads;
    float most[QUERIES], sums[QUERIES] = {0};
    for (int m = 0; m < QUERIES; m++) most[m] = -INFINITY;
    memset(s->out, 0, QUERIES * s->width * sizeof *s->out);
    pack_queries(p->q + (at * p->queries + first) * p->dim, count, p->dim, s);
    for (int64_t key = 0; key < p->keys; key += KEYS) {
        const int keys = p->keys - key < KEYS ? (int)(p->keys - key) : KEYS, padded = padded_keys(keys);
        const int64_t scales = at * p->keys + key;
        for (int j = 0; j < padded; j += KEYS_AT_ONCE)
            multiply_keys(s, count, s->k + (key + j) * s->steps * LEVELS, s->score + j);
        for (int m = 0; m < count; m++) {
            const float before = most[m], q_scale = p->q_scale[at * p->queries + first + m] * p->scale * LOG2_E;
            const int64_t added = batch * p->bias_batch + head * p->bias_head + (first + m) * p->bias_query + key;
            float *row = s->score + m * KEYS;
            most[m] = score_row(row, keys, padded, q_scale, p->k_scale + scales, p->bias ? p->bias + added : 0, before);
            const float shrink = before == -INFINITY ? 0 : exp2f(before - most[m]);
            sums[m] = sums[m] * shrink + weigh_row(row, keys, padded, most[m], p->v_scale + scales);
            if (shrink != 1) scale_row(s->out + m * s->width, s->width, shrink);
        }
        multiply_values(s, count, s->v + key * s->width, padded);
    }
    for (int m = 0; m < count; m++) {
        uint16_t *to = (uint16_t *)p->out + ((batch * p->queries + first + m) * p->heads + head) * p->dim;
        write_row_as_bfloat16(s->out + m * s->width, (int)p->dim, sums[m] == 0 ? 0 : 1 / sums[m], to); /* no keys: 0 */
    }
}

static void worker(void *argument) {
    attention_problem *p = argument;
    scratch s = {.steps = (int)(p->dim + LEVELS - 1) / LEVELS, .width = (int)(p->dim + 2 * SIDE - 1) / (2 * SIDE) * (2 * SIDE)};
    const int64_t keys = padded_keys(p->keys), size = s.steps * LEVELS;
    const int64_t scores = QUERIES * KEYS * sizeof *s.score, outputs = QUERIES * s.width * sizeof *s.out;
    char *memory = aligned_alloc(64, scores + outputs + keys * s.width * sizeof *s.v + (keys + QUERIES) * size);
    if (!memory) {
        atomic_store(&p->failed, 1);
        return;
    }
    s.score = (float *)memory;
    s.out = (float *)(memory + scores);
    s.v = (uint16_t *)(memory + scores + outputs);
    s.q = (int8_t *)(s.v + keys * s.width);
    s.k = s.q + QUERIES * size;
    memset(s.score, 0, scores); /* rows that a short block leaves out are multiplied, too */
    tiles_begin();
    int64_t packed = -1;
    for (int64_t at, first, end; next_task(p, &at, &first, &end);) {
        if (at != packed) {
            pack_keys(p->k + at * p->keys * p->dim, p->keys, p->dim, &s);
            pack_values(p->v + at * p->keys * p->dim, p->keys, p->dim, &s);
            packed = at;
        }
        for (; first < end; first += QUERIES) attend(p, at, first, end - first < QUERIES ? (int)(end - first) : QUERIES, &s);
    }
    tiles_end();
    free(memory);
}

static int fits(const attention_problem *p) { return p->half && p->out_type == BFLOAT16 && p->dim <= LARGEST_HEAD; }

const attention_kernel attention_amx = {.name = "amx", .queries = QUERIES, .fits = fits, .worker = worker};
END_TARGET
#endif
