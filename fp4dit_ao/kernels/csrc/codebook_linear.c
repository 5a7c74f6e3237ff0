/* y = (tokens . weights^T) * token_scale * row_scale + bias: int8 tokens, 4-bit weights with a codebook for every group. Sums are
 * int32 over all input features, so that every kernel gives the same bits.
 *
 * Threads take a block of tokens and some panels of features at a time. They lay the block out once, in their second-level cache,
 * and decode each panel for it. Digits of a token are strips of their own, whose sums are added at the end. */
#include <stdatomic.h>
#include <string.h>

#include "codebook.h"

#include "scratch.h"
#include "threads.h"
#include "tile.h"

enum {
    CACHED_TOKENS = 1200 << 10, /* bytes of a block, beside a panel in the second-level cache */
    LEAST_STRIPS = 4,           /* of a block, when there are more threads than work: decoding takes a fifth of the time then */
    CACHED_OUTPUT = 4 << 20,    /* bytes of output that may stay in a cache until they are read */
    TURNS = 3                   /* tasks for every thread, so that all end together */
};

typedef struct {
    codebook_weights weights;
    const codebook_kernel *kernel;
    const int8_t *tokens;
    const float *token_scale, *row_scale, *bias;
    void *out;
    int64_t rows, block; /* tokens, and those of a block */
    int64_t blocks, parts, panels;
    int32_t digits, type;
    uint8_t tables[16][16];
    atomic_llong next;
    atomic_int failed;
} problem;

static const codebook_kernel *const kernels[] = {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    &codebook_amx,
#endif
    &codebook_avx512vnni, &codebook_avxvnni, &codebook_avx2,
#endif
    &codebook_portable,
};
enum { KERNELS = sizeof kernels / sizeof *kernels };

