// The tile registers of AMX, or, with FORKTREE_EMULATE_AMX, their emulation in plain C++: machines without AMX can then
// run the same code, also under sanitizers.
#pragma once

#include <cstdint>

#if !defined(FORKTREE_EMULATE_AMX)
#include <immintrin.h>
#endif

namespace forktree::FORKTREE_ISA {
namespace {

// Every tile: 16 rows of 64 bytes. A sum is 16 x 16 fp32; an operand 16 x 32 bf16 (a) or 16 x 16 pairs of bf16 (b).
constexpr int TILE_ROWS = 16;

#if defined(FORKTREE_EMULATE_AMX)

thread_local uint32_t emulated_tiles[8][16][16];

void tiles_begin() {}
void tiles_end() {}

template <int T>
void tile_zero() {
    __builtin_memset(emulated_tiles[T], 0, sizeof emulated_tiles[T]);
}

template <int T>
void tile_load(const void* from, int64_t stride) {
    for (int r = 0; r < 16; ++r)
        __builtin_memcpy(emulated_tiles[T][r], static_cast<const char*>(from) + r * stride, 64);
}

template <int T>
void tile_store(void* to, int64_t stride) {
    for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[T][r], 64);
}

inline float emulated_half(uint32_t pair, int half) {
    const uint32_t bits = half ? pair & 0xffff0000u : pair << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}

// C += A B, as TDPBF16PS: sums over the first and the second elements of pairs, added at the end.
template <int C, int A, int B>
void tile_multiply_add() {
    for (int m = 0; m < 16; ++m)
        for (int n = 0; n < 16; ++n) {
            float half[2] = {}, sum;
            for (int k = 0; k < 16; ++k)
                for (int h = 0; h < 2; ++h)
                    half[h] += emulated_half(emulated_tiles[A][m][k], h) * emulated_half(emulated_tiles[B][k][n], h);
            __builtin_memcpy(&sum, &emulated_tiles[C][m][n], 4);
            sum += half[0] + half[1];
            __builtin_memcpy(&emulated_tiles[C][m][n], &sum, 4);
        }
}

#else

void tiles_begin() {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
}
void tiles_end() { _tile_release(); }

// The intrinsics take the number of a tile only as a literal.
template <int T>
void tile_zero() {
    if constexpr (T == 0) _tile_zero(0);
    if constexpr (T == 1) _tile_zero(1);
}

template <int T>
void tile_load(const void* from, int64_t stride) {
    if constexpr (T == 4) _tile_loadd(4, from, stride);
    if constexpr (T == 5) _tile_loadd(5, from, stride);
}

template <int T>
void tile_store(void* to, int64_t stride) {
    if constexpr (T == 0) _tile_stored(0, to, stride);
    if constexpr (T == 1) _tile_stored(1, to, stride);
}

template <int C, int A, int B>
void tile_multiply_add() {
    static_assert(A == 4 && B == 5);
    if constexpr (C == 0) _tile_dpbf16ps(0, 4, 5);
    if constexpr (C == 1) _tile_dpbf16ps(1, 4, 5);
}

#endif

}  // namespace
}  // namespace forktree::FORKTREE_ISA
