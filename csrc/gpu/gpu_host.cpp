#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gpu/gpu.cuh"

#if !(defined(__x86_64__) && defined(__linux__))
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define FORKTREE_SANITIZED(statement) statement
#else
#define FORKTREE_SANITIZED(statement)
#endif

#if defined(__x86_64__) && defined(__linux__)
// swapcontext would save the signal mask, two system calls a switch; this switch saves only what a call must preserve.
extern "C" __attribute__((visibility("hidden"))) void forktree_switch(void** from, void* to);
__asm__(
    ".text\n"
    ".globl forktree_switch\n"
    ".hidden forktree_switch\n"
    ".type forktree_switch, @function\n"
    "forktree_switch:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp, (%rdi)\n"
    "mov %rsi, %rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\n"
    "ret\n"
    ".size forktree_switch, . - forktree_switch\n");
#endif

namespace forktree::gpu::host {

thread_local Place place;

namespace {

constexpr int MAX_THREADS = 1024, MAX_SHARED = 227 * 1024;  // of a block, on sm_90

// ---------------------------------------------------------------------- switching stacks

#if defined(__x86_64__) && defined(__linux__)

struct Context {
    void* top;

    void begin(char* stack, size_t size, void (*entry)()) {
        void** at = reinterpret_cast<void**>(stack + size);
        *--at = nullptr;  // return address of entry; leaves rsp as it is after a call
        *--at = reinterpret_cast<void*>(entry);
        for (int i = 0; i < 6; ++i) *--at = nullptr;
        top = at;
    }
    void leave_for(Context& other) { forktree_switch(&top, other.top); }
};

#else

struct Context {
    ucontext_t state;

    void begin(char* stack, size_t size, void (*entry)()) {
        getcontext(&state);
        state.uc_stack.ss_sp = stack;
        state.uc_stack.ss_size = size;
        state.uc_link = nullptr;
        makecontext(&state, entry, 0);
    }
    void leave_for(Context& other) { swapcontext(&state, &other.state); }
};

#endif

// Stacks of the fibers, each above a protected page.
class Stacks {
public:
    static constexpr size_t SIZE = 128 * 1024;

    Stacks() : page(size_t(sysconf(_SC_PAGESIZE))) {
        void* memory = mmap(nullptr, MAX_THREADS * (page + SIZE), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        base = static_cast<char*>(memory);
        for (int i = 0; i < MAX_THREADS; ++i) mprotect(base + i * (page + SIZE), page, PROT_NONE);
    }
    ~Stacks() { munmap(base, MAX_THREADS * (page + SIZE)); }

    char* operator[](int i) const { return base + i * (page + SIZE) + page; }

private:
    size_t page;
    char* base;
};

// ---------------------------------------------------------------------- one block

struct Copy {
    char* to;
    Chunk bytes;
};

struct Fiber {
    Context context;
    void* fake_stack = nullptr;  // AddressSanitizer's
    const char* waits = nullptr;
    int line = 0;
    bool returned = false;
    std::vector<Copy> issued;
    std::deque<std::vector<Copy>> groups;
};

struct Warp {
    const char* what = nullptr;
    int line = 0, arrived = 0, syncs = 0;
    void* operand[WARP];
};

// 16 bytes of shared memory.
struct Cell {
    bool in_flight = false;
    int writer = -1, written = 0, written_warp = 0;  // thread whose copy filled it, and barriers passed until then
    int reader = -1, read = 0;  // warp that read it by load_matrix, SEVERAL if more; barriers passed
    static constexpr int SEVERAL = -2;
};

class Block {
public:
    Block(int threads, int shared_bytes, const std::function<void()>& kernel, std::minstd_rand& random)
        : kernel(kernel),
          random(random),
          shared_bytes(shared_bytes),
          fibers(size_t(threads)),
          warps(size_t(threads / WARP)),
          cells(size_t(shared_bytes + 15) / 16) {
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, size_t(shared_bytes))) throw std::bad_alloc();
        shared.reset(static_cast<char*>(memory));
        if (shared_bytes) std::memset(memory, 0xff, size_t(shared_bytes));
    }
    ~Block() { FORKTREE_SANITIZED(__asan_unpoison_memory_region(shared.get(), size_t(shared_bytes))); }

    void run(const Stacks& stacks);
    void enter();
    void sync_block(int line);
    void sync_warp(int line);
    bool collective(const char* what, int line, void* operand, void (*act)(void* const*));
    void copy16(void* to, const void* from, bool valid, int line);
    void commit();
    void wait(int groups);
    void check16(const void* address, const char* what, int line) const;
    void check_read(const void* row, int line);