static int supported(const codebook_kernel *kernel) {
#if defined(__x86_64__)
    int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef FP4DIT_AMX
    if (kernel == &codebook_amx) return avx512 && codebook_amx_allowed();
#endif
    if (kernel == &codebook_avx512vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
    if (kernel == &codebook_avxvnni) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
    if (kernel == &codebook_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
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

/* The `asked` kernel, or for -1 the best one for `rows` rows; NULL if there is no such. */
static const codebook_kernel *choose(int asked, int64_t rows, int64_t group) {
    for (int i = asked < 0 ? 0 : asked; i < (asked < 0 ? KERNELS : asked + 1); i++) {
        const char *name = fp4dit_codebook_kernel(i);
        if (!name || !*name || group % kernels[i]->group || (asked < 0 && rows < kernels[i]->least)) continue;
        return kernels[i];
    }
    return NULL;
}

typedef struct {
    int8_t *strips; /* [block / TOKENS][digits][a strip] */
    int32_t *start; /* [block / TOKENS][digits][TOKENS] */
    int32_t *sums;
    uint8_t *panel;
    int64_t block; /* which one is in `strips` */
} scratch;

/* Lay out a block, whose `count` tokens begin at `first`. */
static void pack_block(const problem *p, scratch *s, int64_t first, int64_t count) {
    const int64_t depth = p->weights.depth;
    int8_t *strip = s->strips;
    int32_t *start = s->start;
    for (int64_t m = 0; m < count; m += TOKENS)
        for (int d = 0; d < p->digits; d++, strip += TOKENS * padded_depth(depth), start += TOKENS)
            p->kernel->pack(p->tokens + (d * p->rows + first + m) * depth, depth,
                            count - m < TOKENS ? (int)(count - m) : TOKENS, strip, start);
}

static void multiply_panel(const problem *p, scratch *s, int64_t feature, int64_t first, int64_t count) {
    const codebook_weights *w = &p->weights;
    const int64_t size = p->type == FLOAT32 ? 4 : 2;
    const int8_t *strip = s->strips;
    const int32_t *start = s->start;
    codebook_output o = {.sums = s->sums, .row_scale = p->row_scale + feature, .bias = p->bias ? p->bias + feature : NULL,
                         .stride = w->features * size, .digits = p->digits, .type = p->type,
                         .features = w->features - feature < FEATURES ? (int)(w->features - feature) : FEATURES,
                         .past = p->rows * w->features * size > CACHED_OUTPUT};
    if (o.features < FEATURES) memset(s->panel, 0, FEATURES * padded_depth(w->depth));
    p->kernel->decode(w, feature, s->panel);
    for (int64_t m = first; m < first + count; m += TOKENS) {
        o.tokens = first + count - m < TOKENS ? (int)(first + count - m) : TOKENS;
        for (int d = 0; d < p->digits; d++, strip += TOKENS * padded_depth(w->depth), start += TOKENS)
            p->kernel->multiply(strip, s->panel, w->depth, o.tokens, start, s->sums + d * TOKENS * FEATURES);
        o.token_scale = p->token_scale + m;
        o.out = (char *)p->out + (m * w->features + feature) * size;
        p->kernel->write(&o);
    }
}

static void worker(void *argument) {
    problem *p = argument;
    const int64_t depth = padded_depth(p->weights.depth), rows = p->block * p->digits;
    const int64_t panel = (FEATURES + 1) * depth; /* decoding may write STEP bytes past the last feature */
    const int64_t sums = p->digits * TOKENS * FEATURES * sizeof(int32_t), starts = rows * sizeof(int32_t);
    uint8_t *memory = thread_scratch(panel + sums + starts + rows * depth);
    if (!memory) {
        atomic_store(&p->failed, 1);
        return;
    }
    scratch s = {.panel = memory, .sums = (int32_t *)(memory + panel), .start = (int32_t *)(memory + panel + sums),
                 .strips = (int8_t *)(memory + panel + sums + starts), .block = -1};
    if (p->kernel->begin) p->kernel->begin();
    for (;;) {
        int64_t task = atomic_fetch_add(&p->next, 1), block = task / p->parts, part = task % p->parts;
        if (block >= p->blocks) break;
        int64_t first = block * p->block, count = p->rows - first < p->block ? p->rows - first : p->block;
        if (s.block != block) pack_block(p, &s, first, count);
        s.block = block;
        for (int64_t n = part * p->panels / p->parts; n < (part + 1) * p->panels / p->parts; n++)
            multiply_panel(p, &s, n * FEATURES, first, count);
    }
    if (p->kernel->end) p->kernel->end();
}

/* Blocks of tokens that fit into a cache, as many as there are threads if that leaves enough to do; and parts of the panels. */
static void share_out(problem *p, int threads) {
    const int64_t strips = (p->rows + TOKENS - 1) / TOKENS, bytes = p->digits * TOKENS * padded_depth(p->weights.depth);
    const int64_t most = CACHED_TOKENS / bytes > 1 ? CACHED_TOKENS / bytes : 1;
    const int64_t least = (strips + most - 1) / most, fair = strips / LEAST_STRIPS;
    p->panels = (p->weights.features + FEATURES - 1) / FEATURES;
    p->blocks = threads < fair ? threads : fair;
    p->blocks = p->blocks < least ? least : p->blocks;
    p->block = (strips + p->blocks - 1) / p->blocks * TOKENS;
    p->blocks = (p->rows + p->block - 1) / p->block;
    p->parts = (TURNS * threads + p->blocks - 1) / p->blocks;
    p->parts = p->parts > p->panels ? p->panels : p->parts;
}

/* All arrays are contiguous: tokens [digits][rows][depth] of 1 to 3 digits, the highest first, token_scale [rows], codes
 * [features][depth / 2] and index [features][(depth / group + 1) / 2], two a byte with the first in the low nibble, codebooks
 * [16][16], row_scale [features], bias [features] or NULL, out [rows][features] of out_type. depth is a multiple of group, group
 * of 4. kernel: -1 takes the best. `parallel` runs a function on some threads (OpenMP's GOMP_parallel), or is NULL. Returns 0; 1
 * for lack of memory; 2 for a kernel that is unknown, missing or cannot take such groups. */
int fp4dit_codebook_linear(const int8_t *tokens, const float *token_scale, const uint8_t *codes, const uint8_t *index,
                           const int8_t *codebooks, const float *row_scale, const float *bias, void *out, int64_t rows,
                           int64_t features, int64_t depth, int64_t group, int32_t digits, int32_t out_type, int32_t kernel,
                           parallel_function parallel, int32_t threads) {
    problem p = {.weights = {.codes = codes, .index = index, .features = features, .depth = depth, .group = group},
                 .kernel = choose(kernel, rows * digits, group), .tokens = tokens, .token_scale = token_scale,
                 .row_scale = row_scale, .bias = bias, .out = out, .rows = rows, .digits = digits, .type = out_type};
    if (!p.kernel) return 2;
    if (!rows || !features) return 0;
    for (int i = 0; i < 256; i++) p.tables[i / 16][i % 16] = (uint8_t)(codebooks[i] + p.kernel->offset);
    p.weights.tables = p.tables;
    share_out(&p, threads);
    run_on_threads(worker, &p, parallel, threads, p.blocks * p.parts);
    return atomic_load(&p.failed);
}
