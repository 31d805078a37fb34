// The kernel of one element type and head dim: compiled once for each, see setup.py.
#include "cuda/tree_attention/kernel.cuh"

namespace forktree {

template void launch_attention<FORKTREE_ELEMENT, FORKTREE_HEAD_DIM>(const GpuAttention&, void*);

}  // namespace forktree
