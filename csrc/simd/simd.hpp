// Vectors of fp32 lanes, as wide as the instruction set that this file is compiled for: compiler vector extensions, so
// that one source serves all, and intrinsics where the extensions lack an operation.
//
// All code lies in namespace forktree::FORKTREE_ISA and must not use inline functions of the standard library: the
// linker would keep one copy of those for all instruction sets.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/numeric.hpp"

namespace forktree::FORKTREE_ISA {

#if defined(__AVX512F__)
constexpr int VL = 16;  // lanes of a vector
#elif defined(__AVX2__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef float vf_anywhere __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef int32_t vi_anywhere __attribute__((vector_size(4 * VL), aligned(4), may_alias));

static inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
static inline vi load(const int32_t* p) { return *reinterpret_cast<const vi_anywhere*>(p); }
static inline void store(float* p, vf x) { *reinterpret_cast<vf_anywhere*>(p) = x; }
static inline void store(int32_t* p, vi x) { *reinterpret_cast<vi_anywhere*>(p) = x; }
static inline vf splat(float x) { return x - vf{}; }  // -0.0f stays -0.0f
static inline vi splat(int32_t x) { return x + vi{}; }
static inline vf max(vf a, vf b) { return b > a ? b : a; }  // a NaN in b is ignored

static inline vi lanes() {
    vi x;
    for (int i = 0; i < VL; ++i) x[i] = i;
    return x;
}

// The smallest integer that is not below x.
static inline vf ceil(vf x) {
    const vf round = splat(12582912.0f);  // 1.5 * 2^23: floats of this size are integers
    const vf n = (x + round) - round;
    const vf up = n < x ? n + 1.0f : n;
    return (x > -4194304.0f) & (x < 4194304.0f) ? up : x;
}

// 2^(x - base) for an integer base and x <= base + 127, relative error 1.5e-7; exactly 0 below 2^-126; NaN stays NaN.
// Another base changes the result by exactly a power of two: the base only moves the exponent.
static inline vf exp2(vf x, vf base) {
    const vf round = splat(12582912.0f);  // 1.5 * 2^23: its last bits hold the nearest integer
    const vf shift = (base > -2097152.0f) & (base < 2097152.0f) ? vf{} : base;  // too large to be exact any more
    const vf y = x - shift, under = base - shift;
    const vf n = y + round;
    const vf r = y - (n - round);  // in [-0.5, 0.5]
    vf p = splat(1.326472062e-3f);
    p = p * r + 9.671513118e-3f;
    p = p * r + 5.550733765e-2f;
    p = p * r + 2.402224207e-1f;
    p = p * r + 6.931469776e-1f;
    p = p * r + 1.0f;
    const vi exponent = reinterpret_cast<vi>(n) - reinterpret_cast<vi>(under + round);
    const vf power = reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (exponent << 23));
    const vf distance = y - under;
    return distance >= -126.0f ? power : (distance < -126.0f ? vf{} : distance);
}

// tanh by a polynomial near 0 (Cephes, S. Moshier) and by 2^x elsewhere; error below 2 units in the last place.
static inline vf tanh(vf x) {
    const vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    vf far = x > 10.0f ? splat(10.0f) : x;
    far = far < -10.0f ? splat(-10.0f) : far;
    const vf e = exp2(far * 2.885390082f, vf{});  // exp(2 x)
    return (z < 0.390625f) ? p : (e - 1.0f) / (e + 1.0f);
}

// Natural log of normal numbers above 0, error below 2 units in the last place (Cephes, S. Moshier).
static inline vf log(vf x) {
    const vi bits =
        reinterpret_cast<vi>(x) - 0x3f3504f3;  // of sqrt(1/2): the fraction then lies in [sqrt(1/2), sqrt(2))
    const vf f = reinterpret_cast<vf>((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    const vf e = __builtin_convertvector(bits >> 23, vf), z = f * f;
    vf p = splat(7.0376836292e-2f);
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    p = p * f * z - e * 2.12194440e-4f - z * 0.5f;
    return f + p + e * 0.693359375f;
}

// Widens n elements of bf16 or fp16 to fp32.
static inline void widen(const uint16_t* from, float* to, int64_t n, Dtype dtype) {
    int64_t i = 0;
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
        const __m512 y = dtype == Dtype::bf16 ? _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16))
                                              : _mm512_cvtph_ps(x);
        _mm512_storeu_ps(to + i, y);
    }
#elif defined(__AVX2__)
    for (; i + 8 <= n; i += 8) {
        const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        const __m256 y = dtype == Dtype::bf16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16))
                                              : _mm256_cvtph_ps(x);
        _mm256_storeu_ps(to + i, y);
    }
#endif
    if (dtype == Dtype::bf16) {
        for (; i < n; ++i) to[i] = to_float(Bf16{from[i]});
    } else {
        for (; i < n; ++i) to[i] = to_float(Fp16{from[i]});
    }
}

// Narrows n elements of fp32, to nearest, ties to even.
static inline void narrow(const float* from, uint16_t* to, int64_t n, Dtype dtype) {
    int64_t i = 0;
    if (dtype == Dtype::bf16) {
        typedef uint16_t half __attribute__((vector_size(2 * VL)));
        typedef uint32_t vu __attribute__((vector_size(4 * VL)));
        for (; i + VL <= n; i += VL) {
            const vf x = load(from + i);
            const vu bits = reinterpret_cast<vu>(x);
            const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            const half y = __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, half);  // NaN stays NaN
            __builtin_memcpy(to + i, &y, sizeof y);
        }
        for (; i < n; ++i) to[i] = from_float<Bf16>(from[i]).bits;
        return;
    }
#if defined(__AVX2__)
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; ++i) to[i] = from_float<Fp16>(from[i]).bits;
}

}  // namespace forktree::FORKTREE_ISA
