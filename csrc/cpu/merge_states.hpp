// Merges attention states (o, lse) over disjoint tokens, weighted by exp(lse).
#pragma once

#include "params.h"

namespace forktree {

// The empty state is (0, -inf); merging nothing else gives it again. Throws std::invalid_argument before anything is
// written if indptr does not rise from 0 to the size of index, or an index is not in [0, states).
void merge_states(const MergeStatesParams& params, int threads);

namespace cuda {

// The same on the current device, in order with what else `stream` does. Lists are not checked, as that would wait for
// the device: what they name beyond index or the states is passed over. Throws std::runtime_error if the device does
// not take it.
void merge_states(const MergeStatesParams& params, void* stream);

}  // namespace cuda
}  // namespace forktree
