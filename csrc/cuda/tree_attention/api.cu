#include <stdexcept>
#include <string>

#include "cuda/tree_attention/tree_attention.hpp"

namespace forktree {
namespace {

void check_aligned(const char* name, const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16)
        throw std::invalid_argument(std::string(name) + " must be at an address that is a multiple of 16, got " +
                                    std::to_string(reinterpret_cast<uintptr_t>(address)));
}

void check_strides(const char* name, int64_t row_stride, int64_t head_stride) {
    if (row_stride % 8 || head_stride % 8)
        throw std::invalid_argument("strides of " + std::string(name) + " must be multiples of 8, got " +
                                    std::to_string(row_stride) + " and " + std::to_string(head_stride));
}

template <class T>
void launch_dim(const GpuAttention& call, void* stream) {
    switch (call.pool.k_dim) {
        case 64: return launch_attention<T, 64>(call, stream);
        case 96: return launch_attention<T, 96>(call, stream);
        case 128: return launch_attention<T, 128>(call, stream);
        case 256: return launch_attention<T, 256>(call, stream);
    }
    throw std::invalid_argument("head_dim must be 64, 96, 128 or 256, got " + std::to_string(call.pool.k_dim));
}

}  // namespace

void cuda::tree_attention(const TreeAttentionParams& params, void* stream) {
    const KvPool& pool = params.pool;
    check_aligned("q", params.q);
    check_aligned("k_slots", pool.k);
    check_aligned("v_slots", pool.v);
    check_aligned("out", params.out);
    check_aligned("partials", params.partials);
    check_strides("q", params.q_row_stride, params.q_head_stride);
    check_strides("k_slots", pool.k_slot_stride, pool.k_head_stride);
    check_strides("v_slots", pool.v_slot_stride, pool.v_head_stride);
    const int32_t heads = params.num_qo_heads, kv_heads = pool.num_kv_heads, dim = pool.k_dim;
    if (kv_heads < 1 || heads < 1 || heads % kv_heads)
        throw std::invalid_argument("query heads must be a multiple of the KV heads, got " + std::to_string(heads) +
                                    " and " + std::to_string(kv_heads));
    if (params.num_tokens < 0 || params.max_partials < 0)
        throw std::invalid_argument("num_tokens and max_partials must be at least 0, got " +
                                    std::to_string(params.num_tokens) + " and " + std::to_string(params.max_partials));
    if (dim != pool.v_dim)
        throw std::invalid_argument("head_dim must be that of K as of V, got " + std::to_string(dim) + " and " +
                                    std::to_string(pool.v_dim));
    const int64_t states = params.max_partials * heads;
    float* const top = params.partials + states * dim;
    const GpuAttention call{params, heads / kv_heads, params.partials, top, top + states};
    switch (params.dtype) {
        case Dtype::bf16: return launch_dim<Bf16>(call, stream);
        case Dtype::fp16: return launch_dim<Fp16>(call, stream);
        default:
            throw std::invalid_argument("dtype must be 1 (bf16) or 2 (fp16), got " + std::to_string(int(params.dtype)));
    }
}

}  // namespace forktree
