// What is compiled once for every instruction set: its declarations, and the choice of one at run time.
#pragma once

#include "common/isa.hpp"

// Declares functions in the namespaces of all instruction sets.
#define FORKTREE_FOR_EACH_ISA(...) \
    namespace portable {           \
    __VA_ARGS__                    \
    }                              \
    namespace avx2 {               \
    __VA_ARGS__                    \
    }                              \
    namespace avx512 {             \
    __VA_ARGS__                    \
    }                              \
    namespace avx512bf16 {         \
    __VA_ARGS__                    \
    }                              \
    namespace amx {                \
    __VA_ARGS__                    \
    }

#ifdef FORKTREE_BUILT_AVX2
#define FORKTREE_CASE_AVX2(call) \
    case Isa::avx2: return avx2::call;
#else
#define FORKTREE_CASE_AVX2(call)
#endif
#ifdef FORKTREE_BUILT_AVX512
#define FORKTREE_CASE_AVX512(call) \
    case Isa::avx512: return avx512::call;
#else
#define FORKTREE_CASE_AVX512(call)
#endif
#ifdef FORKTREE_BUILT_AVX512BF16
#define FORKTREE_CASE_AVX512BF16(call) \
    case Isa::avx512bf16: return avx512bf16::call;
#else
#define FORKTREE_CASE_AVX512BF16(call)
#endif
#ifdef FORKTREE_BUILT_AMX
#define FORKTREE_CASE_AMX(call) \
    case Isa::amx: return amx::call;
#else
#define FORKTREE_CASE_AMX(call)
#endif

// Returns `call`, a call of a function so declared, of the instruction set in use.
#define FORKTREE_RETURN_OF_ISA(call)    \
    switch (isa()) {                    \
        FORKTREE_CASE_AMX(call)         \
        FORKTREE_CASE_AVX512BF16(call)  \
        FORKTREE_CASE_AVX512(call)      \
        FORKTREE_CASE_AVX2(call)        \
        default: return portable::call; \
    }
