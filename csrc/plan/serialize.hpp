// Items as a buffer that executors read.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/work_items.hpp"

namespace forktree {

// A buffer as in format.h. Throws std::invalid_argument if the items leave more partials than the cap allows.
std::vector<int32_t> serialize(const WorkItems& work);

}  // namespace forktree
