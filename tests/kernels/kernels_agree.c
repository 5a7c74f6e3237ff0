/* Compares every kernel of this processor with the portable one, on random problems: bit for bit where codebooks keep sums whole,
 * and where group scales are one, so that float sums are exact; otherwise within float32's rounding. A kernel may refuse a group.
 * Prints the kernels' names, and "differs: ..." for a problem whose results differ. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *fp4dit_kernel(int index);
const char *fp4dit_codebook_kernel(int index);
int fp4dit_linear(const int8_t *, const float *, const uint8_t *, const float *, const int8_t *, const float *, void *, int64_t,
                  int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, void *, int32_t);
int fp4dit_codebook_linear(const int8_t *, const float *, const uint8_t *, const uint8_t *, const int8_t *, const float *,
                           const float *, void *, int64_t, int64_t, int64_t, int64_t, int32_t, int32_t, int32_t, void *, int32_t);

static uint32_t state = 1;
static uint32_t next(uint32_t below) {
    state = state * 1664525 + 1013904223;
    return (state >> 8) % below;
}
static int8_t level(void) { return (int8_t)((int)next(255) - 127); }
static float fraction(void) { return (float)next(1 << 16) / (1 << 16) + 0.5f; }

static void *room(int64_t bytes) { return calloc(1, bytes + 64); }

static int differ(const float *found, const float *expected, int64_t count, float most) {
    for (int64_t i = 0; i < count; i++)
        if (!(fabsf(found[i] - expected[i]) <= most)) return 1;
    return 0;
}

enum { REFUSED = 2 };

/* `exact`: scales are one, and the sums of 288 input features at most stay below 2^24. */
static int check(int exact) {
    int64_t rows = next(11) + 1, features = next(140) + 1, group = 4 * (next(24) + 1), groups = next(exact ? 3 : 12) + 1;
    int64_t depth = group * groups;
    int digits = next(3) + 1, biased = next(2), bad = 0;
    int8_t *tokens = room(digits * rows * depth), levels[16], codebooks[256];
    uint8_t *codes = room(features * depth / 2), *index = room(features * ((groups + 1) / 2));
    float *token_scale = room(4 * rows), *scale = room(4 * features * groups), *row_scale = room(4 * features), *bias = room(4 * features);
    float *found = room(4 * rows * features), *expected = room(4 * rows * features);
    if (exact) digits = 1;
    for (int64_t i = 0; i < digits * rows * depth; i++) tokens[i] = level();
    for (int i = 0; i < 16; i++) levels[i] = level();
    for (int i = 0; i < 256; i++) codebooks[i] = level();
    for (int64_t i = 0; i < features * depth / 2; i++) codes[i] = (uint8_t)next(256);
    for (int64_t i = 0; i < features * ((groups + 1) / 2); i++) index[i] = (uint8_t)next(256);
    for (int64_t i = 0; i < rows; i++) token_scale[i] = exact ? 1 : fraction();
    for (int64_t i = 0; i < features * groups; i++) scale[i] = exact ? 1 : fraction();
    for (int64_t i = 0; i < features; i++) row_scale[i] = fraction(), bias[i] = exact ? 0 : fraction();
    for (int kernel = 0; fp4dit_kernel(kernel + 1); kernel++) { /* but the last, which is the portable one */
        if (!*fp4dit_kernel(kernel)) continue;
        int last = kernel + 1;
        while (fp4dit_kernel(last + 1)) last++;
        int ended = fp4dit_linear(tokens, token_scale, codes, scale, levels, biased ? bias : NULL, found, rows, features, depth,
                                  group, features, digits, 0, kernel, NULL, 1);
        if (ended == REFUSED) continue;
        bad |= ended;
        bad |= fp4dit_linear(tokens, token_scale, codes, scale, levels, biased ? bias : NULL, expected, rows, features, depth,
                             group, features, digits, 0, last, NULL, 1);
        float most = 1e-6f * depth * 127 * 127 * 3 * (digits > 1 ? digits > 2 ? 16384 : 128 : 1);
        bad |= differ(found, expected, rows * features, exact ? 0 : most);
    }
    for (int kernel = 0; fp4dit_codebook_kernel(kernel + 1); kernel++) {
        if (!*fp4dit_codebook_kernel(kernel)) continue;
        int last = kernel + 1;
        while (fp4dit_codebook_kernel(last + 1)) last++;
        int ended = fp4dit_codebook_linear(tokens, token_scale, codes, index, codebooks, row_scale, biased ? bias : NULL, found,
                                           rows, features, depth, group, digits, 0, kernel, NULL, 1);
        if (ended == REFUSED) continue;
        bad |= ended;
        bad |= fp4dit_codebook_linear(tokens, token_scale, codes, index, codebooks, row_scale, biased ? bias : NULL, expected,
                                      rows, features, depth, group, digits, 0, last, NULL, 1);
        bad |= !!memcmp(found, expected, 4 * rows * features);
    }
    if (bad)
        printf("differs: %d rows, %d features, depth %d, groups of %d, %d digits%s\n", (int)rows, (int)features, (int)depth,
               (int)group, digits, exact ? ", exact" : "");
    void *all[] = {tokens, codes, index, token_scale, scale, row_scale, bias, found, expected};
    for (int i = 0; i < 9; i++) free(all[i]);
    return bad;
}

int main(int count, char **arguments) {
    int bad = 0;
    for (int i = 0; fp4dit_kernel(i); i++) printf("linear: %s\n", fp4dit_kernel(i));
    for (int i = 0; fp4dit_codebook_kernel(i); i++) printf("codebook: %s\n", fp4dit_codebook_kernel(i));
    for (int i = count > 1 ? atoi(arguments[1]) : 0; i > 0; i--) bad |= check(i % 2);
    return bad;
}
