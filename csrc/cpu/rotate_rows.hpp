// Moves rotary-encoded rows by a position shift.
#pragma once

#include <cstdint>

#include "common/indices.hpp"

namespace forktree {

struct Rotation {
    const double* inv_freq;  // [pairs] radians per position
    int64_t pairs;           // the first 2 * pairs elements of a head rotate
    bool interleaved;        // pairs are (0, 1), (2, 3), ...; otherwise (0, pairs), (1, pairs + 1), ...
};

// q [R, heads, dim], strides in elements, contiguous in dim; shift [R]; out [R, heads, dim], contiguous, not q.
void rotate_rows(int dtype, const void* q, int64_t row_stride, int64_t head_stride, int64_t heads, int64_t dim,
                 Indices shift, const Rotation& rotation, void* out, int threads);

namespace cuda {

// The same on the current device, in order with what else `stream` does. Throws std::runtime_error if the device does
// not take it.
void rotate_rows(int dtype, const void* q, int64_t row_stride, int64_t head_stride, int64_t heads, int64_t dim,
                 Indices shift, const Rotation& rotation, void* out, void* stream);

}  // namespace cuda
}  // namespace forktree
