/* Token-wise quantization to levels of an ExMy format with mantissa bits: the arithmetic of formats.py, bit for bit. Levels beyond
 * an int8 are written as several digits to the base 128. */
#include <math.h>
#include <stdatomic.h>

#include "epilogue.h"
#include "threads.h"
#include "tokens.h"

enum {
    NUMBERS_AT_ONCE = 4096, /* in the first-level cache, of whatever type */
    ROWS_AT_ONCE = 64,
    LONG_STEP = 64, /* numbers of a row that are rounded at once */
    STEP = 16
};

#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const void *x;                                /* [batch][heads][tokens][features] of `type`, features side by side */
    int64_t heads, tokens, features;
    int64_t batch_stride, head_stride, token_stride;
    int8_t *levels;                               /* [digits][rows][features], the highest digit first */
    float *scale;                                 /* [rows] */
    int64_t rows, at_once;
    int32_t type, mantissa_bits, digits;
    float largest;
    atomic_llong next;
} tokens;

INLINE float widen_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = (uint32_t)(half & 0x7fff) << 13;
    uint32_t subnormal = bits_of(float_of(magnitude + 0x38800000) - 0x1p-14f);
    uint32_t bits = magnitude < 0x400 << 13 ? subnormal : magnitude + (magnitude < 0x7c00 << 13 ? 0x38000000 : 0x70000000);
    return float_of(bits | sign);
}

INLINE float value(const void *x, int64_t at, int type) {
    if (type == FLOAT32) return ((const float *)x)[at];
    uint16_t half = ((const uint16_t *)x)[at];
    return type == BFLOAT16 ? float_of((uint32_t)half << 16) : widen_half(half);
}

/* Of `count` numbers, or of `most` if that is larger: magnitudes sort like their bits, in every type; NaN is beyond infinity. */
INLINE int32_t largest_of(const void *x, int64_t count, const int type, int32_t most) {
    if (type == FLOAT32) {
        for (int64_t f = 0; f < count; f++) {
            int32_t magnitude = ((const int32_t *)x)[f] & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        return most;
    }
    int16_t half = (int16_t)most;
    for (int64_t f = 0; f < count; f++) {
        int16_t magnitude = ((const int16_t *)x)[f] & 0x7fff;
        half = magnitude > half ? magnitude : half;
    }
    return half;
}

/* The level nearest to y, ties to even: float32 itself rounds to multiples of 2^k where its own last bit is 2^k, which is
   beside 1.5 * 2^(k + 23). `lowest` is the bits of the lowest binade. */
INLINE int32_t nearest(float y, int32_t lowest, float anchor) {
    int32_t binade = (int32_t)(bits_of(y) & 0x7f800000);
    binade = binade < lowest ? lowest : binade;
    float beside = float_of((uint32_t)binade) * anchor;
    return (int32_t)((y + beside) - beside);
}

typedef struct {
    float scale, inverse, largest, anchor;
    int32_t lowest;
} rounding;

/* `count` numbers to levels, whose digits are `apart` from each other. If `quick`, x / scale is correctly rounded by one
 * correction of x times 1 / scale (Markstein): so it is for every x and absmax of 16 bits, which tests/test_native.py tries. */
INLINE void quantize_numbers(const void *x, int8_t *levels, const int count, const int type, const int digits, int64_t apart,
                             const int quick, rounding r) {
    for (int f = 0; f < count; f++) {
        float v = value(x, f, type), y;
        if (quick) {
            y = v * r.inverse;
            y = fmaf(fmaf(-y, r.scale, v), r.inverse, y);
        } else {
            y = v / r.scale;
            y = y > r.largest ? r.largest : y;
            y = y < -r.largest ? -r.largest : y;
            y = y == y ? y : 0;
        }
        int32_t level = nearest(y, r.lowest, r.anchor);
        if (digits == 3) levels[f] = (int8_t)(level / (128 * 128));
        if (digits >= 2) levels[f + (digits - 2) * apart] = (int8_t)(level / 128 % 128);
        levels[f + (digits - 1) * apart] = (int8_t)(digits == 1 ? level : level % 128);
    }
}

INLINE int32_t largest_of_row(const char *x, int64_t features, const int type) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    if (features < STEP) return largest_of(x, features, type, 0);
    int32_t most = largest_of(x, features / STEP * STEP, type, 0);
    return features % STEP ? largest_of(x + (features - STEP) * size, STEP, type, most) : most;
}

/* In steps of fixed numbers, which compilers vectorise whole; the last one begins where it fits. */
INLINE void quantize_row(const char *x, int8_t *levels, int64_t features, int64_t apart, const int type, const int digits,
                         const int quick, rounding r) {
    const int64_t size = type == FLOAT32 ? 4 : 2;
    int64_t f = 0;
    for (; f + LONG_STEP <= features; f += LONG_STEP)
        quantize_numbers(x + f * size, levels + f, LONG_STEP, type, digits, apart, quick, r);
    for (; f < features && features >= STEP; f += STEP) {
        f = f + STEP > features ? features - STEP : f;
        quantize_numbers(x + f * size, levels + f, STEP, type, digits, apart, quick, r);
    }
    if (features < STEP) quantize_numbers(x, levels, (int)features, type, digits, apart, quick, r);
}

