// The planner: cuts what rows read into items that keep all workers busy.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/cost_model.hpp"
#include "plan/format.h"
#include "plan/shared_segments.hpp"

namespace forktree {

struct PlanOptions {
    HeadShape heads;
    int64_t window;  // 0 = none
    CostModel cost_model;
    int64_t max_partials;
    bool invariant;  // every root tree is planned as if it were alone
};

// A buffer as in format.h. Throws std::invalid_argument if paths of a join share tokens, or if max_partials are too
// few.
std::vector<int32_t> plan(const Layout& layout, const PlanOptions& options);

}  // namespace forktree
