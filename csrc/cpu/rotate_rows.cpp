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

// One head: pairs lie STEP elements after one another, the two of a pair `apart`.
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
void rotate_all(const T* q, int64_t row_stride, int64_t head_stride, int64_t heads, int64_t dim, Indices shift,
                const Rotation& rotation, T* out, int threads) {
    const int64_t pairs = rotation.pairs;
    const Ranges ranges(shift.size, 2 * shift.size * heads * dim * int64_t(sizeof(T)));
    std::vector<float> angles(size_t(ranges.tasks * 2 * pairs));
    ranges.run(threads, [&](int64_t task, int64_t begin, int64_t end) {
        float* cos = angles.data() + task * 2 * pairs;
        float* sin = cos + pairs;
        for (int64_t r = begin; r < end; ++r) {
            for (int64_t i = 0; i < pairs; ++i) {
                const double angle = double(shift[r]) * rotation.inv_freq[i];
                cos[i] = float(std::cos(angle));
                sin[i] = float(std::sin(angle));
            }
            for (int64_t h = 0; h < heads; ++h) {
                const T* from = q + r * row_stride + h * head_stride;
                T* to = out + (r * heads + h) * dim;
                if (rotation.interleaved) rotate<2>(from, to, pairs, 1, cos, sin);
                else rotate<1>(from, to, pairs, pairs, cos, sin);
                std::memcpy(to + 2 * pairs, from + 2 * pairs, size_t(dim - 2 * pairs) * sizeof(T));
            }
        }
    });
}

}  // namespace

void rotate_rows(int dtype, const void* q, int64_t row_stride, int64_t head_stride, int64_t heads, int64_t dim,
                 Indices shift, const Rotation& rotation, void* out, int threads) {
    if (rotation.pairs < 1 || rotation.pairs > dim / 2)
        throw std::invalid_argument("rotary_dim must be even and in [2, " + std::to_string(dim) + "] (D), got " +
                                    std::to_string(2 * rotation.pairs));
    with_dtype(dtype, [&](auto x) {
        using T = decltype(x);
        rotate_all(static_cast<const T*>(q), row_stride, head_stride, heads, dim, shift, rotation, static_cast<T*>(out),
                   threads);
    });
}

}  // namespace forktree
