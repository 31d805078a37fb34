#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/rotate_rows.hpp"
#include "gpu/gpu_vector.cuh"

namespace forktree::cuda {
namespace {

constexpr int THREADS = 128;

struct Rows {
    const void* q;
    int64_t row_stride, head_stride;
    void* out;
    int heads, dim;
};

struct Rotation {
    const double* inv_freq;
    int64_t pairs;
    bool interleaved;
};

// One block per row: computes its angles once, in shared memory, then rotates N pairs of a head at a time.
template <class T, int N, bool INTERLEAVED>
FORKTREE_KERNEL void rotate(Rows x, Indices shift, Rotation rotation) {
    const int64_t row = gpu::block();
    const int pairs = int(rotation.pairs);
    float* cos = reinterpret_cast<float*>(gpu::shared_memory());
    float* sin = cos + pairs;
    for (int i = gpu::thread(); i < pairs; i += THREADS) {
        const double angle = double(shift[row]) * rotation.inv_freq[i];
        double c, s;
        ::sincos(angle, &s, &c);
        cos[i] = float(c);
        sin[i] = float(s);
    }
    gpu::sync_block();

    const int rotating = pairs / N, units = rotating + (x.dim - 2 * pairs) / N;  // of a head; the rest is copied
    for (int unit = gpu::thread(); unit < x.heads * units; unit += THREADS) {
        const int head = unit / units, i = unit % units * N;
        const T* from = static_cast<const T*>(x.q) + row * x.row_stride + head * x.head_stride;
        T* to = static_cast<T*>(x.out) + (row * x.heads + head) * x.dim;
        if (i >= pairs) {
            gpu::store(to + pairs + i, gpu::load<N>(from + pairs + i));
            continue;
        }
        const int first = INTERLEAVED ? 2 * i : i, second = first + (INTERLEAVED ? N : pairs);
        gpu::Vector<T, N> in[2] = {gpu::load<N>(from + first), gpu::load<N>(from + second)}, turned[2];
        for (int j = 0; j < N; ++j) {
            // The elements of pair i + j: the vectors hold one each, or whole pairs in sequence.
            const int a = INTERLEAVED ? 2 * j : j, b = INTERLEAVED ? 2 * j + 1 : N + j;
            const float u = to_float(in[a / N].item[a % N]), w = to_float(in[b / N].item[b % N]);
            turned[a / N].item[a % N] = from_float<T>(u * cos[i + j] - w * sin[i + j]);
            turned[b / N].item[b % N] = from_float<T>(w * cos[i + j] + u * sin[i + j]);
        }
        gpu::store(to + first, turned[0]);
        gpu::store(to + second, turned[1]);
    }
}

template <class T>
void rotate_all(const Rows& x, Indices shift, const Rotation& rotation, void* stream) {
    const bool wide = gpu::in_chunks(sizeof(T), {x.q, x.out}, {x.row_stride, x.head_stride, x.dim, rotation.pairs});
    constexpr int N = gpu::WIDE<T>;
    const auto kernel = rotation.interleaved ? (wide ? rotate<T, N, true> : rotate<T, 1, true>)
                                             : (wide ? rotate<T, N, false> : rotate<T, 1, false>);
    const int shared_bytes = int(2 * rotation.pairs * sizeof(float));
    gpu::launch(kernel, shift.size, THREADS, shared_bytes, stream, x, shift, rotation);
}

}  // namespace

void rotate_rows(const RotateRowsParams& params, void* stream) {
    const int64_t heads = params.heads, dim = params.dim;
    if (params.pairs < 1 || params.pairs > dim / 2)
        throw std::invalid_argument("rotary_dim must be even and in [2, " + std::to_string(dim) + "] (D), got " +
                                    std::to_string(2 * params.pairs));
    if (heads * dim > INT32_MAX)
        throw std::invalid_argument("a row must be below 2^31 elements, got " + std::to_string(heads * dim));
    if (!heads) return;
    const Rows rows{params.q, params.row_stride, params.head_stride, params.out, int(heads), int(dim)};
    const Rotation rotation{params.inv_freq, params.pairs, params.interleaved};
    with_dtype(int(params.dtype), [&](auto x) { rotate_all<decltype(x)>(rows, params.shift, rotation, stream); });
}

}  // namespace forktree::cuda
