// The plan as one int32 buffer: what plan.cpp writes and every kernel reads.
//
//   header [16]          see Header
//   item [W, 5]          row_begin, row_end, seg_begin, seg_end, first partial or -1 (writes the output itself)
//   seg [Q, 8]           index_begin, start, stop or LIVE, node, row_lo, row_hi, pos, contiguous
//   merge_indptr [T+1], merge_partial [P]   CSR: output token -> partials, in path order
//   clear [Z]            output tokens that no item writes and nothing is merged for, ascending
//   row [R, 6]           of each plan row: see Row
//   node_len [N]         tokens of each node now  } rewritten when nodes grow,
//   row_pos [R]          by layout row            } all else stays
//   mask [words]         draft masks, as in the layout
//
// Items, segments and partials number rows in plan order; `row` leads back to the layout.
#pragma once

#include <cstdint>

namespace forktree {

constexpr int32_t LIVE = INT32_MAX;  // stop of a segment that ends where its node does, also after growing

struct Header {
    static constexpr int32_t MAGIC = 0x464b5431;
    int32_t magic;
    int32_t size;                                                    // of the whole buffer, in int32
    int32_t rows, tokens, items, segs, nodes, partials, mask_words;  // R, T, W, Q, N, P
    int32_t num_qo_heads, num_kv_heads, head_dim;
    int32_t window;  // 0 = none
    int32_t clears;  // Z
    int32_t reserved[2];
};

struct Item {
    int32_t row_begin, row_end, seg_begin, seg_end, partial;
};

struct Seg {
    int32_t index_begin, start, stop, node, row_lo, row_hi, pos, contiguous;
};

struct Row {
    int32_t row;    // of the layout: its query is q[row], its position row_pos[row]
    int32_t token;  // output it belongs to
    int32_t tip;    // node whose tokens from offset `tail` on the rows of its context see differently, or -1
    int32_t tail;
    int32_t last;  // last offset of the tip this row sees: its own if causal, that of its last bit if masked, else LIVE
    int32_t mask;  // word of `mask` where the row's bits begin (bit j: may it see offset tail + j), or -1
};

// Typed pointers into a buffer. `plan_view` throws std::invalid_argument unless the buffer begins with a well-formed
// plan; what lies behind it is room for a larger one.
struct PlanView {
    const Header* header;
    const Item* item;
    const Seg* seg;
    const int32_t* merge_indptr;
    const int32_t* merge_partial;
    const int32_t* clear;
    const Row* row;
    const int32_t* node_len;
    const int32_t* row_pos;
    const uint32_t* mask;
    int64_t index_end;  // entries of slot_index the plan may read
};

PlanView plan_view(const int32_t* buffer, int64_t size);

}  // namespace forktree
