// K and V of some tokens of one head, prepared for the products.
#pragma once

#include "cpu/tree_attention/scratch.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

#if defined(__AVX512BF16__)
// Indices that interleave two vectors: element i is i / 2 of the first vector if i is even, else of the second.
struct Interleave {
    uint16_t at[64];
    constexpr Interleave() : at() {
        for (int i = 0; i < 64; ++i) at[i] = uint16_t(i / 2 + i % 2 * 32);
    }
};
constexpr Interleave interleave_indices;
#endif

inline float element(Dtype dtype, const void* from, int64_t d) {
    if (dtype == Dtype::fp32) return static_cast<const float*>(from)[d];
    if (dtype == Dtype::bf16) return to_float(static_cast<const Bf16*>(from)[d]);
    return to_float(static_cast<const Fp16*>(from)[d]);
}

inline float finite_or_0(float x) { return x - x == 0.0f ? x : 0.0f; }

inline uint32_t finite_or_0(uint32_t pair) {
    for (const uint32_t half : {0xffffu, 0xffff0000u})
        if ((pair & half & 0x7f807f80u) == (half & 0x7f807f80u)) pair &= ~half;
    return pair;
}

// K or V as terms: that of a token (of V: of TERMS tokens) and an element (of K: of TERMS elements) lies at
// data[token * token_stride + element * dim_stride].
template <class Element>
struct KvTerms {
    const typename Element::Term* data;
    int64_t token_stride, dim_stride;
};

// Copies K and V of a tile's tokens from the pool to scratch memory, where no gaps are left between tokens: the rows of
// a pool are often powers of two apart, so that a few of them already compete for the same place in the cache.
template <class Element>
class KvTiles {
    typedef typename Element::Term Term;

    const Attention& call;
    const Scratch<Element>& scratch;
    const int64_t key_terms, value_dim;

public:
    bool sanitize_v = false;  // whether elements of V that are not finite become 0

    KvTiles(const Attention& call, const Scratch<Element>& scratch)
        : call(call), scratch(scratch), key_terms(call.pool.k_dim / Element::TERMS), value_dim(call.pool.v_dim) {}

    KvTerms<Element> keys(const int32_t* slots, int64_t count, int64_t head) const {
        if constexpr (Element::TERMS == 1) {
            return widened([&](int64_t t) { return k_at(slots[t], head); }, count, call.pool.k_dim, scratch.keys);
        } else {
            for (int64_t t = 0; t < count; ++t)
                __builtin_memcpy(scratch.keys + t * key_terms, k_at(slots[t], head), 4 * key_terms);
            return {scratch.keys, key_terms, 1};
        }
    }

    KvTerms<Element> values(const int32_t* slots, int64_t count, int64_t head) const {
        const KvTerms<Element> terms = copied_values(slots, count, head);
        for (int64_t t = 0; sanitize_v && t < ceil_div(count, Element::TERMS); ++t)
            for (int64_t d = 0; d < value_dim; ++d) {
                Term& x = scratch.values[t * terms.token_stride + d * terms.dim_stride];
                x = finite_or_0(x);
            }
        return terms;
    }

    const char* v_at(int64_t slot, int64_t head) const {
        return static_cast<const char*>(call.pool.v) +
               (slot * call.pool.v_slot_stride + head * call.pool.v_head_stride) * (call.dtype == Dtype::fp32 ? 4 : 2);
    }

private:
    const char* k_at(int64_t slot, int64_t head) const {
        return static_cast<const char*>(call.pool.k) +
               (slot * call.pool.k_slot_stride + head * call.pool.k_head_stride) * (call.dtype == Dtype::fp32 ? 4 : 2);
    }

    template <class At>
    KvTerms<Single> widened(const At& at, int64_t count, int64_t dim, float* to) const {
        for (int64_t t = 0; t < count; ++t) {
            const char* from = at(t);
            if (call.dtype == Dtype::fp32) __builtin_memcpy(to + t * dim, from, 4 * dim);
            else widen(reinterpret_cast<const uint16_t*>(from), to + t * dim, dim, call.dtype);
        }
        return {to, dim, 1};
    }

    KvTerms<Element> copied_values(const int32_t* slots, int64_t count, int64_t head) const {
        Term* const values = scratch.values;
        if constexpr (Element::TERMS == 1) {
            return widened([&](int64_t t) { return v_at(slots[t], head); }, count, value_dim, values);
        } else {
            const auto row = [&](int64_t t) { return reinterpret_cast<const uint16_t*>(v_at(slots[t], head)); };
            const int64_t pairs = ceil_div(count, 2);
            for (int64_t p = 0; p < pairs; ++p) {
                Term* to = Element::PAD > 1 ? scratch.values_row : values + p * value_dim;
                if (2 * p + 1 < count) {
                    interleave(row(2 * p), row(2 * p + 1), to);
                } else {
                    for (int64_t d = 0; d < value_dim; ++d) to[d] = row(2 * p)[d];
                }
                if constexpr (Element::PAD > 1)
                    for (int64_t d = 0; d < value_dim; ++d) values[d * (KV_TILE / 2) + p] = to[d];
            }
            if constexpr (Element::PAD == 1) return {values, value_dim, 1};
            const int64_t padded = round_up(pairs, Element::PAD);
            for (int64_t d = 0; d < value_dim; ++d)
                __builtin_memset(values + d * (KV_TILE / 2) + pairs, 0, 4 * (padded - pairs));
            return {values, 1, KV_TILE / 2};
        }
    }

    // to[d] = low[d] | high[d] << 16
    void interleave(const uint16_t* low, const uint16_t* high, Term* to) const {
        int64_t d = 0;
#if defined(__AVX512BF16__)
        const __m512i first = _mm512_loadu_si512(interleave_indices.at),
                      second = _mm512_loadu_si512(interleave_indices.at + 32);
        for (; d + 32 <= value_dim; d += 32) {
            const __m512i a = _mm512_loadu_si512(low + d), b = _mm512_loadu_si512(high + d);
            _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, second, b));
        }
#endif
        for (; d < value_dim; ++d) to[d] = uint32_t(low[d]) | uint32_t(high[d]) << 16;
    }
};

}  // namespace
}  // namespace forktree::FORKTREE_ISA
