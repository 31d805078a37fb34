#include "plan/serialize.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>

namespace forktree {
namespace {

constexpr int64_t HEADER = sizeof(Header) / 4;

class Serializer {
public:
    explicit Serializer(const WorkItems& work) : work(work), layout(work.layout), items(work.items) {}

    std::vector<int32_t> run() {
        order_items();
        count_outputs();
        place_sections();
        write_items();
        write_merge_lists();
        std::copy(empty_tokens.begin(), empty_tokens.end(), at(header.empty_tokens_offset));
        put(header.row_offset, work.shared.row.data(), work.shared.row.size());
        std::copy(layout.node_len, layout.node_len + layout.nodes, at(header.node_len_offset));
        std::copy(layout.row_pos, layout.row_pos + layout.rows, at(header.row_pos_offset));
        if (header.num_mask_words) put(header.mask_offset, layout.mask_bits, header.num_mask_words);
        return std::move(buffer);
    }

private:
    enum Run : char { UNKNOWN, NO, YES };

    const WorkItems& work;
    const Layout& layout;
    const std::vector<WorkItem>& items;
    std::vector<size_t> path_order, order;  // of items: top first; as they are written
    std::vector<int32_t> count;             // [T] items that a token's rows are in
    std::vector<int32_t> empty_tokens;
    std::vector<int32_t> first;  // of each item: partial of its first row, or -1
    Header header{};
    std::vector<int32_t> buffer;
    std::vector<Run> runs;  // of each shared segment: whether its slots are consecutive

    int32_t* at(int64_t offset) { return buffer.data() + offset; }

    template <class T>
    void put(int64_t offset, const T* from, size_t n) {
        if (n) std::memcpy(at(offset), from, n * sizeof(T));  // of nothing, `from` may be null
    }

    int32_t token_of(int32_t row) const { return work.shared.row[row].token; }

    // Costliest first, so that what comes last is short; partials are merged in path order all the same.
    void order_items() {
        path_order.resize(items.size());
        std::iota(path_order.begin(), path_order.end(), 0);
        std::sort(path_order.begin(), path_order.end(), [&](size_t a, size_t b) {
            const ItemSegment &x = items[a].segments.front(), &y = items[b].segments.front();
            return std::tie(x.shared, x.start, x.lo) < std::tie(y.shared, y.start, y.lo);
        });
        order = path_order;
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return items[a].cost > items[b].cost; });
    }

    void count_outputs() {
        count.resize(layout.tokens);
        for (const WorkItem& item : items)
            for (int32_t r = item.row_begin; r < item.row_end; ++r) ++count[token_of(r)];
        for (int32_t t = 0; t < layout.tokens; ++t)
            if (!count[t]) empty_tokens.push_back(t);
    }

    void place_sections() {
        int64_t segs = 0, partials = 0;
        first.assign(items.size(), -1);
        for (size_t i : order) {
            const WorkItem& item = items[i];
            segs += int64_t(item.segments.size());
            bool merges = false;
            for (int32_t r = item.row_begin; r < item.row_end; ++r) merges |= count[token_of(r)] > 1;
            if (!merges) continue;
            first[i] = int32_t(partials);
            partials += item.rows();
        }
        if (partials > work.options.max_partials) work.refuse_cap(partials);
        const HeadShape& heads = work.options.heads;
        header.magic = Header::MAGIC;
        header.num_rows = int32_t(layout.rows);
        header.num_tokens = int32_t(layout.tokens);
        header.num_items = int32_t(items.size());
        header.num_segs = int32_t(segs);
        header.num_nodes = int32_t(layout.nodes);
        header.num_partials = int32_t(partials);
        header.num_empty_tokens = int32_t(empty_tokens.size());
        header.num_mask_words = int32_t(layout.mask_indptr ? layout.mask_words : 0);
        header.num_qo_heads = int32_t(heads.num_qo_heads);
        header.num_kv_heads = int32_t(heads.num_kv_heads);
        header.head_dim = int32_t(heads.head_dim);
        header.value_dim = int32_t(heads.value_dim);
        header.bytes_per_token = int32_t(heads.bytes_per_token);
        header.window = int32_t(work.options.window);
        int64_t size = HEADER;
        for (const Section& section : SECTIONS) {
            header.*section.offset = int32_t(size);
            size += section.size(header);
        }
        if (size > INT32_MAX || segs > INT32_MAX || partials > INT32_MAX)
            throw std::invalid_argument("a plan must have less than 2**31 entries, got " + std::to_string(size));
        header.size = int32_t(size);
        buffer.resize(size);
        put(0, &header, 1);
    }

    void write_items() {
        runs.assign(work.shared.segment.size(), UNKNOWN);
        Item* item = reinterpret_cast<Item*>(at(header.item_offset));
        Seg* const begin = reinterpret_cast<Seg*>(at(header.seg_offset));
        Seg* seg = begin;
        for (size_t i : order) {
            const WorkItem& from = items[i];
            const int32_t seg_begin = int32_t(seg - begin);
            for (const ItemSegment& s : from.segments) {
                const int32_t node = work.shared.segment[s.shared].node;
                *seg++ = {layout.node_begin[node], s.start,         s.stop, node, s.lo, s.hi,
                          layout.node_pos[node],   is_contiguous(s)};
            }
            *item++ = {from.row_begin, from.row_end, seg_begin, int32_t(seg - begin), first[i]};
        }
    }

    void write_merge_lists() {
        int32_t* const indptr = at(header.merge_indptr_offset);
        int32_t* const partial = at(header.merge_partial_offset);
        std::fill(count.begin(), count.end(), 0);
        for (size_t i : path_order)
            for (int32_t r = items[i].row_begin; first[i] >= 0 && r < items[i].row_end; ++r) ++count[token_of(r)];
        std::partial_sum(count.begin(), count.end(), indptr + 1);
        std::copy(indptr, indptr + layout.tokens, count.begin());
        for (size_t i : path_order)
            for (int32_t r = items[i].row_begin; first[i] >= 0 && r < items[i].row_end; ++r)
                partial[count[token_of(r)]++] = first[i] + r - items[i].row_begin;
    }

    // Whether slots are consecutive numbers; never claimed of segments that grow.
    int32_t is_contiguous(const ItemSegment& s) {
        if (s.stop == LIVE) return 0;
        const SharedSegment& from = work.shared.segment[s.shared];
        const int32_t* slot = layout.slot_index + layout.node_begin[from.node];
        if (runs[s.shared] == UNKNOWN && from.stop != LIVE)
            runs[s.shared] = consecutive(slot + from.start, slot + from.stop) ? YES : NO;
        return runs[s.shared] == YES || consecutive(slot + s.start, slot + s.stop);
    }

    static bool consecutive(const int32_t* slot, const int32_t* end) {
        while (end - slot > 1) {
            const int32_t* stop = std::min(slot + 256, end - 1);
            uint32_t breaks = 0;
            for (; slot < stop; ++slot) breaks |= uint32_t(slot[1]) - uint32_t(slot[0]) - 1;
            if (breaks) return false;
        }
        return true;
    }
};

}  // namespace

std::vector<int32_t> serialize(const WorkItems& work) { return Serializer(work).run(); }

}  // namespace forktree
