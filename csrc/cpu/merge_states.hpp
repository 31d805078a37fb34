// Merges attention states (o, lse) over disjoint tokens, weighted by exp(lse).
#pragma once

#include <cstdint>

#include "common/indices.hpp"

namespace forktree {

// o [P, heads, dim] and lse [P, heads], natural log, -> out [T, heads, dim] and total [T, heads], all contiguous.
// Output t merges o[index[i]] for i in [indptr[t], indptr[t + 1]), in this order; T + 1 entries in indptr. The empty
// state is (0, -inf); merging nothing else gives it again. Throws std::invalid_argument before anything is written if
// indptr does not rise from 0 to the size of index, or an index is not in [0, P).
void merge_states(int dtype, const void* o, const float* lse, int64_t states, int64_t heads, int64_t dim,
                  Indices indptr, Indices index, void* out, float* total, int threads);

namespace cuda {

// The same on the current device, in order with what else `stream` does. Lists are not checked, as that would wait for
// the device: what they name beyond index or P is passed over. Throws std::runtime_error if the device does not take
// it.
void merge_states(int dtype, const void* o, const float* lse, int64_t states, int64_t heads, int64_t dim,
                  Indices indptr, Indices index, void* out, float* total, void* stream);

}  // namespace cuda
}  // namespace forktree
