/* AVX-512 VNNI: 64 products an instruction, sixteen sums in registers. */
#include "codebook.h"
#if defined(__x86_64__)
#include <immintrin.h>

BEGIN_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")

#define VECTOR __m512i
enum { WIDTH = 64 };
#define AT_ONCE 4

static inline VECTOR load(const void *from) { return _mm512_loadu_si512(from); }

static inline void store(void *to, VECTOR x) { _mm512_storeu_si512(to, x); }

static inline VECTOR broadcast(const uint8_t table[16]) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)table));
}

/* A byte of two codes is widened to 16 bits, with the second code in the upper byte. */
static inline VECTOR look_up(const uint8_t *codes, VECTOR table) {
    VECTOR pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    VECTOR apart = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), _mm512_set1_epi8(15));
    return _mm512_shuffle_epi8(table, apart);
}

static inline __m128i add_lanes(VECTOR a, VECTOR b, VECTOR c, VECTOR d) {
    VECTOR ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    VECTOR cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    VECTOR four = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti64x4_epi64(four, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

/* In assembly, because GCC 12 spills the sums around the intrinsic. */
#define OFFSET 128
#define DOT(sum, w, t) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(t))
#include "codebook_rows.h"

const codebook_kernel codebook_avx512vnni = {
    .name = "avx512vnni", .offset = OFFSET, .group = 1, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
