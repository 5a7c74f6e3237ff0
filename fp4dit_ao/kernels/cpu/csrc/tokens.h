/* Token-wise quantization, for what reads the levels at once. */
#ifndef FP4DIT_TOKENS_H
#define FP4DIT_TOKENS_H

#include <stdint.h>

typedef struct {
    int32_t type, mantissa_bits, digits; /* type: of the numbers; digits: of a level */
    float largest;                       /* level */
} token_format;

/* levels [digits][rows][features] and scale [rows] of x [rows][features], at most 64 rows; see fp4dit_tokens. */
void quantize_strip(const token_format *f, const void *x, int64_t rows, int64_t features, int8_t *levels, float *scale);

#endif
