/* Registers of 256 bits for codebook_rows.h. */
#define VECTOR __m256i
enum { WIDTH = 32 };
#define AT_ONCE 2

static inline VECTOR load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }

static inline void store(void *to, VECTOR x) { _mm256_storeu_si256((__m256i *)to, x); }

static inline VECTOR broadcast(const uint8_t table[16]) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table));
}

/* A byte of two codes is widened to 16 bits, with the second code in the upper byte. */
static inline VECTOR look_up(const uint8_t *codes, VECTOR table) {
    VECTOR pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)codes));
    VECTOR apart = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    return _mm256_shuffle_epi8(table, apart);
}

static inline __m128i add_lanes(VECTOR a, VECTOR b, VECTOR c, VECTOR d) {
    VECTOR four = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
    return _mm_add_epi32(_mm256_castsi256_si128(four), _mm256_extracti128_si256(four, 1));
}
