/* AVX-VNNI: VNNI's dot product in 256-bit registers, for processors without AVX-512. */
#include "codebook.h"
#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx2,fma,avxvnni")
#include "codebook_256.h"

#define OFFSET 128
#define DOT(sum, w, t) sum = _mm256_dpbusd_avx_epi32(sum, w, t)
#include "codebook_rows.h"

const codebook_kernel codebook_avxvnni = {
    .name = "avxvnni", .offset = OFFSET, .group = 1, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
