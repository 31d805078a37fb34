#include <stdexcept>
#include <string>

#include "cpu/append_kv.hpp"
#include "gpu/gpu_vector.cuh"

namespace forktree::cuda {
namespace {

constexpr int THREADS = 128;

// One thread per vector of K or V; a token has `parts` blocks, those of K first.
template <class T, int N>
FORKTREE_KERNEL void append(Append k, Append v, int64_t heads, int64_t num_slots, Indices slots, int parts) {
    const int64_t token = gpu::block() / parts;
    const int64_t slot = slots[token];
    if (slot < 0 || slot >= num_slots) return;
    int64_t at = (int64_t(gpu::block() % parts) * THREADS + gpu::thread()) * N;
    const bool is_k = at < heads * k.dim;
    if (!is_k) at -= heads * k.dim;
    const int64_t dim = is_k ? k.dim : v.dim;
    if (at >= heads * dim) return;
    const int head = int(at) / int(dim), i = int(at) % int(dim);
    // By value: a reference would put all four into local memory.
    const auto address = [&](const Strided& of_k, const Strided& of_v, int64_t row) {
        return static_cast<T*>(is_k ? of_k.data : of_v.data) + row * (is_k ? of_k.stride : of_v.stride) +
               head * (is_k ? of_k.head_stride : of_v.head_stride) + i;
    };
    gpu::store(address(k.pool, v.pool, slot), gpu::load<N>(address(k.rows, v.rows, token)));
}

template <class T>
void append_all(int64_t heads, int64_t num_slots, Indices slots, const Append& k, const Append& v, void* stream) {
    bool wide = gpu::in_chunks(sizeof(T), {}, {k.dim, v.dim});
    for (const Strided& x : {k.rows, k.pool, v.rows, v.pool})
        wide &= gpu::in_chunks(sizeof(T), {x.data}, {x.stride, x.head_stride});
    const int64_t vectors = heads * (k.dim + v.dim) / (wide ? gpu::WIDE<T> : 1);
    const int64_t parts = (vectors + THREADS - 1) / THREADS;
    const auto kernel = wide ? append<T, gpu::WIDE<T>> : append<T, 1>;
    gpu::launch(kernel, slots.size * parts, THREADS, 0, stream, k, v, heads, num_slots, slots, int(parts));
}

}  // namespace

void append_kv(const AppendKvParams& params, void* stream) {
    const Append k = keys(params), v = values(params);
    const int64_t heads = params.pool.num_kv_heads;
    if (heads * (k.dim + v.dim) > INT32_MAX)
        throw std::invalid_argument("K and V of a token must be below 2^31 elements, got " +
                                    std::to_string(heads * (k.dim + v.dim)));
    // Only bits are copied, so all 16-bit types are treated alike.
    const auto append_as = item_size(int(params.pool.dtype)) == 4 ? append_all<uint32_t> : append_all<uint16_t>;
    append_as(heads, params.pool.num_slots, params.slots, k, v, stream);
}

}  // namespace forktree::cuda
