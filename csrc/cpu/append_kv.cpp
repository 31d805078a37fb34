#include "cpu/append_kv.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/numeric.hpp"
#include "common/ranges.hpp"

namespace forktree {
namespace {

struct Copy {
    const Strided from, to;
    const int64_t item;
    int64_t pieces, size;  // of a row: its heads, or 1 if they are contiguous; bytes of each

    Copy(const Append& x, int64_t heads, int64_t item)
        : from(x.rows), to(x.pool), item(item), pieces(x.dim ? heads : 0), size(x.dim * item) {
        if (from.head_stride == x.dim && to.head_stride == x.dim && pieces) size *= std::exchange(pieces, 1);
    }

    char* at(const Strided& x, int64_t i, int64_t head) const {
        return static_cast<char*>(x.data) + (i * x.stride + head * x.head_stride) * item;
    }

    // memmove, as the rows may be a view of the pool.
    void operator()(int64_t token, int64_t slot) const {
        for (int64_t i = 0; i < pieces; ++i) std::memmove(at(to, slot, i), at(from, token, i), size_t(size));
    }
};

}  // namespace

void append_kv(const AppendKvParams& params, int threads) {
    const Append k = keys(params), v = values(params);
    const Indices slots = params.slots;
    const int64_t heads = params.pool.num_kv_heads, num_slots = params.pool.num_slots;
    const int64_t item = item_size(int(params.pool.dtype));
    int64_t highest = -1;
    for (int64_t t = 0; t < slots.size; ++t) highest = std::max(highest, slots[t]);
    if (highest >= num_slots)
        throw std::invalid_argument("slots must be below the pool's " + std::to_string(num_slots) + ", got " +
                                    std::to_string(highest));
    if (highest < 0) return;

    const Copy copy_k(k, heads, item), copy_v(v, heads, item);
    const Ranges ranges(slots.size, 2 * slots.size * heads * (k.dim + v.dim) * item);
    ranges.run(threads, [&](int64_t, int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            const int64_t slot = slots[t];
            if (slot < 0) continue;
            copy_k(t, slot);
            copy_v(t, slot);
        }
    });
}

}  // namespace forktree
