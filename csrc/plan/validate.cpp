#include "plan/validate.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace forktree {
namespace {

constexpr int64_t HEADER = sizeof(Header) / 4;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("plan must " + what); }

[[noreturn]] void refuse(const char* name, int64_t i, const char* expectation) {
    refuse("have " + std::string(name) + " " + std::to_string(i) + " " + expectation);
}

void check_header(const Header& h, int64_t size) {
    if (h.magic != Header::MAGIC)
        refuse("begin with " + std::to_string(Header::MAGIC) + ", got " + std::to_string(h.magic));
    for (int32_t value : {h.num_rows, h.num_tokens, h.num_items, h.num_segs, h.num_nodes, h.num_partials,
                          h.num_empty_tokens, h.num_mask_words, h.window})
        if (value < 0) refuse("have sizes and a window of at least 0, got " + std::to_string(value));
    for (int32_t value : {h.num_qo_heads, h.num_kv_heads, h.head_dim})
        if (value < 1) refuse("have heads and a head_dim of at least 1, got " + std::to_string(value));
    for (int32_t value : {h.value_dim, h.bytes_per_token})
        if (value < 1) refuse("have a value_dim and bytes_per_token of at least 1, got " + std::to_string(value));
    if (h.num_qo_heads % h.num_kv_heads)
        refuse("have num_qo_heads that are a multiple of num_kv_heads, got " + std::to_string(h.num_qo_heads) +
               " and " + std::to_string(h.num_kv_heads));
    int64_t end = HEADER;
    for (const Section& section : SECTIONS) {
        const int32_t offset = h.*section.offset;
        if (offset < end)
            refuse("have its section " + std::string(section.name) + " at entry " + std::to_string(end) +
                   " or later, as the sections before it end there, got " + std::to_string(offset));
        end = offset + section.size(h);
    }
    if (h.size != end || end > size)
        refuse("have " + std::to_string(end) + " entries as its header says, got " +
               std::to_string(std::min<int64_t>(h.size, size)));
}

void check_nodes(const PlanView& v) {
    bool ok = true;
    for (int32_t n = 0; n < v.header->num_nodes; ++n) ok &= v.node_len[n] >= 0;
    for (int32_t r = 0; r < v.header->num_rows; ++r) ok &= v.row_pos[r] >= 0;
    if (!ok) refuse("have node_len and row_pos of at least 0");
}

void check_rows(const PlanView& v) {
    const Header& h = *v.header;
    std::vector<uint64_t> seen(h.num_rows / 64 + 1);
    for (int32_t r = 0; r < h.num_rows; ++r) {
        const Row& row = v.row[r];
        if (row.row < 0 || row.row >= h.num_rows || seen[row.row / 64] >> row.row % 64 & 1)
            refuse("row", r, "different from all others and within the layout");
        seen[row.row / 64] |= uint64_t(1) << row.row % 64;
        if (row.token < 0 || row.token >= h.num_tokens) refuse("row", r, "of an output token");
        if (row.tip < -1 || row.tip >= h.num_nodes || row.tail < 0 || row.last < 0)
            refuse("row", r, "with a node as tip, or -1, and offsets");
        if (row.mask == -1) continue;
        if (row.mask < 0 || row.last < row.tail ||
            int64_t(row.mask) + (int64_t(row.last) - row.tail) / 32 >= h.num_mask_words)
            refuse("row", r, "with bits within the mask");
    }
}

// Returns the end of what is read of slot_index.
int64_t check_items(const PlanView& v) {
    const Header& h = *v.header;
    int64_t end = 0;
    int32_t seg = 0;
    for (int32_t w = 0; w < h.num_items; ++w) {
        const Item item = v.item[w];
        if (item.row_begin < 0 || item.row_begin >= item.row_end || item.row_end > h.num_rows)
            refuse("item", w, "with rows within the plan");
        if (item.seg_begin != seg || item.seg_end < seg || item.seg_end > h.num_segs)
            refuse("item", w, "with segments of its own, one after the other");
        if (item.partial < -1 ||
            (item.partial >= 0 && int64_t(item.partial) + item.row_end - item.row_begin > h.num_partials))
            refuse("item", w, "with partials within the plan");
        for (; seg < item.seg_end; ++seg) {
            const Seg& s = v.seg[seg];
            if (s.row_lo < item.row_begin || s.row_lo >= s.row_hi || s.row_hi > item.row_end)
                refuse("segment", seg, "with rows of its item");
            if (s.node < 0 || s.node >= h.num_nodes || s.index_begin < 0 || s.pos < 0 || s.start < 0 ||
                s.stop < s.start)
                refuse("segment", seg, "with offsets of a node");
            const int64_t length = v.node_len[s.node];
            if (s.stop != LIVE && s.stop > length) refuse("segment", seg, "within its node");
            if (s.contiguous != 0 && (s.contiguous != 1 || s.stop == LIVE))
                refuse("segment", seg, "contiguous (0 or 1) only if it does not grow");
            const int64_t stop = s.stop == LIVE ? length : s.stop;
            if (stop + s.pos > INT32_MAX) refuse("segment", seg, "at positions below 2**31");
            end = stop + s.index_begin > end ? stop + s.index_begin : end;
        }
    }
    if (seg != h.num_segs) refuse("have items that own all segments");
    return end;
}

void check_merges(const PlanView& v) {
    const Header& h = *v.header;
    bool ok = v.merge_indptr[0] == 0 && v.merge_indptr[h.num_tokens] == h.num_partials;
    for (int32_t t = 0; t < h.num_tokens; ++t) ok &= v.merge_indptr[t] <= v.merge_indptr[t + 1];
    if (!ok) refuse("have a merge_indptr that rises from 0 to its partials");
    for (int32_t p = 0; p < h.num_partials; ++p) ok &= v.merge_partial[p] >= 0 && v.merge_partial[p] < h.num_partials;
    if (!ok) refuse("have partials of its own in merge_partial");
}

void check_empty_tokens(const PlanView& v) {
    const Header& h = *v.header;
    std::vector<bool> written(h.num_tokens);
    for (int32_t t = 0; t < h.num_tokens; ++t) written[t] = v.merge_indptr[t] < v.merge_indptr[t + 1];
    for (int32_t w = 0; w < h.num_items; ++w)
        for (int32_t r = v.item[w].row_begin; v.item[w].partial < 0 && r < v.item[w].row_end; ++r)
            written[v.row[r].token] = true;
    int32_t i = 0;
    for (int32_t t = 0; t < h.num_tokens; ++t)
        if (!written[t] && (i == h.num_empty_tokens || v.empty_tokens[i++] != t))
            refuse("empty token", t, "which no item writes");
    if (i != h.num_empty_tokens) refuse("empty token", v.empty_tokens[i], "only if no item writes it");
}

}  // namespace

PlanView open_plan(const int32_t* buffer, int64_t size) {
    if (size < HEADER) refuse("have a header of " + std::to_string(HEADER) + " entries, got " + std::to_string(size));
    check_header(*reinterpret_cast<const Header*>(buffer), size);
    return plan_view(buffer);
}

int64_t validate(const PlanView& plan) {
    check_nodes(plan);
    check_rows(plan);
    const int64_t index_end = check_items(plan);
    check_merges(plan);
    check_empty_tokens(plan);
    return index_end;
}

}  // namespace forktree