    char* memory() const { return shared.get(); }

private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };

    Fiber& fiber() { return fibers[size_t(place.thread)]; }
    Cell* cell(const void* address) {
        const ptrdiff_t at = static_cast<const char*>(address) - shared.get();
        return at < 0 || at >= shared_bytes ? nullptr : &cells[size_t(at / 16)];
    }
    void resume(int thread);
    void yield(const char* what, int line);
    void wake(int begin, int end);
    void land(const std::vector<Copy>& group);
    [[noreturn]] void fail(int line, const std::string& what) const;
    [[noreturn]] void deadlock() const;

    const std::function<void()>& kernel;
    std::minstd_rand& random;
    std::unique_ptr<char, Free> shared;
    int shared_bytes;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<Cell> cells;
    std::vector<int> ready;
    Context scheduler;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
    const Stacks* stacks = nullptr;
    std::exception_ptr error;
    int arrived = 0, syncs = 0;
};

thread_local Block* running;

void Block::run(const Stacks& all_stacks) {
    stacks = &all_stacks;
    const int threads = int(fibers.size());
    for (int t = 0; t < threads; ++t) {
        FORKTREE_SANITIZED(__asan_unpoison_memory_region(all_stacks[t], Stacks::SIZE));  // left by an earlier fiber
        fibers[size_t(t)].context.begin(all_stacks[t], Stacks::SIZE, [] { running->enter(); });
        ready.push_back(t);
    }
    while (!ready.empty() && !error) {
        std::swap(ready[random() % ready.size()], ready.back());
        const int thread = ready.back();
        ready.pop_back();
        resume(thread);
    }
    if (error) std::rethrow_exception(error);
    for (const Fiber& f : fibers)
        if (!f.returned) deadlock();
}

void Block::resume(int thread) {
    place.thread = thread;
    FORKTREE_SANITIZED(void* fake_stack; __sanitizer_start_switch_fiber(&fake_stack, (*stacks)[thread], Stacks::SIZE));
    scheduler.leave_for(fiber().context);
    FORKTREE_SANITIZED(__sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr));
}

void Block::enter() {
    FORKTREE_SANITIZED(__sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size));
    try {
        kernel();
        if (!fiber().issued.empty() || !fiber().groups.empty()) fail(0, "returned with copies on their way");
    } catch (...) {
        error = std::current_exception();
    }
    fiber().returned = true;
    FORKTREE_SANITIZED(__sanitizer_start_switch_fiber(nullptr, scheduler_stack, scheduler_stack_size));
    fiber().context.leave_for(scheduler);
}

void Block::yield(const char* what, int line) {
    Fiber& f = fiber();
    f.waits = what;
    f.line = line;
    FORKTREE_SANITIZED(__sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack, scheduler_stack_size));
    f.context.leave_for(scheduler);
    FORKTREE_SANITIZED(__sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr));
}

// All fibers but the running one.
void Block::wake(int begin, int end) {
    for (int t = begin; t < end; ++t)
        if (t != place.thread) ready.push_back(t);
}

void Block::fail(int line, const std::string& what) const {
    throw std::runtime_error("emulated CUDA, block " + std::to_string(place.block) + ", thread " +
                             std::to_string(place.thread) + (line ? ", line " + std::to_string(line) : "") + ": " +
                             what);
}

void Block::deadlock() const {
    const auto state = [](const Fiber& f) {
        return f.returned ? std::string("returned") : f.waits + (" at line " + std::to_string(f.line));
    };
    std::string text;
    for (size_t t = 0, end; t < fibers.size(); t = end) {
        for (end = t + 1; end < fibers.size() && state(fibers[end]) == state(fibers[t]);) ++end;
        text += (t ? "; " : "") + std::to_string(t) + "-" + std::to_string(end - 1) + ": " + state(fibers[t]);
    }
    throw std::runtime_error("emulated CUDA, block " + std::to_string(place.block) + ": deadlock, threads " + text);
}

void Block::sync_block(int line) {
    if (++arrived < int(fibers.size())) return yield("sync_block", line);
    arrived = 0;
    ++syncs;
    wake(0, int(fibers.size()));
}

void Block::sync_warp(int line) {
    if (collective("sync_warp", line, nullptr, [](void* const*) {})) ++warps[size_t(place.thread / WARP)].syncs;
}

