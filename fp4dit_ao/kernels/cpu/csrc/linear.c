/* y = (tokens . weights^T) * token_scale + bias: int8 tokens, 4-bit weights with a float32 scale for every group. Tokens whose
 * levels take several digits to the base 128 are as many rows side by side, until their sums are added.
 *
 * Output tiles (a block of tokens x PANEL features) are handed out to threads. In a tile, weights are looked up once, a chunk of
 * some groups at a time; all of its tokens are multiplied by each group in int32, and added in float32 with the group's scale.
 */
#include <stdatomic.h>
#include <stdlib.h>

#include "processor.h"
#include "threads.h"
#include "tile.h"

enum {
    PACK = 16,        /* tokens that a thread packs at once */
    MOST_ROWS = 1032, /* of an output tile: its float sums stay in the second-level cache */
    LEAST_ROWS = 192, /* of a tile, when there are more threads than work: unpacking weights takes a tenth of it */
    CACHED = 4 << 20, /* bytes of output that may stay in a cache until they are read */
    MOST_GROUPS = 16, /* in a chunk */
    TURNS = 3         /* tiles for every thread, so that all end together */
};

typedef struct {
    const int8_t *tokens;
    const float *token_scale;
    const uint8_t *codes;
    const float *scale, *bias;
    void *out;
    int64_t rows, features, depth, group, scale_rows; /* rows: of digits; depth: input features; scale_rows: 1 if shared */
    int32_t digits, out_type;
    uint8_t table[16];
    const tile_kernel *kernel;
    int8_t *packed;
    int32_t *start; /* [int32 sum: of a group, or of a part of one][row] */
    int together;   /* groups in a chunk */
    int64_t panels, blocks, block; /* block: tokens of an output tile */
    atomic_llong next;
    atomic_int failed;
} problem;

static const tile_kernel *const kernels[] = {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    &tile_amx,
#endif
    &tile_avx512vnni, &tile_avxvnni, &tile_avx2,
#elif defined(__aarch64__)
    &tile_dotprod,
#endif
    &tile_portable,
};
enum { KERNELS = sizeof kernels / sizeof *kernels, NO_MEMORY = 1, NO_KERNEL = 2 };

