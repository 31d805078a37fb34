// Index arrays as they come from Python: int32 or int64, contiguous.
#pragma once

#include <cstdint>

#include "common/numeric.hpp"

namespace forktree {

struct Indices {
    const void* data;
    bool wide;  // int64
    int64_t size;

    FORKTREE_INLINE int64_t operator[](int64_t i) const {
        return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
};

}  // namespace forktree
