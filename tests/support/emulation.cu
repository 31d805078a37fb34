// What tests/test_emulation.py runs: `emulation CASE` launches one kernel on the emulated machine and compares with
// plain loops. A refused launch prints the error and exits with 1, a wrong result with 2.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu/gpu.cuh"

using namespace forktree;

namespace {

constexpr int LANES = 32;

struct Wrong : std::exception {};

void expect(bool condition) {
    if (!condition) throw Wrong();
}

template <class T>
std::vector<T> numbers(size_t count) {
    std::vector<T> x(count);
    for (size_t i = 0; i < count; ++i) x[i] = from_float<T>(float(int(i * 37 % 101) - 50) / 8);
    return x;
}

// ---------------------------------------------------------------------- what the intrinsics give

// The first `valid` pieces of 16 bytes of every tile of threads() pieces, through a ring of two.
FORKTREE_KERNEL void copy_tiles(const char* from, char* to, int tiles, int valid) {
    char* ring = gpu::shared_memory();
    const int piece = 16 * gpu::thread(), size = 16 * gpu::threads();
    const auto issue = [&](int tile) {
        if (tile < tiles)
            gpu::copy16(ring + tile % 2 * size + piece, from + tile * size + piece, gpu::thread() < valid);
        gpu::commit();
    };
    issue(0);
    for (int tile = 0; tile < tiles; ++tile) {
        issue(tile + 1);
        gpu::wait<1>();
        gpu::sync_block();
        const int other = size - 16 - piece;  // what another thread has copied
        std::memcpy(to + tile * size + other, ring + tile % 2 * size + other, 16);
        gpu::sync_block();
    }
    gpu::wait<0>();
}

void copies() {
    const int threads = 96, tiles = 5, valid = 70, size = 16 * threads;
    std::vector<char> from(tiles * size), to(tiles * size, 9);
    for (size_t i = 0; i < from.size(); ++i) from[i] = char(i * 7 + 1);
    // An invalid piece is not read: it may lie anywhere.
    from.resize(from.size() - 16 * (threads - valid));
    from.shrink_to_fit();
    gpu::launch(copy_tiles, 1, threads, 2 * size, nullptr, from.data(), to.data(), tiles, valid);
    for (int i = 0; i < tiles * size; ++i) expect(to[i] == (i % size < 16 * valid ? from[i] : 0));
}

FORKTREE_KERNEL void matrices(const uint16_t* from, uint32_t* plain, uint32_t* transposed) {
    char* tile = gpu::shared_memory();
    gpu::copy16(tile + 16 * gpu::lane(), from + 8 * gpu::lane(), true);
    gpu::commit();
    gpu::wait<0>();
    gpu::sync_warp();
    uint32_t r[4];
    gpu::load_matrix(r, tile + 16 * gpu::lane());
    for (int m = 0; m < 4; ++m) plain[4 * gpu::lane() + m] = r[m];
    gpu::load_matrix_transposed(r, tile + 16 * gpu::lane());
    for (int m = 0; m < 4; ++m) transposed[4 * gpu::lane() + m] = r[m];
}

void matrix_loads() {
    std::vector<uint16_t> from(4 * 64);
    for (size_t i = 0; i < from.size(); ++i) from[i] = uint16_t(i);
    std::vector<uint32_t> plain(4 * LANES), transposed(4 * LANES);
    gpu::launch(matrices, 1, LANES, 512, nullptr, from.data(), plain.data(), transposed.data());
    for (int m = 0; m < 4; ++m)
        for (int row = 0; row < 8; ++row)
            for (int column = 0; column < 8; ++column) {
                const auto half = [&](const std::vector<uint32_t>& x, int r, int c) {
                    return x[4 * (4 * r + c / 2) + m] >> 16 * (c % 2) & 0xffff;
                };
                expect(half(plain, row, column) == from[64 * m + 8 * row + column]);
                expect(half(transposed, column, row) == from[64 * m + 8 * row + column]);
            }
}

// a [16, 16] by load_matrix, b [16, 8] by load_matrix_transposed, d [16, 8]; all row after row.
template <class T>
FORKTREE_KERNEL void multiply(const T* a, const T* b, float* d) {
    char* shared = gpu::shared_memory();
    const int lane = gpu::lane(), row = lane % 8, matrix = lane / 8;
    gpu::copy16(shared + 16 * lane, a + 8 * lane, true);
    gpu::copy16(shared + 512 + 16 * (lane % 16) + 256 * (lane / 16), b + 8 * (lane % 16), true);
    gpu::commit();
    gpu::wait<0>();
    gpu::sync_warp();
    uint32_t x[4], y[4];
    gpu::load_matrix(x, shared + 32 * (row + 8 * (matrix % 2)) + 16 * (matrix / 2));
    gpu::load_matrix_transposed(y, shared + 512 + 16 * (lane % 16));
    float sum[4];
    float* own[4] = {d + 8 * (lane / 4) + 2 * (lane % 4), own[0] + 1, own[0] + 64, own[0] + 65};
    for (int i = 0; i < 4; ++i) sum[i] = *own[i];
    gpu::mma(sum, x, y[0], y[1], T{});
    for (int i = 0; i < 4; ++i) *own[i] = sum[i];
}

template <class T>
void products() {
    const auto a = numbers<T>(16 * 16), b = numbers<T>(16 * 8);
    std::vector<float> d(16 * 8), expected(16 * 8);
    for (int i = 0; i < 128; ++i) {
        d[i] = float(i);
        double sum = i;
        for (int k = 0; k < 16; ++k) sum += double(to_float(a[i / 8 * 16 + k])) * to_float(b[k * 8 + i % 8]);
        expected[i] = float(sum);
    }
    gpu::launch(multiply<T>, 1, LANES, 1024, nullptr, a.data(), b.data(), d.data());
    expect(d == expected);
}

FORKTREE_KERNEL void exchange(int* of, float* from_other, uint32_t* votes) {
    const int thread = gpu::thread();
    of[thread] = gpu::shuffle(thread, (gpu::lane() + 5) % 32);
    from_other[thread] = gpu::shuffle_xor(float(thread) / 2, 6);
    votes[thread] = gpu::ballot(thread % 3 == 0);
}

void exchanges() {
    const int threads = 64;
    std::vector<int> of(threads);
    std::vector<float> from_other(threads);
    std::vector<uint32_t> votes(threads);
    gpu::launch(exchange, 1, threads, 0, nullptr, of.data(), from_other.data(), votes.data());
    for (int t = 0; t < threads; ++t) {
        const int first = t / 32 * 32;
        uint32_t vote = 0;
        for (int lane = 0; lane < 32; ++lane) vote |= uint32_t((first + lane) % 3 == 0) << lane;
        expect(of[t] == first + (t % 32 + 5) % 32 && from_other[t] == float(t ^ 6) / 2 && votes[t] == vote);
    }
}

// Every block leaves its number; the last one to come adds them up, and starts the counter anew.
FORKTREE_KERNEL void last_arriver(int* left, int* counter, int* sum, int* order) {
    if (gpu::thread()) return;
    left[gpu::block()] = gpu::block() + 1;
    gpu::fence();
    const int before = gpu::atomic_add(counter, 1);
    order[before] = gpu::block();
    if (before != gpu::blocks() - 1) return;
    for (int b = 0; b < gpu::blocks(); ++b) *sum += gpu::load_cg(left + b);
    *counter = 0;
}

void arrivals() {
    const int blocks = 50;
    std::vector<int> left(blocks), order(blocks, -1);
    int counter = 0, sum = 0;
    gpu::launch(last_arriver, blocks, LANES, 0, nullptr, left.data(), &counter, &sum, order.data());
    expect(counter == 0 && sum == blocks * (blocks + 1) / 2);
    expect(!std::is_sorted(order.begin(), order.end()));  // blocks come in any order
    std::sort(order.begin(), order.end());
    for (int b = 0; b < blocks; ++b) expect(order[b] == b);
}

FORKTREE_KERNEL void arrive(int* counter, int* order) {
    order[gpu::atomic_add(counter, 1)] = gpu::thread();
    gpu::sync_block();
    order[gpu::atomic_add(counter, 1)] = gpu::thread();
}

void thread_order() {
    const int threads = 64;
    std::vector<int> order(2 * threads);
    int counter = 0;
    gpu::launch(arrive, 1, threads, 0, nullptr, &counter, order.data());
    for (const auto begin : {order.begin(), order.begin() + threads}) {
        expect(!std::is_sorted(begin, begin + threads));
        std::sort(begin, begin + threads);
        for (int t = 0; t < threads; ++t) expect(begin[t] == t);
    }
}

FORKTREE_KERNEL void functions(const float* x, float* y, uint32_t* packed, gpu::Chunk* moved) {
    const int t = gpu::thread();
    y[4 * t] = gpu::exp2(x[t]);
    y[4 * t + 1] = gpu::log2(x[t] * x[t]);
    y[4 * t + 2] = gpu::reciprocal(x[t]);
    y[4 * t + 3] = gpu::tanh(x[t]);
    packed[2 * t] = gpu::pack(x[t], -x[t], Bf16{});
    packed[2 * t + 1] = gpu::pack(x[t], -x[t], Fp16{});
    gpu::store16(moved + t, gpu::load16(x + t / 4 * 4));
}

void arithmetic() {
    const int threads = 64;
    std::vector<float> x(threads), y(4 * threads);
    std::vector<uint32_t> packed(2 * threads);
    std::vector<gpu::Chunk> moved(threads);
    for (int t = 0; t < threads; ++t) x[t] = float(t - 31.7) / 3;
    gpu::launch(functions, 1, threads, 0, nullptr, x.data(), y.data(), packed.data(), moved.data());
    const auto near = [](double got, double wanted) {
        return std::abs(got - wanted) <= 3e-7 * std::max(1.0, std::abs(wanted));
    };
    for (int t = 0; t < threads; ++t) {
        const double z = x[t];
        expect(near(y[4 * t], std::exp2(z)) && near(y[4 * t + 1], std::log2(z * z)));
        expect(near(y[4 * t + 2], 1 / z) && near(y[4 * t + 3], std::tanh(z)));
        expect(packed[2 * t] == (from_float<Bf16>(x[t]).bits | uint32_t(from_float<Bf16>(-x[t]).bits) << 16));
        expect(packed[2 * t + 1] == (from_float<Fp16>(x[t]).bits | uint32_t(from_float<Fp16>(-x[t]).bits) << 16));
        expect(!std::memcmp(&moved[t], &x[t / 4 * 4], 16));
    }
}

// ---------------------------------------------------------------------- what is refused

alignas(16) char memory[1 << 16];

char* shared() { return gpu::shared_memory(); }

// Copies 16 bytes a thread, and takes what follows.
template <class Then>
void after_copy(const Then& then, bool waits = true) {
    gpu::copy16(shared() + 16 * gpu::thread(), memory + 16 * gpu::thread(), true);
    gpu::commit();
    if (waits) gpu::wait<0>();
    then();
    gpu::wait<0>();
}

void load(int row) {
    uint32_t r[4];
    gpu::load_matrix(r, shared() + 16 * row);
}

FORKTREE_KERNEL void no_wait() {
    after_copy([] { load(gpu::thread()); }, false);
}
FORKTREE_KERNEL void no_wait_plain(volatile char* to) {
    after_copy([&] { to[gpu::thread()] = shared()[16 * gpu::thread()]; }, false);
}
FORKTREE_KERNEL void no_barrier() {
    after_copy([] { load(gpu::thread() ^ 32); });
}
FORKTREE_KERNEL void warp_barrier_only() {
    after_copy([] {
        gpu::sync_warp();
        load(gpu::thread() ^ 1);
        load(gpu::thread() ^ 32);
    });
}
FORKTREE_KERNEL void early_refill() {
    after_copy([] {
        gpu::sync_block();
        load(gpu::thread() ^ 32);
        gpu::copy16(shared() + 16 * gpu::thread(), memory, true);
        gpu::commit();
    });
}
FORKTREE_KERNEL void refill_in_flight() {
    after_copy([] { gpu::copy16(shared() + 16 * gpu::thread(), memory, true); }, false);
}
FORKTREE_KERNEL void left_on_its_way() {
    gpu::copy16(shared() + 16 * gpu::thread(), memory, true);
    gpu::commit();
}
FORKTREE_KERNEL void not_committed() {
    gpu::copy16(shared() + 16 * gpu::thread(), memory, true);
    gpu::wait<0>();
}
FORKTREE_KERNEL void copy_at(int to, int from) { gpu::copy16(shared() + to, memory + from, true); }
FORKTREE_KERNEL void load_at(int from) { gpu::load16(memory + from); }
FORKTREE_KERNEL void store_at(int to) { gpu::store16(memory + to, {}); }
FORKTREE_KERNEL void matrix_at(int at) {
    uint32_t r[4];
    gpu::load_matrix(r, shared() + at);
}
FORKTREE_KERNEL void matrix_of_global() {
    uint32_t r[4];
    gpu::load_matrix(r, memory);
}
FORKTREE_KERNEL void read_byte(volatile char* to, int at) { *to = shared()[at]; }
FORKTREE_KERNEL void two_collectives() {
    if (gpu::lane() < 7) gpu::ballot(true);
    else gpu::shuffle(1, 0);
}
FORKTREE_KERNEL void two_lines() {
    if (gpu::lane() < 7) gpu::shuffle(1, 0);
    else gpu::shuffle(1, 0);
}
FORKTREE_KERNEL void lanes_return() {
    if (gpu::thread() < 40) gpu::sync_warp();
}
FORKTREE_KERNEL void barrier_in_a_branch() {
    if (gpu::warp() == 1) gpu::sync_block();
    else gpu::ballot(true);
}
FORKTREE_KERNEL void fresh(float* to) { to[gpu::thread()] = reinterpret_cast<const float*>(shared())[gpu::thread()]; }
FORKTREE_KERNEL void nothing() {}

template <auto KERNEL, class... A>
std::function<void()> run(int threads, int shared_bytes, A... arguments) {
    return [=] { gpu::launch(KERNEL, 1, threads, shared_bytes, nullptr, arguments...); };
}

char sink[64];

const std::map<std::string, std::function<void()>> CASES{
    {"copies", copies},
    {"matrix_loads", matrix_loads},
    {"products_bf16", products<Bf16>},
    {"products_fp16", products<Fp16>},
    {"exchanges", exchanges},
    {"arrivals", arrivals},
    {"thread_order", thread_order},
    {"arithmetic", arithmetic},
    {"fresh_memory_is_nan",
     [] {
         std::vector<float> x(32);
         gpu::launch(fresh, 1, 32, 128, nullptr, x.data());
         for (const float y : x) expect(std::isnan(y));
     }},
    {"after_an_error",
     [] {
         for (int i = 0; i < 3; ++i) {
             try {
                 gpu::launch(no_wait, 1, 64, 1024, nullptr);
                 expect(false);
             } catch (const std::runtime_error&) {
             }
             copies();
         }
     }},
    {"no_blocks", [] { gpu::launch(no_wait, 0, 64, 1024, nullptr); }},
    {"no_wait", run<no_wait>(64, 1024)},
    {"no_wait_plain", run<no_wait_plain>(32, 512, sink)},
    {"no_barrier", run<no_barrier>(64, 1024)},
    {"warp_barrier_only", run<warp_barrier_only>(64, 1024)},
    {"early_refill", run<early_refill>(64, 1024)},
    {"refill_in_flight", run<refill_in_flight>(32, 512)},
    {"left_on_its_way", run<left_on_its_way>(32, 512)},
    {"not_committed", run<not_committed>(32, 512)},
    {"copy_to_odd", run<copy_at>(32, 512, 8, 0)},
    {"copy_from_odd", run<copy_at>(32, 512, 0, 4)},
    {"copy_behind", run<copy_at>(32, 520, 512, 0)},
    {"load_odd", run<load_at>(32, 0, 8)},
    {"store_odd", run<store_at>(32, 0, 8)},
    {"matrix_odd", run<matrix_at>(32, 512, 2)},
    {"matrix_of_global", run<matrix_of_global>(32, 512)},
    {"read_behind", run<read_byte>(32, 100, sink, 100)},
    {"two_collectives", run<two_collectives>(32, 0)},
    {"two_lines", run<two_lines>(32, 0)},
    {"lanes_return", run<lanes_return>(64, 0)},
    {"barrier_in_a_branch", run<barrier_in_a_branch>(64, 0)},
    {"odd_threads", run<nothing>(40, 0)},
    {"too_much_shared", run<nothing>(32, 228 * 1024)},
};

}  // namespace

int main(int, char** argv) {
    try {
        CASES.at(argv[1])();
    } catch (const Wrong&) {
        return 2;
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