static int supported(const tile_kernel *kernel) {
#if defined(__x86_64__)
#ifdef FP4DIT_AMX
    if (kernel == &tile_amx) return has_amx();
#endif
    if (kernel == &tile_avx512vnni) return has_avx512vnni();
    if (kernel == &tile_avxvnni) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("avxvnni");
    if (kernel == &tile_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(__aarch64__)
    if (kernel == &tile_dotprod) return has_dot_product();
#endif
    return kernel == &tile_portable;
}

/* Of this interface; native.py asks for it. */
int fp4dit_version(void) { return 7; }

/* The name of kernel `index`, best first; NULL past the last. What this processor lacks is an empty name. */
const char *fp4dit_kernel(int index) {
    static atomic_int known[KERNELS]; /* 1 + whether it is supported: asking takes long */
    if (index < 0 || index >= KERNELS) return NULL;
    if (!atomic_load(&known[index])) atomic_store(&known[index], 1 + supported(kernels[index]));
    return atomic_load(&known[index]) == 2 ? kernels[index]->name : "";
}

/* The `asked` kernel, or for -1 the best one for `rows` rows; NULL if there is none for such groups. */
static const tile_kernel *choose(int asked, int64_t rows, int64_t group) {
    for (int i = asked < 0 ? 0 : asked; i < (asked < 0 ? KERNELS : asked + 1); i++) {
        const char *name = fp4dit_kernel(i);
        if (!name || !*name || group % kernels[i]->group || (asked < 0 && rows < kernels[i]->least)) continue;
        return kernels[i];
    }
    return NULL;
}

/* int32 sums that make a group's. */
static int64_t sums_in(int64_t group) { return (group + CHUNK - 1) / CHUNK; }

/* Groups in a chunk: as even as their number allows. */
static int groups_together(int64_t group, int64_t groups) {
    int64_t most = group % 8 || group > CHUNK ? 1 : CHUNK / group < MOST_GROUPS ? CHUNK / group : MOST_GROUPS;
    int64_t chunks = (groups + most - 1) / most;
    return (int)((groups + chunks - 1) / chunks);
}

/* The input features that are looked up at once: some groups, or a part of one. */
typedef struct {
    int depth, groups;     /* of each group */
    int64_t first, packed; /* the first int32 sum's number; where its tokens begin: [row][groups][padded(depth)] */
} chunk;

/* The one that begins at input feature `at`. */
static chunk chunk_at(const problem *p, int64_t at) {
    int64_t group = at / p->group, k = at % p->group, left = p->depth / p->group - group;
    chunk c = {.depth = p->group - k < CHUNK ? (int)(p->group - k) : CHUNK,
               .groups = left < p->together ? (int)left : p->together,
               .first = group * sums_in(p->group) + k / CHUNK,
               .packed = p->rows * (group * ((p->group + 7) / 8 * 8) + k)}; /* only a group's last part is padded */
    return c;
}

static void pack_row(problem *p, int64_t row) {
    const int8_t *tokens = p->tokens + (row % p->digits * (p->rows / p->digits) + row / p->digits) * p->depth;
    for (int64_t at = 0; at < p->depth;) {
        chunk c = chunk_at(p, at);
        int8_t *to = p->packed + c.packed + row * c.groups * padded(c.depth);
        for (int g = 0; g < c.groups; g++, at += c.depth, to += padded(c.depth)) {
            int32_t sum = p->kernel->pack(tokens + at, c.depth, to);
            p->start[(c.first + g) * p->rows + row] = -p->kernel->offset * sum;
        }
    }
}

static void pack_worker(void *argument) {
    problem *p = argument;
    for (;;) {
        int64_t row = atomic_fetch_add(&p->next, PACK), end = row + PACK < p->rows ? row + PACK : p->rows;
        if (row >= p->rows) return;
        for (; row < end; row++) pack_row(p, row);
    }
}

/* The sums of each token's digits, which lie side by side, to one. */
EVERY_PROCESSOR static void add_digits(float *sums, int tokens, int digits) {
    const float *from = sums;
    for (; tokens--; sums += PANEL, from += digits * PANEL) {
        for (int n = 0; n < PANEL; n++) sums[n] = from[n] * 128 + from[PANEL + n];
        for (int d = 2; d < digits; d++)
            for (int n = 0; n < PANEL; n++) sums[n] = sums[n] * 128 + from[d * PANEL + n];
    }
}

static void multiply_tile(problem *p, int64_t block, int64_t index, uint8_t *panel, float *sums) {
    int64_t feature = index * PANEL, row = block * p->block, groups = p->depth / p->group;
    int features = p->features - feature < PANEL ? (int)(p->features - feature) : PANEL;
    int rows = (int)(p->rows - row < p->block ? p->rows - row : p->block);
    float scale[MOST_GROUPS * PANEL] = {0};
    for (int64_t at = 0; at < p->depth;) {
        chunk c = chunk_at(p, at);
        const uint8_t *codes = p->codes + (feature * p->depth + at) / 2;
        const float *from = p->scale + (p->scale_rows == 1 ? 0 : feature * groups) + at / p->group;
        for (int n = 0; n < features; n++, from += p->scale_rows == 1 ? 0 : groups)
            for (int g = 0; g < c.groups; g++) scale[g * PANEL + n] = from[g];
        p->kernel->unpack(codes, p->depth / 2, features, c.depth * c.groups, p->table, panel);
        for (int n = 0; n < features; n++) __builtin_prefetch(codes + (n * p->depth + c.depth * c.groups) / 2);
        product part = {.tokens = p->packed + c.packed + row * c.groups * padded(c.depth), .panel = panel,
                        .start = p->start + c.first * p->rows + row, .stride = p->rows, .scale = scale, .sums = sums,
                        .rows = rows, .groups = c.groups, .depth = c.depth, .first = !at};
        at += c.depth * c.groups;
        p->kernel->multiply(&part);
    }
    int64_t token = row / p->digits, size = p->out_type == FLOAT32 ? 4 : 2;
    rows /= p->digits;
    if (p->digits > 1) add_digits(sums, rows, p->digits);
    p->kernel->write(sums, rows, p->token_scale + token, p->bias ? p->bias + feature : NULL, features,
                     (char *)p->out + (token * p->features + feature) * size, p->features * size, p->out_type,
                     p->rows / p->digits * p->features * size > CACHED);
}

static void multiply_worker(void *argument) {
    problem *p = argument;
    uint8_t *panel = aligned_alloc(64, PANEL * CHUNK + p->block * PANEL * sizeof(float));
    if (!panel) {
        atomic_store(&p->failed, 1);
        return;
    }
    if (p->kernel->begin) p->kernel->begin();
    for (;;) {
        int64_t tile = atomic_fetch_add(&p->next, 1);
        if (tile >= p->panels * p->blocks) break;
        multiply_tile(p, tile / p->panels, tile % p->panels, panel, (float *)(panel + PANEL * CHUNK));
    }
    if (p->kernel->end) p->kernel->end();
    free(panel);
}

static void run(problem *p, void (*worker)(void *), parallel_function parallel, int threads, int64_t tasks) {
    atomic_store(&p->next, 0);
    run_on_threads(worker, p, parallel, threads, tasks);
}

/* All arrays are contiguous: tokens [digits][rows][depth] of 1 to 3 digits, the highest first, token_scale [rows], codes
 * [features][depth / 2], scale [features or 1][groups], levels [16], bias [features] or NULL, out [rows][features] of out_type.
 * depth and group are multiples of 4. `kernel` is a number of fp4dit_kernel, or -1 for the best.
 * `parallel` runs a function on some threads (OpenMP's GOMP_parallel), or is NULL. Returns 0; 1 for lack of memory; 2 for a kernel
 * that is missing or cannot take such groups. */
int fp4dit_linear(const int8_t *tokens, const float *token_scale, const uint8_t *codes, const float *scale,
                  const int8_t *levels, const float *bias, void *out, int64_t rows, int64_t features, int64_t depth,
                  int64_t group, int64_t scale_rows, int32_t digits, int32_t out_type, int32_t kernel,
                  parallel_function parallel, int32_t threads) {
    const tile_kernel *chosen = choose(kernel, rows * digits, group);
    if (!chosen) return NO_KERNEL;
    problem p = {.tokens = tokens, .token_scale = token_scale, .codes = codes, .scale = scale, .bias = bias, .out = out,
                 .rows = rows *= digits, .features = features, .depth = depth, .group = group, .scale_rows = scale_rows,
                 .digits = digits, .out_type = out_type, .kernel = chosen};
    for (int i = 0; i < 16; i++) p.table[i] = (uint8_t)(levels[i] + p.kernel->offset);
    p.together = groups_together(group, depth / group);
    p.panels = (features + PANEL - 1) / PANEL;
    int64_t least = (rows + MOST_ROWS - 1) / MOST_ROWS, most = rows / LEAST_ROWS;
    int64_t fair = (TURNS * threads + p.panels - 1) / p.panels;
    p.blocks = fair > most ? most : fair;
    p.blocks = p.blocks < least ? least : p.blocks;
    p.block = rows ? ((rows + p.blocks - 1) / p.blocks + ROWS - 1) / ROWS * ROWS : ROWS; /* of whole tokens, too */
    if (!rows || !features) return 0;
    int64_t packed = chunk_at(&p, depth).packed + chosen->spare * CHUNK; /* a multiple of 8 */
    p.packed = malloc(packed + rows * (depth / group) * sums_in(group) * sizeof *p.start);
    if (!p.packed) return NO_MEMORY;
    p.start = (int32_t *)(p.packed + packed);
    run(&p, pack_worker, parallel, threads, rows * depth / 65536 + 1);
    run(&p, multiply_worker, parallel, threads, p.panels * p.blocks);
    free(p.packed);
    return atomic_load(&p.failed) ? NO_MEMORY : 0;
}

/* An extension module by name only, so that build tools place the library; it is opened as a plain shared library. */
void *PyInit__native(void) { return NULL; }
