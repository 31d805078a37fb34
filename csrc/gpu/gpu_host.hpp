// The CPU implementation of gpu.cuh: every thread of a block is a fiber; blocks run one after the other in random
// order, and so do threads between two collectives. Errors that a device would not report end the launch with
// std::runtime_error: lanes at different collectives, deadlocks, misaligned addresses, shared memory that is read
// before its copy was waited for and a barrier passed, or overwritten while others may read it. Fresh shared memory,
// and the target of a pending copy, hold NaN. AddressSanitizer sees every access: shared memory has exactly the
// requested size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "common/numeric.hpp"

#define FORKTREE_KERNEL
#define FORKTREE_DEVICE inline

namespace forktree::gpu {
namespace host {

// The position of the running code.
struct Place {
    int thread, threads, block, blocks;
    char* shared;
};
extern thread_local Place place;

// `line` is that of the call in device code: all lanes must meet at the same one.
void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel);
void sync_block(int line);
void sync_warp(int line);
uint32_t shuffle(uint32_t x, int source, int line);
uint32_t ballot(bool condition, int line);
void load_matrix(uint32_t (&r)[4], const void* row, bool transposed, int line);
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Dtype dtype, int line);
void copy16(void* shared, const void* global, bool valid, int line);
void commit();
void wait(int groups);
void check16(const void* address, const char* what, int line);

}  // namespace host

inline int thread() { return host::place.thread; }
inline int threads() { return host::place.threads; }
inline int block() { return host::place.block; }
inline int blocks() { return host::place.blocks; }
inline int lane() { return thread() % WARP; }
inline int warp() { return thread() / WARP; }
inline char* shared_memory() { return host::place.shared; }

inline void copy16(void* shared, const void* global, bool valid, int line = __builtin_LINE()) {
    host::copy16(shared, global, valid, line);
}
inline void commit() { host::commit(); }
template <int N>
void wait() {
    host::wait(N);
}

inline void load_matrix(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    host::load_matrix(r, row, false, line);
}
inline void load_matrix_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    host::load_matrix(r, row, true, line);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16, int line = __builtin_LINE()) {
    host::mma(d, a, b0, b1, Dtype::bf16, line);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16, int line = __builtin_LINE()) {
    host::mma(d, a, b0, b1, Dtype::fp16, line);
}

template <class T>
T shuffle(T x, int lane, int line = __builtin_LINE()) {
    static_assert(sizeof x == 4 && std::is_arithmetic_v<T>);
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    bits = host::shuffle(bits, lane, line);
    std::memcpy(&x, &bits, 4);
    return x;
}
template <class T>
T shuffle_xor(T x, int mask, int line = __builtin_LINE()) {
    return shuffle(x, lane() ^ mask, line);
}
inline uint32_t ballot(bool condition, int line = __builtin_LINE()) { return host::ballot(condition, line); }
inline void sync_warp(int line = __builtin_LINE()) { host::sync_warp(line); }
inline void sync_block(int line = __builtin_LINE()) { host::sync_block(line); }

inline int32_t atomic_add(int32_t* address, int32_t x) {
    const int32_t before = *address;
    *address += x;
    return before;
}
inline void fence() {}

inline Chunk load16(const void* address, int line = __builtin_LINE()) {
    host::check16(address, "load16", line);
    Chunk x;
    std::memcpy(&x, address, 16);
    return x;
}
inline void store16(void* address, Chunk x, int line = __builtin_LINE()) {
    host::check16(address, "store16", line);
    std::memcpy(address, &x, 16);
}
template <class T>
T load_cg(const T* address, int line = __builtin_LINE()) {
    if constexpr (std::is_same_v<T, Chunk>) return load16(address, line);
    else return *address;
}

inline float exp2(float x) { return std::exp2(x); }
inline float log2(float x) { return std::log2(x); }
inline float reciprocal(float x) { return 1 / x; }

template <class T>
uint32_t pack(float low, float high, T) {
    return from_float<T>(low).bits | uint32_t(from_float<T>(high).bits) << 16;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void*, A... arguments) {
    host::run(blocks, threads, shared_bytes, [&] { kernel(arguments...); });
}

// Few, so that persistent grids take several rounds.
template <class... P>
int resident_blocks(void (*)(P...), int, int) {
    return 3;
}

}  // namespace forktree::gpu
