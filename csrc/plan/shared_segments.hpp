// A layout in depth-first order: which rows read which run of tokens together.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/format.h"

namespace forktree {

// forktree.plan.layout.TreeLayout, validated there.
struct Layout {
    int64_t nodes, rows, tokens, contexts, mask_words;
    const int32_t *slot_index, *node_begin, *node_len, *node_parent, *node_fork, *node_pos;
    const int32_t *row_indptr, *path_indptr, *path_node, *path_stop, *path_top, *causal, *row_token, *row_pos;
    const int32_t* mask_indptr;  // null: no context has a mask
    const uint32_t* mask_bits;
};

// Plan rows [lo, hi) see the tokens [start, stop) of a node.
struct SharedSegment {
    int32_t node, start, stop, lo, hi;
    bool partially_visible;  // its rows may see different parts of it
};

struct SharedSegments {
    std::vector<Row> row;                // of each plan row
    std::vector<int32_t> context_begin;  // first plan row of each plan row's context
    std::vector<SharedSegment> segment;  // in path order: whatever a row sees comes top first
    std::vector<int32_t> tree_end;       // segments of each root tree end here; joins make several trees one
};

// Throws std::invalid_argument if paths of a join share tokens.
SharedSegments shared_segments(const Layout& layout);

}  // namespace forktree
