// Rotates rotary-encoded rows by a position shift.
#pragma once

#include "params.h"

namespace forktree {

// Throws std::invalid_argument, before anything is written, if the pairs do not fit a head.
void rotate_rows(const RotateRowsParams& params, int threads);

namespace cuda {

// The same on the current device, in stream order. Throws std::runtime_error if the launch fails.
void rotate_rows(const RotateRowsParams& params, void* stream);

}  // namespace cuda
}  // namespace forktree
