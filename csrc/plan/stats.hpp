// What a plan does and costs under the cost model.
#pragma once

#include <cstdint>

#include "plan/cost_model.hpp"
#include "plan/format.h"

namespace forktree {

// Times in picoseconds, for all KV heads.
struct PlanStats {
    int64_t distinct;      // tokens read by any item
    int64_t planned;       // tokens read, again and again if by several items
    int64_t attended;      // (row, token) pairs that count
    int64_t computed;      // (row, token) pairs segments span
    int64_t padded;        // (packed row, token) pairs, those included that only fill up lanes
    int64_t predicted;     // time of the plan
    int64_t sum, longest;  // of all items; of the longest unit of work
};

PlanStats stats(const PlanView& plan, const CostModel& cost_model);

}  // namespace forktree
