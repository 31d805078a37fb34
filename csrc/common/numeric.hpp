// Element types and their conversions. All math is done in fp32; narrow results round to nearest, ties to even.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

// Never emits a symbol: the linker must not take a copy compiled for AVX-512 for all instruction sets.
#if defined(__CUDACC__)
#define FORKTREE_INLINE __host__ __device__ inline __attribute__((always_inline))
#else
#define FORKTREE_INLINE inline __attribute__((always_inline))
#endif

namespace forktree {

enum class Dtype { fp32 = 0, bf16 = 1, fp16 = 2 };

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

FORKTREE_INLINE uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

FORKTREE_INLINE float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// condition ? yes : no, by a mask instead of a branch, so that loops over it become vector code.
FORKTREE_INLINE uint32_t select(bool condition, uint32_t yes, uint32_t no) {
    const uint32_t mask = 0u - uint32_t(condition);
    return (yes & mask) | (no & ~mask);
}

FORKTREE_INLINE float to_float(float x) { return x; }

FORKTREE_INLINE float to_float(Bf16 x) { return bits_float(uint32_t(x.bits) << 16); }

FORKTREE_INLINE float to_float(Fp16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff);
    // The exponent field moves up by 224 instead of 112, so that inf and NaN survive; the factor corrects the rest.
    const float normal = bits_float((magnitude << 13) + (224u << 23)) * 0x1p-112f;
    // 0.5 + magnitude * 2^-24 is exact, and needs no subnormal float, which may be flushed to 0.
    const float subnormal = bits_float(magnitude | (126u << 23)) - 0.5f;
    return bits_float(sign | select(magnitude < 0x400, float_bits(subnormal), float_bits(normal)));
}

template <class T>
T from_float(float x);

template <>
FORKTREE_INLINE float from_float<float>(float x) {
    return x;
}

template <>
FORKTREE_INLINE Bf16 from_float<Bf16>(float x) {
    const uint32_t bits = float_bits(x);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // rounding could carry it into an infinity
    const uint32_t rounded = bits + 0x7fff + (bits >> 16 & 1);
    return {uint16_t(select(nan, bits | 0x400000, rounded) >> 16)};
}

template <>
FORKTREE_INLINE Fp16 from_float<Fp16>(float x) {
    const uint32_t bits = float_bits(x), twice = bits + bits;
    // Adding 2^15 times the power of two below x (at least 2^-14) leaves room for 10 mantissa bits: the addition
    // rounds. The two factors make too large values overflow.
    const float magnitude = bits_float(bits & 0x7fffffff) * 0x1p112f * 0x1p-110f;
    const uint32_t exponent = select(twice < 0x71000000, 0x71000000, twice & 0xff000000);
    const uint32_t sum = float_bits(bits_float((exponent >> 1) + 0x07800000) + magnitude);
    const uint32_t rounded = (sum >> 13 & 0x7c00) + (sum & 0x0fff);
    return {uint16_t((bits >> 16 & 0x8000) | select(twice > 0xff000000, 0x7e00, rounded))};
}

// Calls call(T{}) with the element type of a dtype, a number that comes from Python. Throws std::invalid_argument.
template <class Call>
decltype(auto) with_dtype(int dtype, const Call& call) {
    switch (Dtype(dtype)) {
        case Dtype::fp32: return call(float{});
        case Dtype::bf16: return call(Bf16{});
        case Dtype::fp16: return call(Fp16{});
    }
    throw std::invalid_argument("dtype must be 0 (fp32), 1 (bf16) or 2 (fp16), got " + std::to_string(dtype));
}

inline int64_t item_size(int dtype) {
    return with_dtype(dtype, [](auto x) { return int64_t(sizeof x); });
}

}  // namespace forktree