// The last lane to arrive acts for all and gets true.
bool Block::collective(const char* what, int line, void* operand, void (*act)(void* const*)) {
    Warp& warp = warps[size_t(place.thread / WARP)];
    if (warp.arrived && (warp.what != what || warp.line != line))
        fail(line, std::string(what) + ", while other lanes of the warp wait for it in " + warp.what + " at line " +
                       std::to_string(warp.line));
    warp.what = what;
    warp.line = line;
    warp.operand[place.thread % WARP] = operand;
    if (++warp.arrived < WARP) {
        yield(what, line);
        return false;
    }
    warp.arrived = 0;
    act(warp.operand);
    const int first = place.thread / WARP * WARP;
    wake(first, first + WARP);
    return true;
}

// ---------------------------------------------------------------------- shared memory

void Block::check16(const void* address, const char* what, int line) const {
    if (reinterpret_cast<uintptr_t>(address) % 16)
        fail(line, std::string(what) + " of an address that is not a multiple of 16");
    const ptrdiff_t at = static_cast<const char*>(address) - shared.get();
    if (at >= 0 && at < shared_bytes && cells[size_t(at / 16)].in_flight)
        fail(line, std::string(what) + " of shared memory that a copy is on its way to");
}

void Block::copy16(void* to, const void* from, bool valid, int line) {
    check16(to, "copy16", line);
    check16(from, "copy16", line);
    char* shared_to = static_cast<char*>(to);
    if (shared_to < shared.get() || shared_to + 16 > shared.get() + shared_bytes)
        fail(line, "copy16 to byte " + std::to_string(shared_to - shared.get()) + " of " +
                       std::to_string(shared_bytes) + " of shared memory");
    Cell& c = *cell(to);
    if (c.read == syncs && c.reader != -1 && c.reader != place.thread / WARP)
        fail(line, "copy16 to shared memory that another warp has read since the last barrier");
    Copy copy{shared_to, {}};
    if (valid) std::memcpy(&copy.bytes, from, 16);
    std::memset(to, 0xff, 16);
    c.in_flight = true;
    FORKTREE_SANITIZED(__asan_poison_memory_region(to, 16));
    fiber().issued.push_back(copy);
}

void Block::commit() { fiber().groups.push_back(std::exchange(fiber().issued, {})); }

void Block::wait(int groups) {
    for (auto& waiting = fiber().groups; int(waiting.size()) > groups; waiting.pop_front()) land(waiting.front());
}

void Block::land(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        FORKTREE_SANITIZED(__asan_unpoison_memory_region(copy.to, 16));
        std::memcpy(copy.to, &copy.bytes, 16);
        Cell& c = *cell(copy.to);
        c.in_flight = false;
        c.writer = place.thread;
        c.written = syncs;
        c.written_warp = warps[size_t(place.thread / WARP)].syncs;
    }
}

// Checks that this thread may read 16 bytes: they have arrived, and a barrier followed the wait of the copying thread.
void Block::check_read(const void* row, int line) {
    check16(row, "load_matrix", line);
    Cell* c = cell(row);
    if (!c) fail(line, "load_matrix of an address outside of shared memory");
    const int warp = place.thread / WARP;
    const bool handed_over =
        c->written < syncs || (c->writer / WARP == warp && c->written_warp < warps[size_t(warp)].syncs);
    if (c->writer >= 0 && c->writer != place.thread && !handed_over)
        fail(line, "load_matrix of what thread " + std::to_string(c->writer) + " has copied, with no barrier since");
    c->reader = c->reader == -1 || c->reader == warp || c->read < syncs ? warp : Cell::SEVERAL;
    c->read = syncs;
}

// ---------------------------------------------------------------------- collectives

struct Shuffle {
    uint32_t x;
    int source;
    uint32_t result;
};

struct Matrix {
    const char* row;
    uint32_t (&r)[4];
    bool transposed;
};

struct Product {
    float (&d)[4];
    const uint32_t (&a)[4];
    uint32_t b0, b1;
    Dtype dtype;
};

template <class Operand>
Operand& of_lane(void* const* operand, int lane) {
    return *static_cast<Operand*>(operand[lane]);
}

void load_all(void* const* operand) {
    for (int lane = 0; lane < WARP; ++lane) {
        auto& to = of_lane<Matrix>(operand, lane);
        for (int m = 0; m < 4; ++m) {
            uint16_t pair[2];
            for (int i = 0; i < 2; ++i) {
                const int along = lane % 4 * 2 + i, across = lane / 4;
                const int row = to.transposed ? along : across, column = to.transposed ? across : along;
                std::memcpy(&pair[i], of_lane<Matrix>(operand, m * 8 + row).row + column * 2, 2);
            }
            to.r[m] = pair[0] | uint32_t(pair[1]) << 16;
        }
    }
}

