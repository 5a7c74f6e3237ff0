/* Attention on AVX-512 VNNI. Levels of two int8 digits (128 * high + low) are multiplied as int16. */
#include <math.h>
#include <stdlib.h>

#include "attention.h"
#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")
#include "epilogue.h"

enum {
    LANES = 16,
    QUERIES = 24, /* in a block */
    KEYS = 256,   /* in a block: 24 x 256 scores stay in the first-level cache */
    ROWS_QK = 6,  /* in a register tile of scores, by 64 keys: 24 sums */
    ROWS_PV = 4,  /* in a register tile of outputs, by at most VECTORS vectors: 20 sums */
    VECTORS = 5
};

typedef struct {
    uint32_t *k;  /* [key / 64][word][64]: a word is four int8 plus 128, or two int16 */
    float *v;     /* [key][vectors * 16]; or pairs of bfloat16 [key / 2][vectors * 16][2] */
    uint32_t *q;  /* [QUERIES][word]: four int8, or two int16 */
    int32_t *sum; /* of each query's int8 levels */
    float *score; /* [QUERIES][KEYS], then weights; bfloat16 weights in the front half of each row */
    float *out;   /* [QUERIES][vectors * 16] */
    int words, vectors, half; /* half: weights and values in bfloat16 */
} scratch;

#define DOT_BYTES(sum, keys, queries) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(queries))
#define DOT_WORDS(sum, keys, queries) __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(keys), "v"(queries))

/* e^x for x <= 0; 0 from where a result could be subnormal, which takes the processor long. NaN stays NaN: of two operands, max
 * returns the second. */
INLINE __m512 exponential(__m512 x) {
    const __m512 least = _mm512_set1_ps(-86.6f); /* e^least = 2^-124.9 */
    const __mmask16 normal = _mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ);
    x = _mm512_max_ps(least, x);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(normal, p, n);
}

/* Word `w` of a token: bytes, or int16 made of two digits, `other` bytes apart. */
INLINE uint32_t word(const int8_t *token, int64_t w, int64_t dim, int64_t other, const int wide) {
    uint32_t word = 0;
    if (!wide) {
        memcpy(&word, token + 4 * w, dim - 4 * w < 4 ? dim - 4 * w : 4);
        return word;
    }
    for (int64_t i = 0; i < 2 && 2 * w + i < dim; i++) {
        int level = token[2 * w + i] * 128 + token[2 * w + i + other];
        word |= (uint32_t)(uint16_t)level << 16 * i;
    }
    return word;
}

static void pack_keys(const attention_problem *p, int64_t head, scratch *s) {
    const int8_t *k = p->k + head * p->keys * p->dim;
    const int wide = p->digits == 2;
    int64_t padded = (p->keys + 63) / 64 * 64, other = p->batch * p->heads * p->keys * p->dim;
    memset(s->k, wide ? 0 : 128, padded * s->words * 4);
    for (int64_t j = 0; j < p->keys; j++, k += p->dim) {
        uint32_t *to = s->k + j / 64 * s->words * 64 + j % 64;
        if (wide)
            for (int64_t w = 0; w < s->words; w++) to[w * 64] = word(k, w, p->dim, other, 1);
        else
            for (int64_t w = 0; w < s->words; w++) to[w * 64] = word(k, w, p->dim, other, 0) ^ 0x80808080;
    }
}

static void pack_values(const attention_problem *p, int64_t head, scratch *s) {
    const int8_t *v = p->v + head * p->keys * p->dim;
    int64_t width = s->vectors * LANES, padded = (p->keys + 63) / 64 * 64, other = p->batch * p->heads * p->keys * p->dim;
    memset(s->v, 0, padded * width * (s->half ? 2 : 4));
    for (int64_t j = 0; j < p->keys; j++, v += p->dim)
        if (s->half) {
            uint16_t *to = (uint16_t *)s->v + j / 2 * width * 2 + j % 2;
            for (int64_t d = 0; d < p->dim; d++) to[2 * d] = (uint16_t)(bits_of(v[d]) >> 16);
        } else if (p->digits == 2)
            for (int64_t d = 0; d < p->dim; d++) s->v[j * width + d] = (float)(v[d] * 128 + v[d + other]);
        else
            for (int64_t d = 0; d < p->dim; d++) s->v[j * width + d] = v[d];
}

