// The kernel of tree attention on a GPU, and its launch.
#pragma once

#include <atomic>

#include "cuda/tree_attention/block.cuh"
#include "cuda/tree_attention/warp.cuh"

#if defined(FORKTREE_EMULATE_CUDA)
#define FORKTREE_BOUNDS(threads, blocks)
#else
#define FORKTREE_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#endif

namespace forktree {
namespace attention {

template <class T, int D, bool BIASED>
FORKTREE_KERNEL void FORKTREE_BOUNDS(ATTENTION_THREADS, 2) kernel(const GpuAttention call) {
    Block<T, D, BIASED>(call).work();
}

}  // namespace attention

template <class T, int D>
void launch_attention(const GpuAttention& call, void* stream) {
    const bool biased = call.biased();
    const auto kernel = biased ? attention::kernel<T, D, true> : attention::kernel<T, D, false>;
    constexpr int BYTES = sizeof(attention::Shared<D>), DEVICES = 64;
    static std::atomic<int> known[2][DEVICES];  // resident blocks: asking takes longer than launching
    std::atomic<int>& blocks = known[biased][call.device % DEVICES];
    if (!blocks) blocks = gpu::resident_blocks(kernel, ATTENTION_THREADS, BYTES);
    gpu::launch(kernel, blocks.load(), ATTENTION_THREADS, BYTES, stream, call);
}

}  // namespace forktree
