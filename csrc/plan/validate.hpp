// What makes a plan safe to read. Both throw std::invalid_argument, naming what is wrong.
#pragma once

#include <cstdint>

#include "plan/format.h"

namespace forktree {

// Checks the header, in constant time: magic, sizes, heads, and that all sections lie within the buffer. What follows
// the plan is capacity for a larger one.
PlanView open_plan(const int32_t* buffer, int64_t size);

// Checks everything a kernel reads: it stays within the sections, whatever they hold. Returns how many entries of
// slot_index the plan may read.
int64_t validate(const PlanView& plan);

}  // namespace forktree
