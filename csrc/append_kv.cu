#include <stdexcept>
#include <string>

#include "append_kv.hpp"
#include "gpu_vector.cuh"

namespace forktree::cuda {
namespace {

constexpr int THREADS = 128;

// One thread a vector of K or V; a token's are `parts` blocks, those of K first.
template <class T, int N>
FORKTREE_KERNEL void append(Append k, Append v, int64_t heads, int64_t num_slots, Indices slots, int parts) {
    const int64_t token = gpu::block() / parts;
    const int64_t slot = slots[token];
    if (slot < 0 || slot >= num_slots) return;
    int64_t at = (int64_t(gpu::block() % parts) * THREADS + gpu::thread()) * N;
    const bool is_k = at < heads * k.dim;
    if (!is_k) at -= heads * k.dim;
    const Append x{is_k ? k.rows : v.rows, is_k ? k.row_stride : v.row_stride, is_k ? k.head_stride : v.head_stride,
                   is_k ? k.dim : v.dim, is_k ? k.pool : v.pool};  // a reference would put both into local memory
    if (at >= heads * x.dim) return;
    const int head = int(at) / int(x.dim), i = int(at) % int(x.dim);
    const T* from = static_cast<const T*>(x.rows) + token * x.row_stride + head * x.head_stride + i;
    gpu::store(static_cast<T*>(x.pool) + slot * heads * x.dim + at, gpu::load<N>(from));
}

template <class T>
void append_all(int64_t heads, int64_t num_slots, Indices slots, const Append& k, const Append& v, void* stream) {
    const bool wide = gpu::in_chunks(sizeof(T), {k.rows, k.pool, v.rows, v.pool},
                                     {k.dim, k.row_stride, k.head_stride, v.dim, v.row_stride, v.head_stride});
    const int64_t vectors = heads * (k.dim + v.dim) / (wide ? gpu::WIDE<T> : 1);
    const int64_t parts = (vectors + THREADS - 1) / THREADS;
    const auto kernel = wide ? append<T, gpu::WIDE<T>> : append<T, 1>;
    gpu::launch(kernel, slots.size * parts, THREADS, 0, stream, k, v, heads, num_slots, slots, int(parts));
}

}  // namespace

void append_kv(int dtype, int64_t heads, int64_t num_slots, Indices slots, const Append& k, const Append& v,
               void* stream) {
    if (heads * (k.dim + v.dim) > INT32_MAX)
        throw std::invalid_argument("K and V of a token must be below 2^31 elements, got " +
                                    std::to_string(heads * (k.dim + v.dim)));
    // Numbers are not looked at: elements of 16 bits are all alike.
    if (item_size(dtype) == 4) append_all<uint32_t>(heads, num_slots, slots, k, v, stream);
    else append_all<uint16_t>(heads, num_slots, slots, k, v, stream);
}

}  // namespace forktree::cuda
