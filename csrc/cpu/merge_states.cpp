#include "cpu/merge_states.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/numeric.hpp"
#include "common/ranges.hpp"

namespace forktree {
namespace {

constexpr float EMPTY = -std::numeric_limits<float>::infinity();

std::string listed(Indices values) {
    constexpr int64_t shown = 16;
    std::string text = "[";
    for (int64_t i = 0; i < std::min(values.size, shown); ++i) text += (i ? ", " : "") + std::to_string(values[i]);
    return text + (values.size > shown ? ", ...]" : "]");
}

void check(Indices indptr, Indices index, int64_t states) {
    bool rises = indptr.size > 0 && indptr[0] == 0 && indptr[indptr.size - 1] == index.size;
    for (int64_t t = 1; t < indptr.size; ++t) rises &= indptr[t] >= indptr[t - 1];
    if (!rises)
        throw std::invalid_argument("indptr must rise from 0 to " + std::to_string(index.size) +
                                    " (entries in index), got " + listed(indptr));
    if (!index.size) return;
    int64_t lowest = index[0], highest = index[0];
    for (int64_t i = 1; i < index.size; ++i) {
        lowest = std::min(lowest, index[i]);
        highest = std::max(highest, index[i]);
    }
    if (lowest < 0 || highest >= states)
        throw std::invalid_argument("index must be in [0, " + std::to_string(states) + "), got " +
                                    std::to_string(lowest) + " to " + std::to_string(highest));
}

// sum [dim] += weight * o [dim]
template <class T>
void add(const T* __restrict o, float weight, float* __restrict sum, int64_t dim) {
    for (int64_t d = 0; d < dim; ++d) sum[d] += weight * to_float(o[d]);
}

template <class T>
void merge_all(const MergeStatesParams& x, int threads) {
    const T* o = static_cast<const T*>(x.o);
    const float* lse = x.lse;
    const int64_t heads = x.heads, dim = x.dim;
    const Indices indptr = x.indptr, index = x.index;
    const int64_t outputs = (indptr.size - 1) * heads;
    const Ranges ranges(outputs, (index.size * heads + outputs) * dim * int64_t(sizeof(T)));
    std::vector<float> sums(size_t(ranges.tasks * dim));
    ranges.run(threads, [&](int64_t task, int64_t first, int64_t last) {
        float* sum = sums.data() + task * dim;
        for (int64_t output = first; output < last; ++output) {
            const int64_t t = output / heads, h = output % heads;
            const int64_t begin = indptr[t], end = indptr[t + 1];
            T* to = static_cast<T*>(x.out) + output * dim;
            float highest = EMPTY;
            for (int64_t i = begin; i < end; ++i) highest = std::max(highest, lse[index[i] * heads + h]);
            if (highest == EMPTY) highest = 0;  // all are empty: exp(-inf - 0) = 0, while -inf - -inf would be NaN
            std::fill_n(sum, dim, 0.0f);
            float mass = 0;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t state = index[i] * heads + h;
                if (lse[state] == EMPTY) continue;  // its output may hold anything
                const float weight = std::exp(lse[state] - highest);
                mass += weight;
                add(o + state * dim, weight, sum, dim);
            }
            const float scale = mass == 0 ? 1 : 1 / mass;
            for (int64_t d = 0; d < dim; ++d) to[d] = from_float<T>(sum[d] * scale);
            x.total[output] = std::log(mass) + highest;
        }
    });
}

}  // namespace

void merge_states(const MergeStatesParams& params, int threads) {
    check(params.indptr, params.index, params.states);
    with_dtype(int(params.dtype), [&](auto x) { merge_all<decltype(x)>(params, threads); });
}

}  // namespace forktree
