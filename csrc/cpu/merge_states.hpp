// Merges attention states (o, lse) over disjoint tokens, weighted by exp(lse).
#pragma once

#include "params.h"

namespace forktree {

// The empty state is (0, -inf), which is also the result of merging nothing or only empty states. Throws
// std::invalid_argument before anything is written if indptr does not rise from 0 to the size of index, or an index is
// not in [0, states).
void merge_states(const MergeStatesParams& params, int threads);

namespace cuda {

// The same on the current device, in stream order. Lists are not checked, as that would wait for the device; entries
// beyond index or the states are skipped. Throws std::runtime_error if the launch fails.
void merge_states(const MergeStatesParams& params, void* stream);

}  // namespace cuda
}  // namespace forktree
