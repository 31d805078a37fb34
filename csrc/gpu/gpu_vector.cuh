// Moves elements 16 bytes at a time where addresses and sizes allow it, otherwise one by one.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "gpu/gpu.cuh"

namespace forktree::gpu {

template <class T, int N>
struct Vector {
    T item[N];
};

template <class T>
constexpr int WIDE = int(16 / sizeof(T));

template <int N, class T>
FORKTREE_DEVICE Vector<T, N> load(const T* from) {
    Vector<T, N> x;
    if constexpr (sizeof x == 16) {
        const Chunk bytes = load16(from);
        std::memcpy(&x, &bytes, 16);
    } else {
        for (int i = 0; i < N; ++i) x.item[i] = from[i];
    }
    return x;
}

template <class T, int N>
FORKTREE_DEVICE void store(T* to, const Vector<T, N>& x) {
    if constexpr (sizeof x == 16) {
        Chunk bytes;
        if constexpr (sizeof(T) == 2) {  // by hand, as nvcc turns a memcpy into four stores
            uint16_t half[N];
            std::memcpy(half, &x, 16);
            for (int i = 0; i < 4; ++i) bytes.word[i] = half[2 * i] | uint32_t(half[2 * i + 1]) << 16;
        } else {
            std::memcpy(&bytes, &x, 16);
        }
        store16(to, bytes);
    } else {
        for (int i = 0; i < N; ++i) to[i] = x.item[i];
    }
}

// Whether arrays at these addresses, of these sizes and strides in elements of `item` bytes, divide into 16-byte units.
inline bool in_chunks(int64_t item, std::initializer_list<const void*> addresses,
                      std::initializer_list<int64_t> sizes) {
    bool fits = true;
    for (const void* address : addresses) fits &= reinterpret_cast<uintptr_t>(address) % 16 == 0;
    for (const int64_t size : sizes) fits &= size * item % 16 == 0;
    return fits;
}

}  // namespace forktree::gpu