/* Scores of ROWS_QK queries, `rows` of them real, and 64 keys, from `count` keys on -inf; each query's largest into `most`. */
INLINE void score_tile(const int wide, const uint32_t *q, const int32_t *sum, const uint32_t *k, int words,
                       const float *q_scale, const float *k_scale, int count, const float *bias, int64_t bias_query, int rows,
                       float *score, float *most) {
    __m512i dot[ROWS_QK][4];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS_QK; m++)
        dot[m][0] = dot[m][1] = dot[m][2] = dot[m][3] = _mm512_set1_epi32(wide ? 0 : -128 * sum[m]);
    for (int w = 0; w < words; w++, k += 64) {
        __m512i k0 = _mm512_loadu_si512(k), k1 = _mm512_loadu_si512(k + 16);
        __m512i k2 = _mm512_loadu_si512(k + 32), k3 = _mm512_loadu_si512(k + 48);
#pragma GCC unroll 6
        for (int m = 0; m < ROWS_QK; m++) {
            __m512i a = _mm512_set1_epi32((int32_t)q[m * words + w]);
            if (wide) {
                DOT_WORDS(dot[m][0], k0, a);
                DOT_WORDS(dot[m][1], k1, a);
                DOT_WORDS(dot[m][2], k2, a);
                DOT_WORDS(dot[m][3], k3, a);
            } else {
                DOT_BYTES(dot[m][0], k0, a);
                DOT_BYTES(dot[m][1], k1, a);
                DOT_BYTES(dot[m][2], k2, a);
                DOT_BYTES(dot[m][3], k3, a);
            }
        }
    }
    const __m512 none = _mm512_set1_ps(-INFINITY);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS_QK; m++) {
        __m512 top = none;
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            int left = count - 16 * j;
            __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
            __m512 scales = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, k_scale + 16 * j), _mm512_set1_ps(q_scale[m]));
            __m512 x = _mm512_mul_ps(_mm512_cvtepi32_ps(dot[m][j]), scales);
            if (bias) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, bias + (m < rows ? m : 0) * bias_query + 16 * j));
            x = _mm512_mask_mov_ps(none, mask, x);
            _mm512_storeu_ps(score + m * KEYS + 16 * j, x);
            top = _mm512_max_ps(x, top); /* of a NaN and a number, the number */
        }
        float largest = _mm512_reduce_max_ps(top);
        if (largest > most[m]) most[m] = largest;
    }
}

/* Scores to weights (with the value's scale), in place; returns the sum of the exponentials. */
INLINE float weigh(float *score, int keys, float most, const float *v_scale, int count) {
    __m512 sum = _mm512_setzero_ps(), shift = _mm512_set1_ps(most == -INFINITY ? 0 : most);
    for (int j = 0; j < keys; j += 16) {
        int left = count - j;
        __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1 << left) - 1);
        __m512 p = exponential(_mm512_sub_ps(_mm512_loadu_ps(score + j), shift));
        sum = _mm512_add_ps(sum, p);
        _mm512_storeu_ps(score + j, _mm512_mul_ps(p, _mm512_maskz_loadu_ps(mask, v_scale + j)));
    }
    return _mm512_reduce_add_ps(sum);
}

/* out[ROWS_PV][n vectors] += weights . values, of `keys` keys, in float32 */
INLINE void value_tile(const int n, const float *weights, const float *v, int64_t width, int keys, float *out) {
    __m512 sum[ROWS_PV][VECTORS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS_PV; m++)
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) sum[m][i] = _mm512_loadu_ps(out + m * width + i * LANES);
    for (int j = 0; j < keys; j++, v += width) {
        __m512 value[VECTORS];
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) value[i] = _mm512_loadu_ps(v + i * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS_PV; m++) {
            __m512 w = _mm512_set1_ps(weights[m * KEYS + j]);
#pragma GCC unroll 5
            for (int i = 0; i < n; i++) sum[m][i] = _mm512_fmadd_ps(w, value[i], sum[m][i]);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS_PV; m++)
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) _mm512_storeu_ps(out + m * width + i * LANES, sum[m][i]);
}