/* Scales of all rows come first: a row's takes long to be known, but does not depend on the others. */
INLINE void quantize_rows_of(const tokens *p, int64_t first, int64_t end, const int type, const int digits) {
    const int64_t size = type == FLOAT32 ? 4 : 2, features = p->features;
    const float tiny = 0x1p-126f, huge = 0x1.fffffep127f;
    const char *x[ROWS_AT_ONCE];
    int64_t to[ROWS_AT_ONCE];
    float scale[ROWS_AT_ONCE];
    int count = (int)(end - first);
    for (int i = 0; i < count; i++) {
        int64_t row = first + i, head, token, batch;
        if (p->head_stride < p->token_stride) head = row % p->heads, token = row / p->heads % p->tokens;
        else token = row % p->tokens, head = row / p->tokens % p->heads;
        batch = row / p->tokens / p->heads;
        to[i] = (batch * p->heads + head) * p->tokens + token;
        x[i] = (const char *)p->x + (batch * p->batch_stride + head * p->head_stride + token * p->token_stride) * size;
    }
    for (int i = 0; i < count; i++) {
        int32_t most = largest_of_row(x[i], features, type);
        scale[i] = type == FLOAT32 ? float_of((uint32_t)most) : value(&(uint16_t){(uint16_t)most}, 0, type);
    }
    for (int i = 0; i < count; i++) {
        float s = scale[i] / p->largest;
        scale[i] = s < tiny ? tiny : s > huge ? huge : s; /* NaN stays */
    }
    rounding r = {.largest = p->largest, .anchor = 1.5f * 0x1p23f / (float)(1 << p->mantissa_bits),
                  .lowest = (127 + p->mantissa_bits) << 23};
    for (int i = 0; i < count; i++) {
        int8_t *levels = p->levels + to[i] * features;
        p->scale[to[i]] = r.scale = scale[i];
        r.inverse = 1 / scale[i];
        /* quick: nothing is NaN, infinite or beyond the largest level */
        if (FMA_IS_FAST && type != FLOAT32 && scale[i] > 0x1p-90f && scale[i] < 0x1p90f)
            quantize_row(x[i], levels, features, p->rows * features, type, digits, 1, r);
        else quantize_row(x[i], levels, features, p->rows * features, type, digits, 0, r);
    }
}

EVERY_PROCESSOR static void quantize_rows(const tokens *p, int64_t row, int64_t end) {
#define CASE(type, digits) \
    case 3 * type + digits: \
        quantize_rows_of(p, row, end, type, digits); \
        return
    switch (3 * p->type + p->digits) {
        EVERY_TYPE_AND_DIGITS;
    }
}

void quantize_strip(const token_format *f, const void *x, int64_t rows, int64_t features, int8_t *levels, float *scale) {
    tokens p = {.x = x, .heads = 1, .tokens = rows, .features = features, .head_stride = rows * features,
                .token_stride = features, .levels = levels, .scale = scale, .rows = rows, .type = f->type,
                .mantissa_bits = f->mantissa_bits, .digits = f->digits, .largest = f->largest};
    quantize_rows(&p, 0, rows);
}

static void worker(void *argument) {
    tokens *p = argument;
    for (;;) {
        int64_t row = atomic_fetch_add(&p->next, p->at_once);
        if (row >= p->rows) return;
        quantize_rows(p, row, row + p->at_once < p->rows ? row + p->at_once : p->rows);
    }
}

/* int8 levels [digits][rows][features], the highest of 1 to 3 digits first, and float32 scale [rows], of x
 * [batch][heads][count][features] of float32, bfloat16 or float16; features lie side by side, strides are in elements. */
void fp4dit_tokens(const void *x, int8_t *levels, float *scale, int64_t batch, int64_t heads, int64_t count, int64_t features,
                   int64_t batch_stride, int64_t head_stride, int64_t token_stride, int32_t type, int32_t mantissa_bits,
                   int32_t digits, float largest, parallel_function parallel, int32_t threads) {
    int64_t fit = NUMBERS_AT_ONCE / (features + 1) + 1;
    tokens p = {.x = x, .heads = heads, .tokens = count, .features = features, .batch_stride = batch_stride,
                .head_stride = head_stride, .token_stride = token_stride, .levels = levels, .scale = scale,
                .rows = batch * heads * count, .at_once = fit < ROWS_AT_ONCE ? fit : ROWS_AT_ONCE, .type = type,
                .mantissa_bits = mantissa_bits, .digits = digits, .largest = largest};
    run_on_threads(worker, &p, parallel, threads, p.rows * features / 32768 + 1);
}
