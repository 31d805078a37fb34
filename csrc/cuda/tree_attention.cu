#include <stdexcept>
#include <string>

#include "cuda/tree_attention_gpu.hpp"

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
void launch_dim(int32_t head_dim, const GpuAttention& call, bool biased, GpuStream stream) {
    switch (head_dim) {
        case 64: return launch_attention<T, 64>(call, biased, stream);
        case 96: return launch_attention<T, 96>(call, biased, stream);
        case 128: return launch_attention<T, 128>(call, biased, stream);
        case 256: return launch_attention<T, 256>(call, biased, stream);
    }
    throw std::invalid_argument("head_dim must be 64, 96, 128 or 256, got " + std::to_string(head_dim));
}

}  // namespace

void cuda::tree_attention(int dtype, int32_t head_dim, int64_t max_partials, float* partials, GpuAttention call,
                          GpuStream stream) {
    check_aligned("q", call.q);
    check_aligned("k_slots", call.k);
    check_aligned("v_slots", call.v);
    check_aligned("out", call.out);
    check_aligned("partials", partials);
    check_strides("q", call.q_row_stride, call.q_head_stride);
    check_strides("k_slots", call.k_slot_stride, call.k_head_stride);
    check_strides("v_slots", call.v_slot_stride, call.v_head_stride);
    if (call.num_kv_heads < 1 || call.num_qo_heads < 1 || call.num_qo_heads % call.num_kv_heads)
        throw std::invalid_argument("query heads must be a multiple of the KV heads, got " +
                                    std::to_string(call.num_qo_heads) + " and " + std::to_string(call.num_kv_heads));
    if (call.num_tokens < 0 || max_partials < 0)
        throw std::invalid_argument("num_tokens and max_partials must be at least 0, got " +
                                    std::to_string(call.num_tokens) + " and " + std::to_string(max_partials));
    const int64_t states = max_partials * call.num_qo_heads;
    call.group = call.num_qo_heads / call.num_kv_heads;
    call.partial_out = partials;
    call.partial_top = partials + states * head_dim;
    call.partial_mass = call.partial_top + states;
    const bool biased = call.softcap > 0 || call.alibi_slopes || !(call.scale > 0);
    switch (Dtype(dtype)) {
        case Dtype::bf16: return launch_dim<Bf16>(head_dim, call, biased, stream);
        case Dtype::fp16: return launch_dim<Fp16>(head_dim, call, biased, stream);
        default: throw std::invalid_argument("dtype must be 1 (bf16) or 2 (fp16), got " + std::to_string(dtype));
    }
}

}  // namespace forktree
