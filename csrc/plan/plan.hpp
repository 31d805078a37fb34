// The planner: cuts what rows read into items that keep all workers busy.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/plan_cost.hpp"
#include "plan/plan_view.hpp"
#include "plan/stretches.hpp"

namespace forktree {

struct PlanOptions {
    int64_t num_qo_heads, num_kv_heads, head_dim;
    int64_t window;  // 0 = none
    Target target;
    int64_t max_partials;
    bool invariant;
};

// The buffer of plan_view.hpp. Throws std::invalid_argument if paths of a join share tokens, or if max_partials are
// too few.
std::vector<int32_t> plan(const Layout& layout, const PlanOptions& options);

// What a plan does and costs under the model; times in picoseconds, for all KV heads.
struct PlanCounts {
    int64_t distinct;      // tokens read by any item
    int64_t planned;       // tokens read, again and again if by several items
    int64_t attended;      // (row, token) pairs that count
    int64_t computed;      // (row, token) pairs segments span
    int64_t padded;        // (packed row, token) pairs, those included that only fill up lanes
    int64_t predicted;     // time of the plan
    int64_t sum, longest;  // of all items; of the longest unit of work
};
PlanCounts count(const PlanView& plan, const Target& target);

}  // namespace forktree
