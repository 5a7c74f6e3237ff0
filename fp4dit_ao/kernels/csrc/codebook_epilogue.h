/* The end of a linear with codebook groups, as plain loops: included by every kernel so that the compiler vectorises them for its
 * instruction set. */
#ifndef FP4DIT_CODEBOOK_EPILOGUE_H
#define FP4DIT_CODEBOOK_EPILOGUE_H

#include "codebook.h"

#include "epilogue.h"
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

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

INLINE void write_as(const codebook_output *o, const int digits, const int type) {
    float scale[FEATURES] = {0}, bias[FEATURES] = {0};
    const int size = type == FLOAT32 ? 4 : 2;
    const int past = o->past && size == 2 && o->features == FEATURES && !(((uintptr_t)o->out | (uintptr_t)o->stride) % 64);
    memcpy(scale, o->row_scale, o->features * sizeof *scale);
    if (o->bias) memcpy(bias, o->bias, o->features * sizeof *bias);
    char *out = o->out;
    for (int m = 0; m < o->tokens; m++, out += o->stride) {
        float y[FEATURES], s = o->token_scale[m];
        uint16_t half[FEATURES];
        to_float(o->sums + m * FEATURES, digits, y);
        for (int n = 0; n < FEATURES; n++) y[n] = y[n] * s * scale[n];
        if (o->bias) /* not always: -0 + 0 is 0 */
            for (int n = 0; n < FEATURES; n++) y[n] += bias[n];
        for (int n = 0; n < FEATURES; n++) half[n] = type == BFLOAT16 ? bfloat16(y[n]) : type == FLOAT16 ? float16(y[n]) : 0;
        const void *line = type == FLOAT32 ? (const void *)y : (const void *)half;
        if (past) stream(out, line);
        else if (o->features == FEATURES) memcpy(out, line, FEATURES * size);
        else memcpy(out, line, o->features * size);
    }
#if defined(__x86_64__)
    if (past) _mm_sfence();
#endif
}

static void write_output(const codebook_output *o) {
#define CASE(type, digits) \
    case 3 * type + digits: write_as(o, digits, type); return
    switch (3 * o->type + o->digits) {
        CASE(FLOAT32, 1);
        CASE(FLOAT32, 2);
        CASE(FLOAT32, 3);
        CASE(BFLOAT16, 1);
        CASE(BFLOAT16, 2);
        CASE(BFLOAT16, 3);
        CASE(FLOAT16, 1);
        CASE(FLOAT16, 2);
        CASE(FLOAT16, 3);
    }
#undef CASE
}

/* Rows as they are, padded with zeros; for kernels whose panels are rows, too. */
static __attribute__((unused)) void pack_rows(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *sum) {
    for (int m = 0; m < rows; m++, tokens += depth, strip += padded_depth(depth)) {
        memcpy(strip, tokens, depth);
        memset(strip + depth, 0, padded_depth(depth) - depth);
        sum[m] = 0;
        for (int64_t k = 0; k < depth; k++) sum[m] += tokens[k];
    }
}

static __attribute__((unused)) void pack_without_offset(const int8_t *tokens, int64_t depth, int rows, int8_t *strip,
                                                        int32_t *start) {
    pack_rows(tokens, depth, rows, strip, start);
    for (int m = 0; m < rows; m++) start[m] = 0;
}

static __attribute__((unused)) void pack_with_offset(const int8_t *tokens, int64_t depth, int rows, int8_t *strip,
                                                     int32_t *start) {
    pack_rows(tokens, depth, rows, strip, start);
    for (int m = 0; m < rows; m++) start[m] = (int32_t)(-128u * (uint32_t)start[m]); /* sums wrap, and end exact */
}

#endif
