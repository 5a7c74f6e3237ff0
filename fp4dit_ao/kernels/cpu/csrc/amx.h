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

#endif
