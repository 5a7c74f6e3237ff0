/* AVX2 without VNNI: |token| x weight with the token's sign. Both magnitudes are at most 127, so that the 16-bit sum of two
 * products, at most 32258, does not saturate. */
#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#include <immintrin.h>

static inline __m256i dot_product(__m256i sum, __m256i w, __m256i a) {
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(w, a));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

#define DOT dot_product
#define OFFSET 0
#include "tile_avx2.h"

const tile_kernel tile_avx2 = {
    .name = "avx2", .group = 4, .unpack = unpack, .pack = pack_in_order, .multiply = multiply, .write = write_rows,
};
#endif
