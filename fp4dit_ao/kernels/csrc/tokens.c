/* Token-wise quantization to int8 levels of an ExMy format with mantissa bits: the arithmetic of formats.py, bit for bit. */
#include <math.h>
#include <stdatomic.h>

#include "epilogue.h"
#include "threads.h"

enum { ROWS_AT_ONCE = 8 };

typedef struct {
    const void *x; /* [rows][features] of `type` */
    int8_t *levels;
    float *scale; /* [rows] */
    int64_t rows, features;
    int32_t type, mantissa_bits;
    float largest;
    atomic_llong next;
} tokens;

static inline float widen_half(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, magnitude = half & 0x7fff;
    float normal = float_of((magnitude << 13) + 0x38000000), subnormal = (float)magnitude * 0x1p-24f;
    float infinite = float_of(0x7f800000 | (magnitude & 0x3ff) << 13);
    float value = magnitude < 0x400 ? subnormal : magnitude >= 0x7c00 ? infinite : normal;
    return float_of(bits_of(value) | sign);
}

static inline __attribute__((always_inline)) float value(const void *x, int64_t at, int type) {
    if (type == FLOAT32) return ((const float *)x)[at];
    uint16_t half = ((const uint16_t *)x)[at];
    return type == BFLOAT16 ? float_of((uint32_t)half << 16) : widen_half(half);
}

/* The largest magnitude. Magnitudes sort like their bits, in every type; NaN is beyond infinity. */
static inline __attribute__((always_inline)) float absmax(const void *x, int64_t at, int64_t features, int type) {
    if (type == FLOAT32) {
        int32_t most = 0;
        for (int64_t f = 0; f < features; f++) {
            int32_t magnitude = (int32_t)(bits_of(value(x, at + f, type)) & 0x7fffffff);
            most = magnitude > most ? magnitude : most;
        }
        return float_of((uint32_t)most);
    }
    int16_t most = 0;
    for (int64_t f = 0; f < features; f++) {
        int16_t magnitude = (int16_t)(((const uint16_t *)x)[at + f] & 0x7fff);
        most = magnitude > most ? magnitude : most;
    }
    return value(&most, 0, type);
}

/* The level nearest to y, ties to even: float32 itself rounds to multiples of 2^k where its own last bit is 2^k, which is
   beside 1.5 * 2^(k + 23). `lowest` is the bits of the lowest binade. */
static inline __attribute__((always_inline)) int8_t nearest(float y, int32_t lowest, float anchor) {
    int32_t binade = (int32_t)(bits_of(y) & 0x7f800000);
    binade = binade < lowest ? lowest : binade;
    float beside = float_of((uint32_t)binade) * anchor;
    return (int8_t)(int32_t)((y + beside) - beside);
}

/* One row: absmax / largest as the scale, and the nearest levels. */
static inline __attribute__((always_inline)) void quantize_row(const tokens *p, int64_t row, int type) {
    const int64_t start = row * p->features, features = p->features;
    const void *restrict x = p->x;
    int8_t *restrict levels = p->levels + start;
    const float largest = p->largest, tiny = 0x1p-126f, huge = 0x1.fffffep127f;
    float scale = absmax(x, start, features, type) / largest;
    scale = scale < tiny ? tiny : scale > huge ? huge : scale; /* NaN stays */
    p->scale[row] = scale;
    const int32_t lowest = (127 + p->mantissa_bits) << 23;
    const float anchor = 1.5f * 0x1p23f / (float)(1 << p->mantissa_bits);
    if (FMA_IS_FAST && type != FLOAT32 && scale > 0x1p-90f && scale < 0x1p90f) {
        /* x / scale, correctly rounded, by one correction of x times 1 / scale (Markstein): so it is for every x and absmax
           of 16 bits, which tests/test_native.py tries. Nothing here is NaN, infinite or beyond the largest level. */
        const float inverse = 1 / scale;
        for (int64_t f = 0; f < features; f++) {
            float v = value(x, start + f, type), y = v * inverse;
            y = fmaf(fmaf(-y, scale, v), inverse, y);
            levels[f] = nearest(y, lowest, anchor);
        }
        return;
    }
    for (int64_t f = 0; f < features; f++) {
        float y = value(x, start + f, type) / scale;
        y = y > largest ? largest : y;
        y = y < -largest ? -largest : y;
        y = y == y ? y : 0;
        levels[f] = nearest(y, lowest, anchor);
    }
}

EVERY_PROCESSOR static void quantize_rows(tokens *p, int64_t row, int64_t end) {
    if (p->type == FLOAT32)
        for (; row < end; row++) quantize_row(p, row, FLOAT32);
    else if (p->type == BFLOAT16)
        for (; row < end; row++) quantize_row(p, row, BFLOAT16);
    else
        for (; row < end; row++) quantize_row(p, row, FLOAT16);
}

static void worker(void *argument) {
    tokens *p = argument;
    for (;;) {
        int64_t row = atomic_fetch_add(&p->next, ROWS_AT_ONCE);
        if (row >= p->rows) return;
        quantize_rows(p, row, row + ROWS_AT_ONCE < p->rows ? row + ROWS_AT_ONCE : p->rows);
    }
}

/* levels [rows][features] and scale [rows] of x [rows][features] in float32, bfloat16 or float16. */
void fp4dit_tokens(const void *x, int8_t *levels, float *scale, int64_t rows, int64_t features, int32_t type,
                   int32_t mantissa_bits, float largest, parallel_function parallel, int32_t threads) {
    tokens p = {.x = x, .levels = levels, .scale = scale, .rows = rows, .features = features, .type = type,
                .mantissa_bits = mantissa_bits, .largest = largest};
    run_on_threads(worker, &p, parallel, threads, rows * features / 32768 + 1);
}
