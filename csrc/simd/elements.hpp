// Elements of matrix products. `Term` is what one multiply-add consumes: an fp32 number, or a pair of bf16.
#pragma once

#include "simd/simd.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

#if defined(__AVX512F__)
// Half-width vector: some cores issue two of these per cycle but only one full-width operation.
typedef float hf __attribute__((vector_size(2 * VL)));
typedef float hf_anywhere __attribute__((vector_size(2 * VL), aligned(4), may_alias));
#endif

struct Single {
    typedef float Term;
    static constexpr int TERMS = 1;    // elements in a term
    static constexpr int64_t PAD = 1;  // sums over tokens are padded with zeros to a multiple of this
    static vf multiply_add(vf sum, float a, const float* b) { return splat(a) * load(b) + sum; }
#if defined(__AVX512F__)
    static hf multiply_add(hf sum, float a, const float* b) {
        return a * *reinterpret_cast<const hf_anywhere*>(b) + sum;
    }
#endif
};

#if defined(__AVX512BF16__)
struct Pair {
    typedef uint32_t Term;  // two bf16, the first one in the low half
    static constexpr int TERMS = 2;
#if defined(FORKTREE_TILES)
    static constexpr int64_t PAD = 16;
#else
    static constexpr int64_t PAD = 1;
#endif
    static vf multiply_add(vf sum, uint32_t a, const uint32_t* b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)_mm512_loadu_si512(b));
    }
    static hf multiply_add(hf sum, uint32_t a, const uint32_t* b) {
        return (hf)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(int(a)),
                                    (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
    }
};
#endif

}  // namespace
}  // namespace forktree::FORKTREE_ISA
