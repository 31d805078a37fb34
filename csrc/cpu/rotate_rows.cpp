#include "cpu/rotate_rows.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/numeric.hpp"
#include "common/ranges.hpp"

namespace forktree {
namespace {

// One head: pairs are STEP elements apart, the two elements of a pair `apart` elements.
template <int STEP, class T>
void rotate(const T* __restrict q, T* __restrict out, int64_t pairs, int64_t apart, const float* __restrict cos,
            const float* __restrict sin) {
    for (int64_t i = 0; i < pairs; ++i) {
        const float x = to_float(q[i * STEP]), y = to_float(q[i * STEP + apart]);
        out[i * STEP] = from_float<T>(x * cos[i] - y * sin[i]);
        out[i * STEP + apart] = from_float<T>(y * cos[i] + x * sin[i]);
    }
}

template <class T>
void rotate_all(const RotateRowsParams& x, int threads) {
    const int64_t pairs = x.pairs, heads = x.heads, dim = x.dim;
    const Indices shift = x.shift;
    const Ranges ranges(shift.size, 2 * shift.size * heads * dim * int64_t(sizeof(T)));
    std::vector<float> angles(size_t(ranges.tasks * 2 * pairs));
    ranges.run(threads, [&](int64_t task, int64_t begin, int64_t end) {
        float* cos = angles.data() + task * 2 * pairs;
        float* sin = cos + pairs;
        for (int64_t r = begin; r < end; ++r) {
            for (int64_t i = 0; i < pairs; ++i) {
                const double angle = double(shift[r]) * x.inv_freq[i];
                cos[i] = float(std::cos(angle));
                sin[i] = float(std::sin(angle));
            }
            for (int64_t h = 0; h < heads; ++h) {
                const T* from = static_cast<const T*>(x.q) + r * x.row_stride + h * x.head_stride;
                T* to = static_cast<T*>(x.out) + (r * heads + h) * dim;
                if (x.interleaved) rotate<2>(from, to, pairs, 1, cos, sin);
                else rotate<1>(from, to, pairs, pairs, cos, sin);
                std::memcpy(to + 2 * pairs, from + 2 * pairs, size_t(dim - 2 * pairs) * sizeof(T));
            }
        }
    });
}

}  // namespace

void rotate_rows(const RotateRowsParams& params, int threads) {
    if (params.pairs < 1 || params.pairs > params.dim / 2)
        throw std::invalid_argument("rotary_dim must be even and in [2, " + std::to_string(params.dim) + "] (D), got " +
                                    std::to_string(2 * params.pairs));
    with_dtype(int(params.dtype), [&](auto x) { rotate_all<decltype(x)>(params, threads); });
}

}  // namespace forktree
