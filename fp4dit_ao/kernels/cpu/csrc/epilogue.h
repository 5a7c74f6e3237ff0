/* Plain loops, included by every tile so that the compiler vectorises them for its instruction set. */
#ifndef FP4DIT_EPILOGUE_H
#define FP4DIT_EPILOGUE_H

#include <string.h>

#include "tile.h"

static __attribute__((unused)) int32_t sum_row(const int8_t *tokens, int depth) {
    int32_t total = 0;
    for (int i = 0; i < depth; i++) total += tokens[i];
    return total;
}

static __attribute__((unused)) int32_t pack_in_order(const int8_t *tokens, int depth, int8_t *to) {
    memcpy(to, tokens, depth);
    return sum_row(tokens, depth);
}

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint16_t bfloat16(float x) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded); /* NaN stays one */
}

static inline uint16_t float16(float x) {
    uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    /* below 2^-14, adding 1/2 leaves the nearest multiple of 2^-24 in the last bits */
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    uint32_t normal = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13; /* 65520 carries to infinity */
    uint32_t rounded = magnitude < 0x38800000 ? subnormal : normal;
    rounded = magnitude >= 0x47800000 ? 0x7c00 : rounded;
    rounded = magnitude > 0x7f800000 ? 0x7e00 : rounded;
    return (uint16_t)(sign | rounded);
}

static inline __attribute__((always_inline)) void write_row(const float *sums, float token_scale, const float *bias,
                                                            const int features, void *out, int type) {
    float y[PANEL];
    uint16_t half[PANEL];
    for (int n = 0; n < features; n++) y[n] = sums[n] * token_scale + bias[n];
    if (type == FLOAT32) {
        memcpy(out, y, features * sizeof *y);
        return;
    }
    if (type == BFLOAT16)
        for (int n = 0; n < features; n++) half[n] = bfloat16(y[n]);
    else
        for (int n = 0; n < features; n++) half[n] = float16(y[n]);
    memcpy(out, half, features * sizeof *half);
}

static __attribute__((unused)) void write_rows(const float *sums, int rows, const float *token_scale, const float *bias,
                                               int features, void *out, ptrdiff_t stride, int type, int past) {
    (void)past;
    float added[PANEL] = {0};
    if (bias) memcpy(added, bias, features * sizeof *bias);
    for (int m = 0; m < rows; m++, out = (char *)out + stride, sums += PANEL) {
        __builtin_prefetch((char *)out + 16 * stride, 1);
        __builtin_prefetch((char *)out + 16 * stride + 64, 1);
        if (features == PANEL) write_row(sums, token_scale[m], added, PANEL, out, type);
        else write_row(sums, token_scale[m], added, features, out, type);
    }
}

#endif
