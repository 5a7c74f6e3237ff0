/* A linear with codebook groups: what every instruction set implements, and all that differs between them.
 *
 * A weight is row_scale[n] * codebooks[index[n][k / group]][code[n][k]]. A strip is up to TOKENS tokens, a panel up to FEATURES
 * output features, both over all input features. A panel is decoded once for the strips of a block; sums are int32 to the end.
 * In which order a strip and a panel have the input features is the instruction set's own affair: it packs the tokens, too.
 */
#ifndef FP4DIT_CODEBOOK_H
#define FP4DIT_CODEBOOK_H

/* No fused multiply-add: every instruction set rounds as the specification in PyTorch does. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include <stddef.h>
#include <stdint.h>

#include "targets.h"

enum {
    FEATURES = 32,
    TOKENS = 32,
    STEP = 64, /* input features; a strip is padded to a multiple, with zeros */
    MOST_DIGITS = 3
};

typedef struct {
    const uint8_t *codes;        /* [features][depth / 2], two a byte, the first in the low nibble */
    const uint8_t *index;        /* [features][(depth / group + 1) / 2], likewise */
    const uint8_t (*tables)[16]; /* the sixteen codebooks, with the kernel's offset */
    int64_t features, depth, group;
} codebook_weights;

typedef struct {
    codebook_weights weights;
    const float *token_scale, *row_scale, *bias; /* token_scale: NULL if tokens are quantized on the way; bias may be NULL */
    void *out;                                   /* [rows][features] of `type` */
    int64_t rows;
    int32_t digits, type;
    int past; /* the output is written past the caches, whose space the tokens need */
} codebook_problem;

/* Some tokens, laid out, and memory to multiply them. */
typedef struct {
    int64_t first, count; /* tokens */
    int8_t *strips;       /* [strip][digit] */
    int32_t *start;       /* [strip][digit][TOKENS]: what sums start at, to undo `offset` */
    float *token_scale;   /* [count] */
    int32_t *sums;        /* [digit][TOKENS][FEATURES] */
    uint8_t *panel;       /* [FEATURES][padded_depth], and STEP bytes */
} codebook_block;

typedef struct {
    const char *name;
    int offset; /* added to every level in the tables: 128 where the instruction wants weights unsigned */
    int group;  /* a group's size is a multiple of this */
    int least;  /* rows from which it is quicker than the next kernel */
    int largest; /* level of a token, if it takes no others; 0 for all that int8 holds but -128 */
    /* Some state of a thread, set and released; NULL if there is none. */
    void (*begin)(void), (*end)(void);
    /* Lay out `rows` rows of `depth` levels as a strip; start[row] = -offset * sum of the row. */
    void (*pack)(const int8_t *tokens, int64_t depth, int rows, int8_t *strip, int32_t *start);
    /* The block's outputs of panels `panel` to `end`. */
    void (*multiply)(const codebook_problem *p, const codebook_block *b, int64_t panel, int64_t end);
} codebook_kernel;

/* Bytes that a token takes in a strip, and a feature in a panel. */
static inline int64_t padded_depth(int64_t depth) { return (depth + STEP - 1) / STEP * STEP; }

/* The indices of feature n's groups, and of these, or of codes, the i-th. */
static inline const uint8_t *index_row(const codebook_weights *w, int64_t n) {
    return w->index + n * ((w->depth / w->group + 1) / 2);
}
static inline int nibble(const uint8_t *packed, int64_t i) { return packed[i / 2] >> (i % 2 * 4) & 15; }

extern const codebook_kernel codebook_portable;
#if defined(__x86_64__)
extern const codebook_kernel codebook_avx2, codebook_avx2_bytes, codebook_avxvnni, codebook_avx512vnni;
#ifdef FP4DIT_AMX
extern const codebook_kernel codebook_amx;
#endif
#elif defined(__aarch64__)
extern const codebook_kernel codebook_dotprod;
#endif

#endif
