// The device implementation of gpu.cuh: PTX for sm_80 and later.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/numeric.hpp"

#define FORKTREE_KERNEL __global__
#define FORKTREE_DEVICE __device__ __forceinline__

namespace forktree::gpu {

FORKTREE_DEVICE int thread() { return threadIdx.x; }
FORKTREE_DEVICE int threads() { return blockDim.x; }
FORKTREE_DEVICE int block() { return blockIdx.x; }
FORKTREE_DEVICE int blocks() { return gridDim.x; }
FORKTREE_DEVICE int lane() { return threadIdx.x % WARP; }
FORKTREE_DEVICE int warp() { return threadIdx.x / WARP; }

FORKTREE_DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char forktree_shared_memory[];
    return forktree_shared_memory;
}

FORKTREE_DEVICE uint32_t shared_address(const void* shared) { return uint32_t(__cvta_generic_to_shared(shared)); }

FORKTREE_DEVICE void copy16(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

FORKTREE_DEVICE void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int N>
FORKTREE_DEVICE void wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

FORKTREE_DEVICE void load_matrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

FORKTREE_DEVICE void load_matrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

FORKTREE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Bf16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

FORKTREE_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Fp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
FORKTREE_DEVICE T shuffle(T x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}

template <class T>
FORKTREE_DEVICE T shuffle_xor(T x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}

FORKTREE_DEVICE uint32_t ballot(bool condition) { return __ballot_sync(0xffffffffu, condition); }
FORKTREE_DEVICE void sync_warp() { __syncwarp(); }
FORKTREE_DEVICE void sync_block() { __syncthreads(); }

FORKTREE_DEVICE int32_t atomic_add(int32_t* address, int32_t x) { return atomicAdd(address, x); }
FORKTREE_DEVICE void fence() { __threadfence(); }

template <class T>
FORKTREE_DEVICE T load_cg(const T* address) {
    return __ldcg(address);
}

template <>
FORKTREE_DEVICE Chunk load_cg<Chunk>(const Chunk* address) {
    const uint4 x = __ldcg(reinterpret_cast<const uint4*>(address));
    return {{x.x, x.y, x.z, x.w}};
}

FORKTREE_DEVICE Chunk load16(const void* address) {
    const uint4 x = *static_cast<const uint4*>(address);
    return {{x.x, x.y, x.z, x.w}};
}

// A plain store of a uint4 becomes four stores if its parts were computed separately.
FORKTREE_DEVICE void store16(void* address, Chunk x) {
    __stcg(static_cast<uint4*>(address), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}

FORKTREE_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FORKTREE_DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FORKTREE_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

FORKTREE_DEVICE uint32_t pack(float low, float high, Bf16) {
    uint32_t x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

FORKTREE_DEVICE uint32_t pack(float low, float high, Fp16) {
    uint32_t x;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

// ---------------------------------------------------------------------- host

inline void check(cudaError_t status, const char* what) {
    if (status == cudaSuccess) return;
    cudaGetLastError();  // otherwise the next call would report it again
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline void require_device() {
    static const int count = [] {
        int found = 0;
        const cudaError_t status = cudaGetDeviceCount(&found);
        if (status != cudaSuccess || !found)
            throw std::runtime_error(std::string("no CUDA device: cudaGetDeviceCount says ") +
                                     (status == cudaSuccess ? "there are 0" : cudaGetErrorString(status)));
        return found;
    }();
    (void)count;
}

template <class... P>
void allow_shared(void (*kernel)(P...), int shared_bytes) {
    if (shared_bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes),
              "cudaFuncSetAttribute");
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, int threads, int shared_bytes, void* stream, A... arguments) {
    require_device();
    if (!blocks) return;
    if (blocks > INT32_MAX)
        throw std::runtime_error("a launch has at most 2^31 - 1 blocks, got " + std::to_string(blocks));
    allow_shared(kernel, shared_bytes);
    kernel<<<dim3(unsigned(blocks)), threads, size_t(shared_bytes), static_cast<cudaStream_t>(stream)>>>(arguments...);
    check(cudaGetLastError(), "launching a kernel");
}

template <class... P>
int resident_blocks(void (*kernel)(P...), int threads, int shared_bytes) {
    require_device();
    allow_shared(kernel, shared_bytes);
    int device = 0, processors = 0, blocks = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, size_t(shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    if (!blocks)
        throw std::runtime_error("the device has no room for a block of " + std::to_string(threads) + " threads and " +
                                 std::to_string(shared_bytes) + " bytes of shared memory");
    return blocks * processors;
}

}  // namespace forktree::gpu
