// Runs tasks 0 .. tasks-1 on up to `threads` threads; each free thread takes the next task. With OpenMP these are the
// threads that PyTorch uses; without it (clang on a Mac, builds under ThreadSanitizer) they are created for the call.
#pragma once

#include <atomic>
#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif

namespace forktree {

// task: void(int64_t task, int worker) with worker < threads; a worker gets its tasks in ascending order. Must not
// throw.
template <class Task>
void parallel_workers(int64_t tasks, int threads, const Task& task) {
    if (threads > tasks) threads = int(tasks);
    if (threads <= 1) {
        for (int64_t i = 0; i < tasks; ++i) task(i, 0);
        return;
    }
    std::atomic<int64_t> next{0};
    const auto work = [&](int worker) {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, worker);
    };
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    work(omp_get_thread_num());
#else
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(work, i);
    } catch (const std::system_error&) {  // no more threads are available: the existing ones do all the work
    }
    work(0);
    for (std::thread& other : others) other.join();
#endif
}

// task: void(int64_t task).
template <class Task>
void parallel(int64_t tasks, int threads, const Task& task) {
    parallel_workers(tasks, threads, [&](int64_t i, int) { task(i); });
}

}  // namespace forktree