static void values(const float *weights, const float *v, int vectors, int keys, float *out) {
    int64_t width = vectors * LANES;
    for (int m = 0; m < QUERIES; m += ROWS_PV, weights += ROWS_PV * KEYS, out += ROWS_PV * width)
        for (int i = 0; i < vectors;) {
            int n = vectors - i > VECTORS ? (vectors - i < 2 * VECTORS ? (vectors - i + 1) / 2 : VECTORS) : vectors - i;
            switch (n) {
            case 1: value_tile(1, weights, v + i * LANES, width, keys, out + i * LANES); break;
            case 2: value_tile(2, weights, v + i * LANES, width, keys, out + i * LANES); break;
            case 3: value_tile(3, weights, v + i * LANES, width, keys, out + i * LANES); break;
            case 4: value_tile(4, weights, v + i * LANES, width, keys, out + i * LANES); break;
            default: value_tile(5, weights, v + i * LANES, width, keys, out + i * LANES);
            }
            i += n;
        }
}

#define BFLOAT16_UNIT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")))

/* The same of pairs of bfloat16 weights and values. */
INLINE BFLOAT16_UNIT void half_value_tile(const int n, const uint16_t *weights, const uint16_t *v, int64_t width, int keys,
                                          float *out) {
    __m512 sum[ROWS_PV][VECTORS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS_PV; m++)
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) sum[m][i] = _mm512_loadu_ps(out + m * width + i * LANES);
    for (int j = 0; j < keys; j += 2, v += 2 * width) {
        __m512i value[VECTORS];
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) value[i] = _mm512_loadu_si512(v + i * 2 * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS_PV; m++) {
            int32_t two;
            memcpy(&two, weights + m * 2 * KEYS + j, 4);
            __m512i w = _mm512_set1_epi32(two);
#pragma GCC unroll 5
            for (int i = 0; i < n; i++) sum[m][i] = _mm512_dpbf16_ps(sum[m][i], (__m512bh)value[i], (__m512bh)w);
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS_PV; m++)
#pragma GCC unroll 5
        for (int i = 0; i < n; i++) _mm512_storeu_ps(out + m * width + i * LANES, sum[m][i]);
}

static BFLOAT16_UNIT void half_values(float *score, const uint16_t *v, int vectors, int keys, float *out) {
    int64_t width = vectors * LANES;
    for (int m = 0; m < QUERIES; m++) {
        float *row = score + m * KEYS;
        for (int j = 0; j < keys; j += 16)
            _mm256_storeu_si256((__m256i *)((uint16_t *)row + j), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row + j)));
    }
    const uint16_t *weights = (const uint16_t *)score;
    for (int m = 0; m < QUERIES; m += ROWS_PV, weights += ROWS_PV * 2 * KEYS, out += ROWS_PV * width)
        for (int i = 0; i < vectors;) {
            int n = vectors - i > VECTORS ? (vectors - i < 2 * VECTORS ? (vectors - i + 1) / 2 : VECTORS) : vectors - i;
            const uint16_t *from = v + i * 2 * LANES;
            switch (n) {
            case 1: half_value_tile(1, weights, from, width, keys, out + i * LANES); break;
            case 2: half_value_tile(2, weights, from, width, keys, out + i * LANES); break;
            case 3: half_value_tile(3, weights, from, width, keys, out + i * LANES); break;
            case 4: half_value_tile(4, weights, from, width, keys, out + i * LANES); break;
            default: half_value_tile(5, weights, from, width, keys, out + i * LANES);
            }
            i += n;
        }
}

