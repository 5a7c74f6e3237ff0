/* AVX-VNNI: VNNI's dot product in 256-bit registers, for processors without AVX-512. */
#include "codebook.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,avxvnni")
#include "codebook_256.h"

#define DOT(sum, w, t) sum = _mm256_dpbusd_avx_epi32(sum, w, t)
#include "codebook_rows.h"

const codebook_kernel codebook_avxvnni = {
    .name = "avxvnni", .offset = 128, .group = 1, .pack = pack_with_offset, .decode = decode, .multiply = multiply,
    .write = write_output,
};
#endif
