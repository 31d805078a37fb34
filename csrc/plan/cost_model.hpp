// What work costs, in picoseconds, so that ways of cutting it can be compared. All integers: the same step gives the
// same plan on every machine. A model, not a measurement: its constants are those of forktree.plan.cost_model.
#pragma once

#include <algorithm>
#include <cstdint>

namespace forktree {

constexpr int64_t BLOCK = 64;  // tokens after which an executor rescales its sums; also where segments may be cut

struct CostModel {
    int64_t units;           // units of work that keep all workers busy
    int64_t heads_per_item;  // KV heads of an item that are one unit of work
    int64_t lanes;           // packed rows (query row x head of its group) processed together
    int64_t max_lanes;       // packed rows an item may have
    int64_t memory, cache;   // a byte of K or V, read by the first item; read again by others
    int64_t mac, exp;        // a multiply-add, an exponential, of all lanes
    int64_t partial;         // a byte of a partial, written and merged
    int64_t segment;         // an element of the sums of all lanes, rescaled for each block of tokens
    int64_t item;            // starting on an item
    int64_t grain;           // work smaller than this is not cut
};

// Heads of one layer, and the format of its keys and values.
struct HeadShape {
    int64_t num_qo_heads, num_kv_heads, head_dim, value_dim;
    int64_t bytes_per_token;  // of K and V, all KV heads
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Prices of one head shape; those of segments, items and partials are per KV head.
class Prices {
public:
    Prices(const CostModel& model, const HeadShape& shape)
        : model(model),
          heads(shape.num_kv_heads),
          group(shape.num_qo_heads / shape.num_kv_heads),
          token_memory(ceil_div(shape.bytes_per_token, heads) * model.memory),
          token_cache(ceil_div(shape.bytes_per_token, heads) * model.cache),
          token_math((shape.head_dim + shape.value_dim) * model.mac + model.exp),
          rescale(shape.value_dim * model.segment),
          partial_row(group * (shape.value_dim + 2) * 4 * model.partial) {}

    int64_t lane_groups(int64_t rows) const { return ceil_div(rows * group, model.lanes); }

    // Of `tokens`, `reread` were read by another item before.
    int64_t segment(int64_t rows, int64_t tokens, int64_t reread) const {
        const int64_t groups = lane_groups(rows);
        return std::max((tokens - reread) * token_memory + reread * token_cache, tokens * groups * token_math) +
               ceil_div(tokens, BLOCK) * groups * rescale;
    }
    int64_t item(int64_t rows) const { return model.item + lane_groups(rows) * rescale; }
    int64_t partials(int64_t rows) const { return rows * partial_row; }

    // Upper bound of what a segment costs that is cut into single rows and blocks, each an item of its own.
    long double finest(int64_t rows, int64_t tokens) const {
        const int64_t groups = lane_groups(1);
        return (long double)rows * tokens * (token_memory + token_cache + groups * token_math) +
               (long double)rows * (tokens / BLOCK + 2) * (model.item + 2 * groups * rescale + partial_row);
    }

    // Time if all is spread evenly, and time of the longest item by itself. `sum` and `longest` are per KV head.
    int64_t spread(int64_t sum) const { return ceil_div(sum * heads, model.units); }
    int64_t alone(int64_t longest) const { return longest * std::min(model.heads_per_item, heads); }

    const CostModel model;
    const int64_t heads, group;

private:
    const int64_t token_memory, token_cache, token_math, rescale, partial_row;
};

}  // namespace forktree
