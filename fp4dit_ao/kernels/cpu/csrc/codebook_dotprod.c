/* Arm's dot product of four bytes (sdot, Armv8.2). */
#include "codebook.h"
#if defined(__aarch64__)
#include <arm_neon.h>

BEGIN_TARGET(DOT_PRODUCT)
#define VECTOR int32x4_t
enum { WIDTH = 16 };
#define AT_ONCE 4

static inline VECTOR load(const void *from) { return vreinterpretq_s32_u8(vld1q_u8(from)); }

static inline void store(void *to, VECTOR x) { vst1q_u8(to, vreinterpretq_u8_s32(x)); }

static inline VECTOR broadcast(const uint8_t table[16]) { return load(table); }

static inline VECTOR look_up(const uint8_t *codes, VECTOR table) {
    const uint8x8_t packed = vld1_u8(codes), low = vand_u8(packed, vdup_n_u8(15)), high = vshr_n_u8(packed, 4);
    const uint8x16_t apart = vcombine_u8(vzip1_u8(low, high), vzip2_u8(low, high));
    return vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(table), apart));
}

static inline VECTOR add_lanes(VECTOR a, VECTOR b, VECTOR c, VECTOR d) { return vpaddq_s32(vpaddq_s32(a, b), vpaddq_s32(c, d)); }

#define OFFSET 0
#define DOT(sum, w, t) sum = vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(t))
#include "codebook_rows.h"

const codebook_kernel codebook_dotprod = {
    .name = "dotprod", .offset = OFFSET, .group = 1, .pack = pack, .multiply = multiply_panels,
};
END_TARGET
#endif
