/* y = (tokens . weights^T) * token_scale * row_scale + bias: int8 tokens, 4-bit weights with a codebook for every group. Sums
 * are int32 over all input features, so that every kernel gives the same bits.
 *
 * Threads take a block of tokens and some panels of features at a time. They lay the block out once, in their second-level
 * cache, and decode each panel for it. Digits of a token are strips of their own, whose sums are added at the end. */
#include <stdatomic.h>
#include <string.h>

#include "codebook.h"

#include "processor.h"
#include "scratch.h"
#include "threads.h"
#include "tile.h"
#include "tokens.h"

enum {
    CACHED_TOKENS = 1200 << 10, /* bytes of a block, beside a panel in the second-level cache */
    CACHED_OUTPUT = 2 << 20,    /* bytes of a thread's output that may stay there until they are read */
    TURNS = 3                   /* tasks for every thread, so that all end together */
};

typedef struct {
    codebook_problem problem;
    const codebook_kernel *kernel;
    const int8_t *tokens;
    const void *x; /* what tokens are quantized from, if they are not given */
    token_format format;
    int64_t block, blocks, parts, panels; /* block: tokens */
    uint8_t tables[16][16];
    atomic_llong next;
    atomic_int failed;
} work;

static const codebook_kernel *const kernels[] = {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    &codebook_amx,
#endif
    &codebook_avx512vnni, &codebook_avxvnni, &codebook_avx2, &codebook_avx2_bytes,
#elif defined(__aarch64__)
    &codebook_dotprod,
#endif
    &codebook_portable,
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

static int supported(const codebook_kernel *kernel) {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    if (kernel == &codebook_amx) return has_amx();
#endif
    if (kernel == &codebook_avx512vnni) return has_avx512vnni();
    if (kernel == &codebook_avxvnni) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
    if (kernel == &codebook_avx2 || kernel == &codebook_avx2_bytes)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    if (kernel == &codebook_dotprod) return has_dot_product();
#endif
    return kernel == &codebook_portable;
}

/* The name of kernel `index`, best first; NULL past the last. What this processor lacks is an empty name. */
const char *fp4dit_codebook_kernel(int index) {
    static atomic_int known[KERNELS]; /* 1 + whether it is supported: asking takes long */
    if (index < 0 || index >= KERNELS) return NULL;
    if (!atomic_load(&known[index])) atomic_store(&known[index], 1 + supported(kernels[index]));
    return atomic_load(&known[index]) == 2 ? kernels[index]->name : "";
}

/* Whether all levels of the tokens are from -largest to largest. Tokens that are quantized on the way have their format's levels,
 * and digits up to 127. */
static int levels_within(const work *w, int64_t rows, int largest) {
    const int64_t count = rows * w->problem.weights.depth * w->problem.digits;
    if (w->x) return w->problem.digits == 1 && w->format.largest <= (float)largest;
    for (int64_t first = 0; first < count; first += 4096) {
        const int64_t end = first + 4096 < count ? first + 4096 : count;
        uint8_t most = 0;
        for (int64_t i = first; i < end; i++) {
            const uint8_t shifted = (uint8_t)(w->tokens[i] + largest); /* 0 to 2 * largest, if it is within */
            most = shifted > most ? shifted : most;
        }
        if (most > 2 * largest) return 0;
    }
    return 1;
}

/* The `asked` kernel, or for -1 the best one for `rows` rows and these tokens; NULL if there is no such. */
static const codebook_kernel *choose(int asked, const work *w, int64_t rows) {
    for (int i = asked < 0 ? 0 : asked; i < (asked < 0 ? KERNELS : asked + 1); i++) {
        const char *name = fp4dit_codebook_kernel(i);
        const codebook_kernel *kernel = kernels[i];
        if (!name || !*name || w->problem.weights.group % kernel->group) continue;
        if (asked < 0 && rows * w->problem.digits < kernel->least) continue;
        if (kernel->largest && !levels_within(w, rows, kernel->largest)) continue;
        return kernel;
    }
    return NULL;
}

/* Lay out a block's tokens; quantize them, a strip at a time, if they are not yet. */
static void pack_block(const work *w, const codebook_block *b, int8_t *levels) {
    const codebook_problem *p = &w->problem;
    const int64_t depth = p->weights.depth, size = w->format.type == FLOAT32 ? 4 : 2;
    int8_t *strip = b->strips;
    int32_t *start = b->start;
    for (int64_t m = 0; m < b->count; m += TOKENS) {
        const int64_t first = b->first + m, rows = b->count - m < TOKENS ? b->count - m : TOKENS;
        const int8_t *tokens = w->x ? levels : w->tokens + first * depth;
        const char *x = (const char *)w->x + first * depth * size;
        if (w->x) quantize_strip(&w->format, x, rows, depth, levels, b->token_scale + m);
        for (int d = 0; d < p->digits; d++, strip += TOKENS * padded_depth(depth), start += TOKENS)
            w->kernel->pack(tokens + d * (w->x ? rows : p->rows) * depth, depth, (int)rows, strip, start);
    }
    if (!w->x) memcpy(b->token_scale, p->token_scale + b->first, b->count * sizeof(float));
}

static void worker(void *argument) {
    work *w = argument;
    const codebook_problem *p = &w->problem;
    const int64_t depth = padded_depth(p->weights.depth), rows = w->block * p->digits;
    const int64_t panel = FEATURES * depth + STEP, sums = p->digits * TOKENS * FEATURES * sizeof(int32_t);
    const int64_t scales = w->block * sizeof(float), starts = rows * sizeof(int32_t);
    const int64_t levels = w->x ? p->digits * TOKENS * depth : 0;
    uint8_t *memory = thread_scratch(panel + sums + scales + starts + levels + rows * depth);
    if (!memory) {
        atomic_store(&w->failed, 1);
        return;
    }
    codebook_block b = {.first = -1, .panel = memory, .sums = (int32_t *)(memory + panel)};
    b.token_scale = (float *)(memory + panel + sums);
    b.start = (int32_t *)(memory + panel + sums + scales);
    int8_t *quantized = (int8_t *)(memory + panel + sums + scales + starts);
    b.strips = quantized + levels;
    if (w->kernel->begin) w->kernel->begin();
    for (;;) {
        const int64_t task = atomic_fetch_add(&w->next, 1), part = task % w->parts, first = task / w->parts * w->block;
        if (task >= w->blocks * w->parts) break;
        if (b.first != first) {
            b.first = first;
            b.count = p->rows - first < w->block ? p->rows - first : w->block;
            pack_block(w, &b, quantized);
        }
        w->kernel->multiply(p, &b, part * w->panels / w->parts, (part + 1) * w->panels / w->parts);
    }
    if (w->kernel->end) w->kernel->end();
}

/* Blocks of tokens that fit into a cache, and parts of the panels for each. Of fewer blocks than threads, each thread lays out
 * strips / blocks strips and decodes panels * blocks / threads panels. One strip takes about as long as one panel, and ten times
 * as long if it is quantized, too: the sum is least where both are equal. */
static void share_out(work *w, int threads) {
    const codebook_problem *p = &w->problem;
    const int64_t strips = (p->rows + TOKENS - 1) / TOKENS, bytes = p->digits * TOKENS * padded_depth(p->weights.depth);
    const int64_t most = CACHED_TOKENS / bytes > 1 ? CACHED_TOKENS / bytes : 1; /* strips of a block */
    w->panels = (p->weights.features + FEATURES - 1) / FEATURES;
    w->blocks = (strips + most - 1) / most;
    const int64_t share = strips * threads * (w->x ? 10 : 1);
    while (w->blocks < threads && w->blocks < strips && w->blocks * w->blocks * w->panels < share) w->blocks++;
    w->block = (strips + w->blocks - 1) / w->blocks * TOKENS;
    w->blocks = (p->rows + w->block - 1) / w->block;
    w->parts = (TURNS * threads + w->blocks - 1) / w->blocks;
    w->parts = w->parts > w->panels ? w->panels : w->parts;
}

static int run(work *w, int64_t rows, const int8_t *codebooks, int kernel, parallel_function parallel, int threads) {
    codebook_problem *p = &w->problem;
    w->kernel = choose(kernel, w, rows);
    if (!w->kernel) return 2;
    p->rows = rows;
    if (!rows || !p->weights.features) return 0;
    for (int i = 0; i < 256; i++) w->tables[i / 16][i % 16] = (uint8_t)(codebooks[i] + w->kernel->offset);
    p->weights.tables = w->tables;
    p->past = rows * p->weights.features * (p->type == FLOAT32 ? 4 : 2) > (int64_t)CACHED_OUTPUT * threads;
    share_out(w, threads);
    run_on_threads(worker, w, parallel, threads, w->blocks * w->parts);
    return atomic_load(&w->failed);
}

/* All arrays are contiguous: tokens [digits][rows][depth] of 1 to 3 digits, the highest first, token_scale [rows], codes
 * [features][depth / 2] and index [features][(depth / group + 1) / 2], two a byte with the first in the low nibble, codebooks
 * [16][16], row_scale [features], bias [features] or NULL, out [rows][features] of out_type. depth is a multiple of group, group
 * of 4. kernel: -1 takes the best. `parallel` runs a function on some threads (OpenMP's GOMP_parallel), or is NULL. Returns 0; 1
 * for lack of memory; 2 for a kernel that is unknown, missing or cannot take such groups or tokens. */
int fp4dit_codebook_linear(const int8_t *tokens, const float *token_scale, const uint8_t *codes, const uint8_t *index,
                           const int8_t *codebooks, const float *row_scale, const float *bias, void *out, int64_t rows,
                           int64_t features, int64_t depth, int64_t group, int32_t digits, int32_t out_type, int32_t kernel,
                           parallel_function parallel, int32_t threads) {
    work w = {.problem = {.weights = {.codes = codes, .index = index, .features = features, .depth = depth, .group = group},
                          .token_scale = token_scale, .row_scale = row_scale, .bias = bias, .out = out, .digits = digits,
                          .type = out_type},
              .tokens = tokens};
    return run(&w, rows, codebooks, kernel, parallel, threads);
}

/* The same of tokens that are quantized from x [rows][depth] of x_type, as fp4dit_tokens does. */
int fp4dit_quantized_codebook_linear(const void *x, const uint8_t *codes, const uint8_t *index, const int8_t *codebooks,
                                     const float *row_scale, const float *bias, void *out, int64_t rows, int64_t features,
                                     int64_t depth, int64_t group, int32_t x_type, int32_t mantissa_bits, int32_t digits,
                                     float largest, int32_t out_type, int32_t kernel, parallel_function parallel,
                                     int32_t threads) {
    work w = {.problem = {.weights = {.codes = codes, .index = index, .features = features, .depth = depth, .group = group},
                          .row_scale = row_scale, .bias = bias, .out = out, .digits = digits, .type = out_type},
              .x = x, .format = {.type = x_type, .mantissa_bits = mantissa_bits, .digits = digits, .largest = largest}};
    return run(&w, rows, codebooks, kernel, parallel, threads);
}
