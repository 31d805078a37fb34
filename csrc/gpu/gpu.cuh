// The machine interface of device code. A .cu file includes this, and nothing else of CUDA, so that one source has two
// implementations: nvcc takes the machine's (gpu_device.cuh); a C++ compiler, under FORKTREE_EMULATE_CUDA, takes one
// that runs every thread of a block as a fiber on the CPU (gpu_host.hpp), where shared memory, divergence and waits can
// be checked. The implementations provide, in forktree::gpu:
//
//   thread() threads() block() blocks()  one-dimensional; threads() is a multiple of 32
//   lane() warp()
//   shared_memory()                      char*, dynamic, aligned to 128 bytes; there is no other
//   copy16(shared, global, valid)        16 bytes, asynchronously; zeros unless valid
//   commit()                             closes a group of copies
//   wait<N>()                            until at most N groups are in flight; other threads see the bytes after a
//   barrier load_matrix(r, row)                  4 matrices of 8 x 8 elements of 16 bits: lane l names row l % 8 of
//   matrix
//                                        l / 8 (at a multiple of 16) and gets of each elements 2 (l % 4) and + 1 of row
//                                        l / 4
//   load_matrix_transposed(r, row)       or of column l / 4
//   mma(d, a, b0, b1, T{})               d [16, 8] fp32 += a [16, 16] b [16, 8], of Bf16 or Fp16; fragments: see below
//   shuffle(x, lane)                     of int32_t, uint32_t and float; by all 32 lanes, as are
//   shuffle_xor(x, mask)
//   ballot(condition)
//   sync_warp() sync_block()
//   atomic_add(address, x)               int32_t; returns the value before
//   fence()                              all blocks see earlier writes before they see later ones
//   load_cg(address)                     int32_t, float or Chunk that another block may have written
//   load16(address) store16(address, x)  a Chunk of global memory
//   exp2(x) log2(x) reciprocal(x)        fp32, about 2 units in the last place; write gpu::, as C has its own
//   pack(low, high, T{})                 two floats as Bf16 or Fp16, to nearest, ties to even
//
// and on the host (std::runtime_error with the reason):
//
//   launch(kernel, blocks, threads, shared_bytes, stream, arguments...)
//   resident_blocks(kernel, threads, shared_bytes)   that the current device runs at the same time
//
// Fragments, of lane l:
//
//   a[0], a[1], a[2], a[3]  rows l / 4 + 0, 8, 0, 8, columns 2 (l % 4) and + 1, + 0, 0, 8, 8
//   b0, b1                  column l / 4, rows 2 (l % 4) and + 1, + 0, 8
//   d[0], d[1]; d[2], d[3]  row l / 4; and + 8; columns 2 (l % 4), + 1
#pragma once

#include <cstdint>

#include "common/numeric.hpp"

namespace forktree::gpu {

constexpr int WARP = 32;

struct alignas(16) Chunk {
    uint32_t word[4];
};

}  // namespace forktree::gpu

#if defined(FORKTREE_EMULATE_CUDA)
#include "gpu/gpu_host.hpp"
#else
#include "gpu/gpu_device.cuh"
#endif

namespace forktree::gpu {

// Absolute error about 1e-7; that of tanh.approx, 5e-4, is too large for scores that the cap multiplies again.
FORKTREE_DEVICE float tanh(float x) { return 1 - 2 * reciprocal(exp2(x * 2.885390082f) + 1); }

}  // namespace forktree::gpu
