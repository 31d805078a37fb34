// The small matrix product that all arithmetic of a kernel goes through: rows of elements that are broadcast, against
// vectors of lanes.
#pragma once

#include "common/prefetch.hpp"
#include "simd/elements.hpp"
#if defined(FORKTREE_TILES)
#include "simd/amx.hpp"
#endif

namespace forktree::FORKTREE_ISA {
namespace {

// Lanes that are processed together: two vectors leave enough registers for accumulators, and a block of 128 terms fits
// in half an L1 cache.
constexpr int VECTORS = 2;
constexpr int64_t BLOCK = VECTORS * VL;

// c[m, lane] = c[m, lane] * factor[lane] + sum over k of a[m * a_m + k * a_k] * b[k, lane] for M values of m and V
// vectors of lanes. b and c have BLOCK and c_stride lanes a row. Without a factor c is only written. keep:
// lanes of the last vector that are written; the others stay unchanged.
template <class Element, int V, int M>
inline void product_block(const typename Element::Term* a, int64_t a_m, int64_t a_k, const typename Element::Term* b,
                          float* c, int64_t c_stride, int64_t terms, const vf* factor, vi keep, Prefetch& prefetch) {
    const bool go_on = factor || Element::TERMS > 1;
    vf sum[M][V];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) sum[m][v] = factor ? load(c + m * c_stride + v * VL) * factor[v] : vf{};
    for (int64_t begin = 0; begin < terms; begin += Prefetch::TERMS) {
        prefetch.step();
        const int64_t end = terms - begin < Prefetch::TERMS ? terms : begin + Prefetch::TERMS;
        // In fp32, separate sums of runs of terms lose less to rounding. But where c continues earlier calls, the
        // order must not depend on where these ended.
        vf part[M][V];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) part[m][v] = go_on ? sum[m][v] : vf{};
        for (int64_t k = begin; k < end; ++k)
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v)
                    part[m][v] = Element::multiply_add(part[m][v], a[m * a_m + k * a_k], b + k * BLOCK + v * VL);
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) sum[m][v] = go_on ? part[m][v] : sum[m][v] + part[m][v];
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) {
            float* to = c + m * c_stride + v * VL;
            store(to, factor && v == V - 1 ? (keep ? sum[m][v] : load(to)) : sum[m][v]);
        }
}

#if defined(FORKTREE_TILES)
// The same for 16 values of m at a time, with a_k = 1 and a multiple of 16 terms. Returns how many values of m it did.
template <int V>
int64_t product_tiles(int64_t rows, const uint32_t* a, int64_t a_m, const uint32_t* b, float* c, int64_t c_stride,
                      int64_t terms, const vf* factor, vi keep, Prefetch& prefetch) {
    alignas(64) float sums[TILE_ROWS * BLOCK];
    int64_t m = 0;
    for (; m + TILE_ROWS <= rows; m += TILE_ROWS) {
        prefetch.step();
        tile_zero<0>();
        if constexpr (V > 1) tile_zero<1>();
        for (int64_t k = 0; k < terms; k += 16) {
            tile_load<4>(a + m * a_m + k, 4 * a_m);
            const uint32_t* right = b + k * BLOCK;
            tile_load<5>(right, 4 * BLOCK), tile_multiply_add<0, 4, 5>();
            if constexpr (V > 1) tile_load<5>(right + VL, 4 * BLOCK), tile_multiply_add<1, 4, 5>();
        }
        float* to = factor ? sums : c + m * c_stride;
        const int64_t pitch = 4 * (factor ? BLOCK : c_stride);
        tile_store<0>(to, pitch);
        if constexpr (V > 1) tile_store<1>(to + VL, pitch);
        if (!factor) continue;
        for (int i = 0; i < TILE_ROWS; ++i)
            for (int v = 0; v < V; ++v) {
                float* at = c + (m + i) * c_stride + v * VL;
                const vf old = load(at), sum = old * factor[v] + load(sums + i * BLOCK + v * VL);
                store(at, v == V - 1 ? (keep ? sum : old) : sum);
            }
    }
    return m;
}
#endif

template <class Element, int V>
__attribute__((noinline)) void product_vectors(int64_t rows, const typename Element::Term* a, int64_t a_m, int64_t a_k,
                                               const typename Element::Term* b, float* c, int64_t c_stride,
                                               int64_t terms, const vf* factor, vi keep, Prefetch& prefetch) {
#if defined(__AVX512F__)
    constexpr int M = 12;  // 24 accumulators and their operands fit 32 registers
#else
    constexpr int M = 12 / V;  // 12 fit 16
#endif
    int64_t m = 0;
#if defined(FORKTREE_TILES)
    if constexpr (Element::TERMS == 2)
        if (a_k == 1 && terms % 16 == 0)
            m = product_tiles<V>(rows, a, a_m, b, c, c_stride, terms, factor, keep, prefetch);
#endif
    for (; m + M <= rows; m += M)
        product_block<Element, V, M>(a + m * a_m, a_m, a_k, b, c + m * c_stride, c_stride, terms, factor, keep,
                                     prefetch);
    for (; m + 4 <= rows; m += 4)
        product_block<Element, V, 4>(a + m * a_m, a_m, a_k, b, c + m * c_stride, c_stride, terms, factor, keep,
                                     prefetch);
    for (; m < rows; ++m)
        product_block<Element, V, 1>(a + m * a_m, a_m, a_k, b, c + m * c_stride, c_stride, terms, factor, keep,
                                     prefetch);
}

// Like product_block, for any number of rows and one or two vectors.
template <class Element>
void product(int vectors, int64_t rows, const typename Element::Term* a, int64_t a_m, int64_t a_k,
             const typename Element::Term* b, float* c, int64_t c_stride, int64_t terms, const vf* factor, vi keep,
             Prefetch& prefetch) {
    const auto run = vectors == 1 ? product_vectors<Element, 1> : product_vectors<Element, 2>;
    run(rows, a, a_m, a_k, b, c, c_stride, terms, factor, keep, prefetch);
}

}  // namespace
}  // namespace forktree::FORKTREE_ISA
