/* AVX2 without VNNI, for levels of tokens up to 64: unsigned weight x token. The 16-bit sum of two products is at most
 * 2 * 255 * 64 = 32640, and does not saturate. */
#include "codebook.h"
#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma")
#include "codebook_256.h"

/* In assembly, because GCC 12 spills the sums around the intrinsics. */
#define OFFSET 128
#define DOT(sum, w, t) \
    do { \
        VECTOR pairs; \
        __asm__("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0" \
                : "+x"(sum), "=&x"(pairs) : "x"(w), "x"(t), "x"(_mm256_set1_epi16(1))); \
    } while (0)
#include "codebook_rows.h"

const codebook_kernel codebook_avx2 = {
    .name = "avx2", .offset = OFFSET, .group = 1, .largest = 64, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
