/* One tile of a product of small integers: what every instruction set implements, and all that differs between them.
 *
 * A panel is up to PANEL output features. Its weights, for CHUNK input features at most, are looked up in the table once and
 * laid out for dot products of four bytes. Then every row tile of tokens runs over them. In which order the input features of
 * a chunk come, and where a panel has them, is the instruction set's own affair: it packs the tokens, too.
 */
#ifndef FP4DIT_TILE_H
#define FP4DIT_TILE_H

#include <stddef.h>
#include <stdint.h>

#include "targets.h"

enum {
    PANEL = 64,  /* output features */
    CHUNK = 512, /* input features: up to them int32 sums of int8 products convert to float32 without loss */
    ROWS = 6     /* tokens in a register tile */
};

/* A panel's product with tokens, over the input features of a chunk: whole groups, or a part of one. */
typedef struct {
    const int8_t *tokens; /* [rows][groups][padded(depth)], packed; of several groups, none is padded */
    const uint8_t *panel; /* what `unpack` made of groups * depth input features */
    const int32_t *start; /* [groups][stride], the first `rows` of each: what a dot product starts at, to undo `offset` */
    ptrdiff_t stride;
    const float *scale; /* [groups][PANEL] */
    float *sums;        /* [rows][PANEL] */
    int rows, groups, depth;
    int first; /* nothing is in `sums` yet */
} product;

typedef struct {
    const char *name;
    int offset; /* added to every level in the table: 128 where the instruction wants weights unsigned */
    int group;  /* a group's size is a multiple of this */
    int least;  /* rows from which it is quicker than the next kernel */
    int spare;  /* rows that `multiply` may read past the last: their values do not matter */
    /* Some state of a thread, set and released; NULL if there is none. */
    void (*begin)(void), (*end)(void);
    /* Look up `features` rows of packed codes (two to a byte, low first; `stride` bytes apart) for `depth` input features. */
    void (*unpack)(const uint8_t *codes, ptrdiff_t stride, int features, int depth, const uint8_t table[16], uint8_t *panel);
    /* Copy `depth` levels of one token to `to`, which has room for padded(depth); their sum. */
    int32_t (*pack)(const int8_t *tokens, int depth, int8_t *to);
    /* sums[row][PANEL] += scale[group][PANEL] * (tokens . weights), group by group. */
    void (*multiply)(const product *p);
    /* out[row][features] = sums * token_scale[row] + bias (or NULL), rounded to nearest even; `stride` bytes from row to row.
     * `past`: the whole output is too large to stay in a cache. */
    void (*write)(const float *sums, int rows, const float *token_scale, const float *bias, int features, void *out,
                  ptrdiff_t stride, int type, int past);
} tile_kernel;

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* The cases of a switch over 3 * type + digits: CASE(type, digits) for every pair that loops are compiled for. */
#define EVERY_TYPE_AND_DIGITS \
    CASE(FLOAT32, 1); \
    CASE(FLOAT32, 2); \
    CASE(FLOAT32, 3); \
    CASE(BFLOAT16, 1); \
    CASE(BFLOAT16, 2); \
    CASE(BFLOAT16, 3); \
    CASE(FLOAT16, 1); \
    CASE(FLOAT16, 2); \
    CASE(FLOAT16, 3)

/* Bytes that a packed token takes. */
static inline int padded(int depth) { return (depth + 7) / 8 * 8; }

extern const tile_kernel tile_portable;
#if defined(__x86_64__)
extern const tile_kernel tile_avx2, tile_avxvnni, tile_avx512vnni;
#ifdef FP4DIT_AMX
extern const tile_kernel tile_amx;
#endif
#elif defined(__aarch64__)
extern const tile_kernel tile_dotprod;
#endif

#endif
