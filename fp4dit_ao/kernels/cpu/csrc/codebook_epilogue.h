/* The end of a linear with codebook groups, as plain loops: included by every kernel so that the compiler vectorises them for its
 * instruction set. */
#ifndef FP4DIT_CODEBOOK_EPILOGUE_H
#define FP4DIT_CODEBOOK_EPILOGUE_H

#include "codebook.h"

#include "epilogue.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif


/* One token's sums to floats. Several digits are added exactly: a float64 holds any sum of three. */
INLINE void to_float(const int32_t *sums, const int digits, float *y) {
    if (digits == 1) {
        for (int n = 0; n < FEATURES; n++) y[n] = (float)sums[n];
        return;
    }
    for (int n = 0; n < FEATURES; n++) {
        double total = (double)sums[n] * 128 + sums[TOKENS * FEATURES + n];
        if (digits == 3) total = total * 128 + sums[2 * TOKENS * FEATURES + n];
        y[n] = (float)total;
    }
}

/* Sixty-four bytes past the caches. */
INLINE void stream(void *out, const void *line) {
#if defined(__x86_64__)
    for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)out + i, _mm_loadu_si128((const __m128i *)line + i));
#else
    memcpy(out, line, 64);
#endif
}

/* Sums of up to TOKENS tokens and FEATURES features, and where they go. */
typedef struct {
    const int32_t *sums; /* [digit][TOKENS][FEATURES] */
    const float *token_scale, *row_scale, *bias;
    char *out;
    int64_t stride; /* bytes from token to token */
    int tokens, features, digits, type;
    int past; /* see codebook_problem */
} tile_output;

static tile_output output_at(const codebook_problem *p, const codebook_block *b, int64_t token, int64_t feature) {
    const int64_t end = b->first + b->count;
    const int64_t features = p->weights.features, size = p->type == FLOAT32 ? 4 : 2;
    return (tile_output){
        .sums = b->sums, .token_scale = b->token_scale + (token - b->first), .row_scale = p->row_scale + feature,
        .bias = p->bias ? p->bias + feature : NULL, .out = (char *)p->out + (token * features + feature) * size,
        .stride = features * size, .tokens = end - token < TOKENS ? (int)(end - token) : TOKENS,
        .features = features - feature < FEATURES ? (int)(features - feature) : FEATURES, .digits = p->digits, .type = p->type,
        .past = p->past,
    };
}

/* `features` is FEATURES where it is a constant: then nothing is copied. */
INLINE void write_as(const tile_output *o, const int features, const int digits, const int type) {
    const int size = type == FLOAT32 ? 4 : 2;
    const int past = o->past && size == 2 && features == FEATURES && !(((uintptr_t)o->out | (uintptr_t)o->stride) % 64);
    float scale[FEATURES] = {0}, bias[FEATURES];
    for (int n = 0; n < FEATURES; n++) bias[n] = -0.0f; /* changes no number, not even 0 */
    memcpy(scale, o->row_scale, features * sizeof *scale);
    if (o->bias) memcpy(bias, o->bias, features * sizeof *bias);
    char *out = o->out;
    for (int token = 0; token < o->tokens; token++, out += o->stride) {
        const float s = o->token_scale[token];
        float y[FEATURES];
        uint16_t half[FEATURES];
        to_float(o->sums + token * FEATURES, digits, y);
        for (int n = 0; n < FEATURES; n++) y[n] = y[n] * s * scale[n] + bias[n];
        for (int n = 0; n < FEATURES; n++) half[n] = type == BFLOAT16 ? bfloat16(y[n]) : type == FLOAT16 ? float16(y[n]) : 0;
        const void *line = type == FLOAT32 ? (const void *)y : (const void *)half;
        if (past) stream(out, line);
        else memcpy(out, line, features * size);
    }
}

/* Streamed stores come before whatever the thread stores next. */
INLINE void end_streams(void) {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

/* out = float(sums) * token_scale * row_scale + bias, rounded after each operation. */
static void write_tile(const tile_output *o) {
#define CASE(type, digits) \
    case 3 * type + digits: \
        if (o->features == FEATURES) write_as(o, FEATURES, digits, type); \
        else write_as(o, o->features, digits, type); \
        return
    switch (3 * o->type + o->digits) {
        EVERY_TYPE_AND_DIGITS;
    }
#undef CASE
}

#endif
