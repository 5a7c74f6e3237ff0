/* AVX2 without VNNI, for any levels: |weight| x token with the weight's sign. Magnitudes are at most 128 and 127, so that the
 * 16-bit sum of two products, at most 32512, does not saturate. */
#include "codebook.h"
#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma")
#include "codebook_256.h"

static inline VECTOR dot_product(VECTOR sum, VECTOR w, VECTOR t) {
    VECTOR pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(t, w));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#define OFFSET 0
#define DOT(sum, w, t) sum = dot_product(sum, w, t)
#include "codebook_rows.h"

const codebook_kernel codebook_avx2_bytes = {
    .name = "avx2_bytes", .offset = OFFSET, .group = 1, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
