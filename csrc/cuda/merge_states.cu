#include <cmath>
#include <stdexcept>
#include <string>

#include "cpu/merge_states.hpp"
#include "gpu/gpu_vector.cuh"

namespace forktree::cuda {
namespace {

constexpr int THREADS = 128;
constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;

// One thread per vector of an output; a token has `parts` blocks. Indices beyond the states are skipped, as the host
// could not check them.
template <class T, int N>
FORKTREE_KERNEL void merge(const T* o, const float* lse, int64_t states, int heads, int dim, Indices indptr,
                           Indices index, T* out, float* total, int parts) {
    const int64_t token = gpu::block() / parts;
    const int64_t at = (int64_t(gpu::block() % parts) * THREADS + gpu::thread()) * N;
    if (at >= int64_t(heads) * dim) return;
    const int head = int(at) / dim;
    const int64_t begin = indptr[token] < 0 ? 0 : indptr[token];
    const int64_t end = indptr[token + 1] > index.size ? index.size : indptr[token + 1];
    const auto each = [&](auto take) {
        for (int64_t i = begin; i < end; ++i)
            if (const int64_t state = index[i]; state >= 0 && state < states) take(state, lse[state * heads + head]);
    };

    float highest = -INFINITY;
    each([&](int64_t, float x) { highest = fmaxf(highest, x); });
    if (highest == -INFINITY) highest = 0;  // all are empty: 2^(-inf - 0) = 0, while -inf - -inf would be NaN
    float mass = 0, sum[N] = {};
    each([&](int64_t state, float x) {
        const float weight = gpu::exp2((x - highest) * LOG2E);
        mass += weight;
        const auto from = gpu::load<N>(o + state * heads * dim + at);
        // An empty state's output may hold anything; selected here, so that loads need not wait.
        for (int i = 0; i < N; ++i) sum[i] += weight * (x == -INFINITY ? 0.0f : to_float(from.item[i]));
    });
    const float scale = mass == 0 ? 1 : 1 / mass;
    gpu::Vector<T, N> merged;
    for (int i = 0; i < N; ++i) merged.item[i] = from_float<T>(sum[i] * scale);
    gpu::store(out + token * heads * dim + at, merged);
    if (at == int64_t(head) * dim) total[token * heads + head] = gpu::log2(mass) * LN2 + highest;
}

template <class T>
void merge_all(const MergeStatesParams& x, void* stream) {
    const T* o = static_cast<const T*>(x.o);
    T* out = static_cast<T*>(x.out);
    const int heads = int(x.heads), dim = int(x.dim);
    const bool wide = gpu::in_chunks(sizeof(T), {o, out}, {dim});
    const int64_t vectors = int64_t(heads) * dim / (wide ? gpu::WIDE<T> : 1);
    const int64_t parts = (vectors + THREADS - 1) / THREADS;
    const auto kernel = wide ? merge<T, gpu::WIDE<T>> : merge<T, 1>;
    gpu::launch(kernel, (x.indptr.size - 1) * parts, THREADS, 0, stream, o, x.lse, x.states, heads, dim, x.indptr,
                x.index, out, x.total, int(parts));
}

}  // namespace

void merge_states(const MergeStatesParams& params, void* stream) {
    const int64_t size = params.heads * params.dim;
    if (params.indptr.size < 1) throw std::invalid_argument("indptr must have at least 1 entry, got 0");
    if (size > INT32_MAX)
        throw std::invalid_argument("a state must be below 2^31 elements, got " + std::to_string(size));
    with_dtype(int(params.dtype), [&](auto x) { merge_all<decltype(x)>(params, stream); });
}

}  // namespace forktree::cuda
