/* For every group of weights, which of some candidate scales has the least squared error of rounding to nearest. */
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>

#include "threads.h"

enum { AT_ONCE = 16, STRIP = 256 };

typedef struct {
    const float *weights;   /* [groups][group] */
    const float *scales;    /* [candidates][groups] */
    const float *levels;    /* [count] */
    int32_t *best;          /* [groups] */
    int64_t groups, group;
    int32_t candidates, count;
    atomic_llong next;
} search;

/* The nearest level's error, whichever way a tie goes. */
static inline __attribute__((always_inline)) float squared_error(const float *w, int64_t size, const float *levels, int count,
                                                                 float scale) {
    float total = 0, nearest[STRIP];
    for (int64_t at = 0; at < size; at += STRIP) {
        int strip = size - at < STRIP ? (int)(size - at) : STRIP;
        for (int j = 0; j < strip; j++) nearest[j] = INFINITY;
        for (int i = 0; i < count; i++) {
            float level = levels[i] * scale;
            for (int j = 0; j < strip; j++) {
                float apart = fabsf(w[at + j] - level);
                nearest[j] = apart < nearest[j] ? apart : nearest[j];
            }
        }
        float lanes[16] = {0}; /* one order of addition, however wide the vectors are */
        int j = 0;
        for (; j + 16 <= strip; j += 16)
            for (int l = 0; l < 16; l++) lanes[l] += nearest[j + l] * nearest[j + l];
        for (int l = 0; j < strip; j++, l++) lanes[l] += nearest[j] * nearest[j];
        for (int l = 0; l < 16; l++) total += lanes[l];
    }
    return total;
}

EVERY_PROCESSOR static void search_groups(search *p, int64_t group, int64_t end) {
    for (; group < end; group++) {
        const float *w = p->weights + group * p->group;
        float least = INFINITY;
        p->best[group] = 0;
        for (int32_t c = 0; c < p->candidates; c++) {
            float error = squared_error(w, p->group, p->levels, p->count, p->scales[c * p->groups + group]);
            if (error < least) least = error, p->best[group] = c;
        }
    }
}

static void worker(void *argument) {
    search *p = argument;
    for (;;) {
        int64_t group = atomic_fetch_add(&p->next, AT_ONCE);
        if (group >= p->groups) return;
        search_groups(p, group, group + AT_ONCE < p->groups ? group + AT_ONCE : p->groups);
    }
}

/* best [groups]: of equal candidates, the first. */
void fp4dit_search(const float *weights, const float *scales, const float *levels, int32_t *best, int64_t groups,
                   int64_t group, int32_t candidates, int32_t count, parallel_function parallel, int32_t threads) {
    search p = {.weights = weights, .scales = scales, .levels = levels, .best = best, .groups = groups, .group = group,
                .candidates = candidates, .count = count};
    run_on_threads(worker, &p, parallel, threads, groups / AT_ONCE + 1);
}