/* At most QUERIES queries of one head, from `first` on. */
static void attend(attention_problem *p, int64_t batch, int64_t head, int64_t first, int count, scratch *s) {
    int64_t at = batch * p->heads + head, width = s->vectors * LANES;
    float most[QUERIES], sums[QUERIES] = {0}, q_scale[QUERIES] = {0};
    memset(s->sum, 0, QUERIES * sizeof *s->sum);
    memset(s->q, 0, QUERIES * s->words * 4);
    memset(s->out, 0, QUERIES * width * sizeof *s->out);
    for (int m = 0; m < QUERIES; m++) most[m] = -INFINITY;
    for (int m = 0; m < count; m++) {
        const int8_t *query = p->q + (at * p->queries + first + m) * p->dim;
        for (int64_t w = 0; w < s->words; w++)
            s->q[m * s->words + w] = word(query, w, p->dim, p->batch * p->heads * p->queries * p->dim, p->digits == 2);
        s->sum[m] = sum_row(query, (int)p->dim);
        q_scale[m] = p->q_scale[at * p->queries + first + m] * p->scale;
    }
    for (int64_t key = 0; key < p->keys; key += KEYS) {
        int keys = p->keys - key < KEYS ? (int)(p->keys - key) : KEYS, padded = (keys + 63) / 64 * 64;
        float before[QUERIES];
        memcpy(before, most, sizeof most);
        for (int j = 0; j < padded; j += 64)
            for (int m = 0; m < count; m += ROWS_QK) {
                const float *bias = p->bias ? p->bias + batch * p->bias_batch + head * p->bias_head +
                                                  (first + m) * p->bias_query + key + j : NULL;
                const uint32_t *q = s->q + m * s->words, *k = s->k + (key + j) * s->words;
                const float *k_scale = p->k_scale + at * p->keys + key + j;
                float *score = s->score + m * KEYS + j;
                if (p->digits == 2)
                    score_tile(1, q, s->sum + m, k, s->words, q_scale + m, k_scale, keys - j, bias, p->bias_query, count - m,
                               score, most + m);
                else
                    score_tile(0, q, s->sum + m, k, s->words, q_scale + m, k_scale, keys - j, bias, p->bias_query, count - m,
                               score, most + m);
            }
        for (int m = 0; m < count; m++) {
            float shrink = before[m] == -INFINITY ? 0 : expf(before[m] - most[m]);
            sums[m] = sums[m] * shrink + weigh(s->score + m * KEYS, padded, most[m], p->v_scale + at * p->keys + key, keys);
            if (shrink != 1)
                for (int64_t d = 0; d < width; d++) s->out[m * width + d] *= shrink;
        }
        if (s->half) half_values(s->score, (uint16_t *)s->v + key * width, s->vectors, padded, s->out);
        else values(s->score, s->v + key * width, s->vectors, padded, s->out);
    }
    for (int m = 0; m < count; m++) {
        int64_t to = ((batch * p->queries + first + m) * p->heads + head) * p->dim;
        float inverse = sums[m] == 0 ? 0 : 1 / sums[m]; /* nothing to attend to: 0 */
        const float *from = s->out + m * width;
        for (int64_t d = 0; d < p->dim; d++) {
            float y = from[d] * inverse;
            if (p->out_type == FLOAT32) ((float *)p->out)[to + d] = y;
            else ((uint16_t *)p->out)[to + d] = p->out_type == BFLOAT16 ? bfloat16(y) : float16(y);
        }
    }
}

static void worker(void *argument) {
    attention_problem *p = argument;
    scratch s = {.words = (int)(p->digits == 2 ? (p->dim + 1) / 2 : (p->dim + 3) / 4),
                 .vectors = (int)(p->dim + LANES - 1) / LANES,
                 .half = p->half && __builtin_cpu_supports("avx512bf16")};
    int64_t padded = (p->keys + 63) / 64 * 64, width = s.vectors * LANES, packed = -1;
    s.v = malloc((padded * width + QUERIES * (KEYS + width + 1)) * sizeof *s.v + (padded + QUERIES) * s.words * 4);
    if (!s.v) {
        atomic_store(&p->failed, 1);
        return;
    }
    s.score = s.v + padded * width;
    s.out = s.score + QUERIES * KEYS;
    s.sum = (int32_t *)(s.out + QUERIES * width);
    s.k = (uint32_t *)(s.sum + QUERIES);
    s.q = s.k + padded * s.words;
    memset(s.score, 0, QUERIES * KEYS * sizeof *s.score); /* rows that a short block leaves out are multiplied, too */
    for (int64_t at, first, end; next_task(p, &at, &first, &end);) {
        if (at != packed) {
            pack_keys(p, at, &s);
            pack_values(p, at, &s);
            packed = at;
        }
        for (; first < end; first += QUERIES)
            attend(p, at / p->heads, at % p->heads, first, end - first < QUERIES ? (int)(end - first) : QUERIES, &s);
    }
    free(s.v);
}

static int fits(const attention_problem *p) { return p->dim <= LARGEST_HEAD; }

const attention_kernel attention_avx512vnni = {.name = "avx512vnni", .queries = QUERIES, .fits = fits, .worker = worker};
END_TARGET
#endif
