// Divides units of work into ranges that are each worth a thread.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.hpp"

namespace forktree {

struct Ranges {
    static constexpr int64_t GRAIN = 1 << 16;  // bytes of memory traffic: a few microseconds, as waking a thread takes

    int64_t units, per_task, tasks;

    // bytes: memory traffic of all units together.
    Ranges(int64_t units, int64_t bytes) : units(units) {
        const int64_t most = std::max<int64_t>(1, std::min(units, bytes / GRAIN));
        per_task = (units + most - 1) / most;
        tasks = per_task ? (units + per_task - 1) / per_task : 0;
    }

    // range: void(int64_t task, int64_t begin, int64_t end). Must not throw.
    template <class Range>
    void run(int threads, const Range& range) const {
        parallel(tasks, threads,
                 [&](int64_t task) { range(task, task * per_task, std::min(units, (task + 1) * per_task)); });
    }
};

}  // namespace forktree
