// What device code speaks to the machine through. A .cu file includes this, and nothing else of CUDA, so that one
// source has two implementations: nvcc takes the machine's (gpu_device.cuh); a C++ compiler, under
// FORKTREE_EMULATE_CUDA, one that runs every thread of a block as a fiber on the CPU (gpu_host.hpp), where shared
// memory, divergence and waits can be checked. The implementations give, in forktree::gpu:
//
//   thread() threads() block() blocks()     one-dimensional; threads() is a multiple of 32
//   lane() warp()
//   shared_memory()                         char*, dynamic, aligned to 128 bytes; there is no other
//   copy16(shared, global, valid)           16 bytes, asynchronously; zeros unless valid
//   commit() wait<N>()                      closes a group of copies; waits until at most N groups are on their way.
//                                           Other threads see the bytes after a barrier
//   load_matrix(r, row)                     4 matrices of 8 x 8 16-bit elements: lane l names row l % 8 of matrix l / 8
//   load_matrix_transposed(r, row)          (16 bytes, aligned) and gets elements 2 (l % 4) and + 1 of row l / 4 of
//   each,
//                                           or, transposed, of column l / 4
//   mma(d, a, b0, b1, T{})                  d [16, 8] fp32 += a [16, 16] b [16, 8], of Bf16 or Fp16; see fragments
//   below shuffle(x, lane) shuffle_xor(x, mask)   of int32_t, uint32_t and float; by all 32 lanes ballot(condition)
//   likewise sync_warp() sync_block() atomic_add(address, x)                  int32_t; the value before fence() what
//   was written before it is seen by all blocks before what comes after load_cg(address) int32_t, float or Chunk that
//   another block may have written load16(address) store16(address, x)     a Chunk, of global or shared memory exp2(x)
//   log2(x) reciprocal(x)           fp32, to about 2 units in the last place pack(low, high, T{}) two floats as Bf16 or
//   Fp16, to nearest, ties to even
//
// and on the host (std::runtime_error with the reason):
//
//   launch(kernel, blocks, threads, shared_bytes, stream, arguments...)
//   resident_blocks(kernel, threads, shared_bytes)   that the current device runs at a time
//
// Fragments: lane l holds of a rows l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]), columns 2 (l % 4) and + 1, in a[2]
// and a[3] + 8 more; of b column l / 4, rows 2 (l % 4) and + 1, in b1 + 8 more; of d row l / 4 (d[0], d[1]) and l / 4 +
// 8 (d[2], d[3]), columns 2 (l % 4) and + 1.
#pragma once

#include <cstdint>

#include "numeric.hpp"

namespace forktree::gpu {

constexpr int WARP = 32;

struct alignas(16) Chunk {
    uint32_t word[4];
};

}  // namespace forktree::gpu

#if defined(FORKTREE_EMULATE_CUDA)
#include "gpu_host.hpp"
#else
#include "gpu_device.cuh"
#endif

namespace forktree::gpu {

// Absolute error about 1e-7: tanh.approx has 5e-4, too much for scores a cap multiplies again.
FORKTREE_DEVICE float tanh(float x) { return 1 - 2 * reciprocal(exp2(x * 2.885390082f) + 1); }

}  // namespace forktree::gpu
