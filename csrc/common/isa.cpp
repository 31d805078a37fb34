#include "common/isa.hpp"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace forktree {
namespace {

constexpr const char* NAMES[] = {"portable", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int COUNT = 5;

constexpr bool BUILT[COUNT] = {
    true,
#ifdef FORKTREE_BUILT_AVX2
    true,
#else
    false,
#endif
#ifdef FORKTREE_BUILT_AVX512
    true,
#else
    false,
#endif
#ifdef FORKTREE_BUILT_AVX512BF16
    true,
#else
    false,
#endif
#ifdef FORKTREE_BUILT_AMX
    true,
#else
    false,
#endif
};

#if defined(__x86_64__)
#ifdef FORKTREE_EMULATE_AMX  // the tiles are plain C++, so that tests and sanitizers see that variant anywhere
constexpr bool EMULATE_AMX = true;
#else
constexpr bool EMULATE_AMX = false;
#endif

struct Cpu {
    uint32_t leaf1[4] = {}, leaf7_0[4] = {}, leaf7_1[4] = {};  // eax, ebx, ecx, edx
    Cpu() {
        __get_cpuid_count(1, 0, &leaf1[0], &leaf1[1], &leaf1[2], &leaf1[3]);
        __get_cpuid_count(7, 0, &leaf7_0[0], &leaf7_0[1], &leaf7_0[2], &leaf7_0[3]);
        __get_cpuid_count(7, 1, &leaf7_1[0], &leaf7_1[1], &leaf7_1[2], &leaf7_1[3]);
    }
    bool f16c() const { return leaf1[2] >> 29 & 1; }
    bool avx512bf16() const { return leaf7_1[0] >> 5 & 1; }
    bool amx() const { return (leaf7_0[3] >> 22 & 1) && (leaf7_0[3] >> 24 & 1); }
};

// Linux grants the tile registers only on request.
bool tiles_granted() {
#if defined(__linux__)
    constexpr int request_permission = 0x1023, tile_data = 18;
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

std::string missing(Isa wanted) {
    if (!BUILT[int(wanted)]) return "not built: the compiler does not know it, or it is for other machines";
#if defined(__x86_64__)
    const Cpu cpu;
    const char* lacks = "this processor does not have it";
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && cpu.f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    switch (wanted) {
        case Isa::portable: break;
        case Isa::avx2:
            if (!avx2) return lacks;
            break;
        case Isa::avx512:
            if (!avx512) return lacks;
            break;
        case Isa::avx512bf16:
            if (!avx512 || !cpu.avx512bf16()) return lacks;
            break;
        case Isa::amx:
            if (!avx512 || !cpu.avx512bf16() || !(EMULATE_AMX || cpu.amx())) return lacks;
            if (!(EMULATE_AMX || tiles_granted())) return "the operating system does not grant the tile registers";
            break;
    }
#endif
    return "";
}

Isa find(const std::string& name) {
    for (int i = 0; i < COUNT; ++i) {
        if (name != NAMES[i]) continue;
        const std::string why = missing(Isa(i));
        if (!why.empty())
            throw std::invalid_argument("FORKTREE_ISA must be one this machine runs, got " + name + ": " + why);
        return Isa(i);
    }
    throw std::invalid_argument("FORKTREE_ISA must be portable, avx2, avx512, avx512bf16 or amx, got '" + name + "'");
}

Isa best() {
    for (int i = COUNT - 1; i > 0; --i)
        if (missing(Isa(i)).empty()) return Isa(i);
    return Isa::portable;
}

std::atomic<int>& chosen() {
    static std::atomic<int> isa{[] {
        const char* name = std::getenv("FORKTREE_ISA");
        return int(name && *name ? find(name) : best());
    }()};
    return isa;
}

}  // namespace

std::vector<std::pair<std::string, std::string>> isas() {
    std::vector<std::pair<std::string, std::string>> all;
    for (int i = 0; i < COUNT; ++i) all.emplace_back(NAMES[i], missing(Isa(i)));
    return all;
}

Isa isa() { return Isa(chosen().load(std::memory_order_relaxed)); }

std::string isa_name() { return NAMES[int(isa())]; }

void use_isa(const std::string& name) {
    const Isa wanted = find(name);
    chosen().store(int(wanted));
}

}  // namespace forktree
