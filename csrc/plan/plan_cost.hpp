// What work costs, in picoseconds, so that ways of cutting it can be compared. All integers: the same step gives the
// same plan on every machine. A model, not a measurement: its constants are those of forktree.target.
#pragma once

#include <algorithm>
#include <cstdint>

namespace forktree {

constexpr int64_t BLOCK = 64;  // tokens after which an executor rescales its sums; also where segments may be cut

struct Target {
    int64_t units;           // pieces of work that keep all workers busy
    int64_t heads_per_item;  // KV heads of an item that are one piece of work
    int64_t lanes;           // packed rows (query row x head of its group) processed together
    int64_t max_lanes;       // packed rows an item may have
    int64_t memory, cache;   // a byte of K or V, read by the first item; read again by others
    int64_t mac, exp;        // a multiply-add, an exponential, of all lanes
    int64_t partial;         // a byte of a partial, written and merged
    int64_t segment;         // an element of the sums of all lanes, rescaled for each block of tokens
    int64_t item;            // starting on an item
    int64_t grain;           // work smaller than this is not cut
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Prices of one head shape; those of segments, items and partials are per KV head.
class Prices {
public:
    Prices(const Target& target, int64_t num_qo_heads, int64_t num_kv_heads, int64_t head_dim)
        : target(target),
          heads(num_kv_heads),
          group(num_qo_heads / num_kv_heads),
          dim(head_dim),
          token_memory(4 * dim * target.memory),
          token_cache(4 * dim * target.cache),  // K and V, 2 bytes each
          token_math(2 * dim * target.mac + target.exp),
          rescale(dim * target.segment),
          partial_row(group * (dim + 2) * 4 * target.partial) {}

    int64_t lane_groups(int64_t rows) const { return ceil_div(rows * group, target.lanes); }

    // Of `tokens`, `again` were read by another item before.
    int64_t segment(int64_t rows, int64_t tokens, int64_t again) const {
        const int64_t groups = lane_groups(rows);
        return std::max((tokens - again) * token_memory + again * token_cache, tokens * groups * token_math) +
               ceil_div(tokens, BLOCK) * groups * rescale;
    }
    int64_t item(int64_t rows) const { return target.item + lane_groups(rows) * rescale; }
    int64_t partials(int64_t rows) const { return rows * partial_row; }

    // Bound of what a segment costs that is cut into single rows and blocks, each an item of its own.
    long double finest(int64_t rows, int64_t tokens) const {
        const int64_t groups = lane_groups(1);
        return (long double)rows * tokens * (token_memory + token_cache + groups * token_math) +
               (long double)rows * (tokens / BLOCK + 2) * (target.item + 2 * groups * rescale + partial_row);
    }

    // Time if all is spread evenly, or as long as the longest item takes. `sum` and `longest` are per KV head.
    int64_t spread(int64_t sum) const { return ceil_div(sum * heads, target.units); }
    int64_t alone(int64_t longest) const { return longest * std::min(target.heads_per_item, heads); }

    const Target target;
    const int64_t heads, group, dim;

private:
    const int64_t token_memory, token_cache, token_math, rescale, partial_row;
};

}  // namespace forktree