template <class T>
void multiply(void* const* operand) {
    float a[16][16], b[16][8], d[16][8];
    const auto half = [](uint32_t x, int i) { return to_float(T{uint16_t(i ? x >> 16 : x)}); };
    for (int lane = 0; lane < WARP; ++lane) {
        const auto& from = of_lane<Product>(operand, lane);
        const int row = lane / 4, column = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            for (int j = 0; j < 4; ++j) a[row + j % 2 * 8][column + j / 2 * 8 + i] = half(from.a[j], i);
            b[column + i][row] = half(from.b0, i);
            b[column + 8 + i][row] = half(from.b1, i);
            for (int j = 0; j < 2; ++j) d[row + j * 8][column + i] = from.d[j * 2 + i];
        }
    }
    for (int m = 0; m < 16; ++m)
        for (int k = 0; k < 16; ++k)
            for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
    for (int lane = 0; lane < WARP; ++lane)
        for (int j = 0; j < 4; ++j)
            of_lane<Product>(operand, lane).d[j] = d[lane / 4 + j / 2 * 8][lane % 4 * 2 + j % 2];
}

void multiply_all(void* const* operand) {
    if (of_lane<Product>(operand, 0).dtype == Dtype::bf16) multiply<Bf16>(operand);
    else multiply<Fp16>(operand);
}

}  // namespace

void run(int64_t blocks, int threads, int shared_bytes, const std::function<void()>& kernel) {
    if (threads < WARP || threads > MAX_THREADS || threads % WARP)
        throw std::runtime_error("emulated CUDA: threads must be a multiple of 32 up to 1024, got " +
                                 std::to_string(threads));
    if (blocks < 0 || blocks > INT32_MAX)
        throw std::runtime_error("emulated CUDA: blocks must be in [0, 2^31), got " + std::to_string(blocks));
    if (shared_bytes < 0 || shared_bytes > MAX_SHARED)
        throw std::runtime_error("emulated CUDA: shared memory must be at most " + std::to_string(MAX_SHARED) +
                                 " bytes, got " + std::to_string(shared_bytes));
    static thread_local std::minstd_rand random(1);
    static thread_local const Stacks stacks;
    std::vector<int> order(size_t(blocks), 0);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (const int b : order) {
        Block block(threads, shared_bytes, kernel, random);
        place = {0, threads, b, int(blocks), block.memory()};
        running = &block;
        block.run(stacks);
    }
}

void sync_block(int line) { running->sync_block(line); }
void sync_warp(int line) { running->sync_warp(line); }

uint32_t shuffle(uint32_t x, int source, int line) {
    Shuffle operand{x, source & (WARP - 1), 0};
    running->collective("shuffle", line, &operand, [](void* const* all) {
        for (int lane = 0; lane < WARP; ++lane) {
            auto& to = of_lane<Shuffle>(all, lane);
            to.result = of_lane<Shuffle>(all, to.source).x;
        }
    });
    return operand.result;
}

uint32_t ballot(bool condition, int line) {
    Shuffle operand{condition, 0, 0};
    running->collective("ballot", line, &operand, [](void* const* all) {
        uint32_t bits = 0;
        for (int lane = 0; lane < WARP; ++lane) bits |= of_lane<Shuffle>(all, lane).x << lane;
        for (int lane = 0; lane < WARP; ++lane) of_lane<Shuffle>(all, lane).result = bits;
    });
    return operand.result;
}

void load_matrix(uint32_t (&r)[4], const void* row, bool transposed, int line) {
    running->check_read(row, line);
    Matrix operand{static_cast<const char*>(row), r, transposed};
    running->collective(transposed ? "load_matrix_transposed" : "load_matrix", line, &operand, load_all);
}

void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Dtype dtype, int line) {
    Product operand{d, a, b0, b1, dtype};
    running->collective("mma", line, &operand, multiply_all);
}

void copy16(void* shared, const void* global, bool valid, int line) { running->copy16(shared, global, valid, line); }
void commit() { running->commit(); }
void wait(int groups) { running->wait(groups); }
void check16(const void* address, const char* what, int line) { running->check16(address, what, line); }

}  // namespace forktree::gpu::host
