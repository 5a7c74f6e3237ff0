/* softmax(q . k^T * scale + bias) . v of int8 levels with a scale per token: what every instruction set implements.
 *
 * Scores are exact int32 products, like a linear's. Keys go by in blocks, as in flash attention (arXiv 2205.14135): a block of
 * queries keeps its largest score, the sum of its exponentials and its output so far. A value's scale goes into the weight that
 * multiplies it. Weights times values are summed in float32; where the result is bfloat16 and the processor multiplies bfloat16,
 * weights are rounded to it first (levels of one digit are bfloat16 as they are). */
#ifndef FP4DIT_ATTENTION_H
#define FP4DIT_ATTENTION_H

#include <stdatomic.h>
#include <stdint.h>

#include "targets.h"

enum { LARGEST_HEAD = 256 };

typedef struct {
    const int8_t *q, *k, *v;                     /* [digits][batch][heads][tokens][dim] */
    const float *q_scale, *k_scale, *v_scale;    /* [batch][heads][tokens] */
    const float *bias;                           /* or NULL */
    int64_t bias_batch, bias_head, bias_query;   /* strides; keys lie side by side */
    void *out;                                   /* [batch][queries][heads][dim] */
    int64_t digits, batch, heads, queries, keys, dim;
    float scale;
    int32_t out_type;
    int half;                                    /* weights may be bfloat16 */
    int64_t chunk, chunks;                       /* queries of a task; tasks of a head */
    atomic_llong next;
    atomic_int failed;                           /* 1: no memory */
} attention_problem;

typedef struct {
    const char *name;
    int queries;                             /* in a block; a task has a multiple */
    int (*fits)(const attention_problem *p); /* whether it computes this */
    void (*worker)(void *problem);           /* takes tasks until none is left */
} attention_kernel;

/* The next task: its head, of all in the batch, and its queries from `first` to `end`. 0 if none is left. */
static inline int next_task(attention_problem *p, int64_t *head, int64_t *first, int64_t *end) {
    const int64_t task = atomic_fetch_add(&p->next, 1);
    *head = task / p->chunks;
    *first = task % p->chunks * p->chunk;
    *end = *first + p->chunk < p->queries ? *first + p->chunk : p->queries;
    return *head < p->batch * p->heads;
}

#if defined(__x86_64__)
extern const attention_kernel attention_avx512vnni;
#ifdef FP4DIT_AMX
extern const attention_kernel attention_amx;
#endif
#endif

#endif
