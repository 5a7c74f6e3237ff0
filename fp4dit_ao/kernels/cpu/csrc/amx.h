/* Tile registers (AMX): eight of sixteen rows of 64 bytes, for files that the compiler builds for amx-tile. */
#ifndef FP4DIT_AMX_H
#define FP4DIT_AMX_H

#include <immintrin.h>
#include <stdint.h>

enum { SIDE = 16, TILE_ROW = 64 /* bytes */ };

/* Static, since compilers do not see that the instruction reads more than its first bytes. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} whole_tiles = {.palette = 1,
                 .row_bytes = {TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW, TILE_ROW},
                 .rows = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE}};

/* State of a thread: between these two its tile registers can be used. */
static void tiles_begin(void) { _tile_loadconfig(&whole_tiles); }
static void tiles_end(void) { _tile_release(); }

/* Tile instructions are opaque to the compiler: what they read is written by now, what they write is read later. */
#define MEMORY_BARRIER() __asm__ volatile("" ::: "memory")

static inline __attribute__((always_inline)) void zero_tiles(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* Tiles 0 to 3 += two tiles at the left, `lower` bytes apart, times two at the right, `next` bytes apart; `steps` times, each
 * `left_step` and `right_step` bytes on. From row to row of a tile it is `row` and `across` bytes. Of the two at the left there is
 * but one if `both` is 0. LOAD reads the left ones. A macro, since tiles are numbers that the compiler must know. */
#define MULTIPLY_TILES(LOAD, PRODUCT, left, lower, row, left_step, right, next, across, right_step, steps, both) \
    for (int64_t step_ = 0; step_ < (steps); step_++) {                                                          \
        const char *left_ = (const char *)(left) + step_ * (left_step);                                          \
        const char *right_ = (const char *)(right) + step_ * (right_step);                                       \
        LOAD(4, left_, row);                                                                                     \
        _tile_loadd(6, right_, across);                                                                          \
        PRODUCT(0, 4, 6);                                                                                        \
        _tile_loadd(7, right_ + (next), across);                                                                 \
        PRODUCT(1, 4, 7);                                                                                        \
        if (!(both)) continue;                                                                                   \
        LOAD(5, left_ + (lower), row);                                                                           \
        PRODUCT(2, 5, 6);                                                                                        \
        PRODUCT(3, 5, 7);                                                                                        \
    }

#endif
