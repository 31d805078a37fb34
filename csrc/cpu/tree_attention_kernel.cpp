// Tree attention on a CPU, compiled once for each instruction set.
//
// Lanes of a vector are query rows: lane = row * G + query head, so the rows of a branch's whole group, and of all
// branches that see a token, share every vector. K and V need no transposing then: each of their elements is broadcast
// against a vector of rows, and softmax works down the lanes.
//
//     scores [token, lane]  = sum over d      of K[token, d] * Qt[d, lane]
//     Ot     [d, lane]     += sum over tokens of V[token, d] * P[token, lane]
//
// Both are the same small product (`product`). Two element types: fp32, into which narrower K and V are widened a tile
// at a time; and pairs of bf16, which AVX-512-BF16 multiplies and adds two at a time, for which the V of two tokens
// is interleaved. A lane's result does not depend on its neighbours, nor on how many heads or rows share the task.
//
// In fp32 it does not depend on how segments cut the tokens it sees either, so a prompt reads the same whether or not
// others share parts of it: weights are relative to an integer power of two, so that moving on to a higher one is
// exact. (Pairs of bf16 weights are relative to the highest score, which then has no rounding error.)
#include "cpu/tree_attention.hpp"
#include "simd/product.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

constexpr int64_t TILE = 128;        // tokens whose scores are held at a time
constexpr int64_t CHUNK = 256;       // tokens whose K and V are prepared at a time, for all rows, at most
constexpr int64_t CACHED = 1 << 18;  // bytes of K and V of a chunk, all heads of the task: a quarter of an L2 cache
constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f, INF = __builtin_inff();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

#if defined(__AVX512BF16__)
// Element i of two vectors taken in turn: i / 2 of the first, i / 2 of the second (32 + i / 2).
struct Interleave {
    uint16_t at[64];
    constexpr Interleave() : at() {
        for (int i = 0; i < 64; ++i) at[i] = uint16_t(i / 2 + i % 2 * 32);
    }
};
constexpr Interleave interleave_indices;
#endif

// ------------------------------------------------------------------ results

// An output, [Dv].
inline void put(const Attention& call, int64_t to, const float* from) {
    const int64_t dim = call.pool.v_dim;
    if (call.dtype == Dtype::fp32) __builtin_memcpy(static_cast<float*>(call.out) + to * dim, from, 4 * dim);
    else narrow(from, static_cast<uint16_t*>(call.out) + to * dim, dim, call.dtype);
}

// Takes in the sink of a head and writes the log-sum-exp at index `to`. By what the sum of weighted values is then to
// be multiplied; 0 if there was none.
float close(const Attention& call, int64_t qo_head, float top, float mass, int64_t to) {
    float shift = 1.0f;
    if (call.sinks) {
        const float sink = call.sinks[qo_head] * LOG2_E, old_top = top;
        top = sink > top ? sink : top;
        shift = top == -INF ? 1.0f : __builtin_exp2f(old_top - top);
        mass = mass * shift + (top == -INF ? 0.0f : __builtin_exp2f(sink - top));
    }
    call.lse[to] = mass == 0.0f ? -INF : (top + __builtin_log2f(mass)) * LN_2;
    return mass == 0.0f ? 0.0f : shift / mass;
}

// ------------------------------------------------------------------ a task

// K or V of some tokens of one head: the term of a token (of V: of TERMS tokens) and an element (of K: of TERMS
// elements) lies at data[token * token_stride + element * dim_stride].
template <class Element>
struct Tile {
    const typename Element::Term* data;
    int64_t token_stride, dim_stride;
};

// Lanes a row of the transposed queries and outputs takes: an odd number of cache lines, so that the rows of a block
// of lanes do not all fall into the same sets of the cache; and room for a block that begins at the last lane.
inline int64_t lane_stride(int64_t lanes) { return (round_up(lanes + BLOCK, 16) / 16 | 1) * 16; }

// What a task works in, laid out from an address on.
template <class Element>
struct Scratch {
    typedef typename Element::Term Term;

    int64_t stride, size;  // lanes of a row; bytes in all
    Term* queries;         // [heads, key_terms, stride]
    float* outputs;        // [heads, Dv, stride]
    float* tops;           // [heads, stride] highest score so far, base 2; in fp32 rounded up to an integer
    float* masses;         // [heads, stride] sum of 2^(score - top)
    float* lost;           // [heads, stride] what rounding took from that sum
    Term* keys;            // [CHUNK, key_terms]
    Term* values;          // [CHUNK / TERMS, Dv]
    Term* values_row;      // [Dv]
    Term* block_q;         // [key_terms, BLOCK]
    float* scores;         // [TILE, BLOCK]
    Term* weights;         // [TILE / TERMS, BLOCK]
    int32_t* first;        // [BLOCK] offsets of the segment's node that a lane sees: first .. last
    int32_t* last;         // [BLOCK]
    float* output;         // [Dv]

    Scratch(const Attention& call, int64_t rows, int64_t heads, uintptr_t address)
        : stride(lane_stride(rows * call.group)) {
        const int64_t key_terms = call.pool.k_dim / Element::TERMS, value_dim = call.pool.v_dim;
        const uintptr_t begin = address;
        const auto take = [&](auto*& pointer, int64_t count) {
            pointer = reinterpret_cast<decltype(pointer + 0)>(address);
            address += round_up(4 * count, 64);
        };
        take(queries, heads * key_terms * stride);
        take(outputs, heads * value_dim * stride);
        take(tops, heads * stride);
        take(masses, heads * stride);
        take(lost, heads * stride);
        take(keys, CHUNK * key_terms);
        take(values, CHUNK / Element::TERMS * value_dim);
        take(values_row, value_dim);
        take(block_q, key_terms * BLOCK);
        take(scores, TILE * BLOCK);
        take(weights, TILE / Element::TERMS * BLOCK);
        take(first, BLOCK);
        take(last, BLOCK);
        take(output, value_dim);
        size = int64_t(address - begin);
    }
};

template <class Element>
class Task : Scratch<Element> {
    typedef typename Element::Term Term;
    typedef Scratch<Element> S;
    using S::stride, S::queries, S::outputs, S::tops, S::masses, S::lost, S::keys, S::values, S::values_row, S::block_q,
        S::scores, S::weights, S::first, S::last, S::output;

    const Attention& call;
    const Item item;
    const Row* rows;  // those of the item
    const int64_t head_begin, heads, group, lanes, key_terms, value_dim;
    bool even = true;      // whether rows see whole segments
    bool careful = false;  // what is not finite in V is kept from rows that do not see it: 0 * NaN is NaN
    Prefetch prefetch;

public:
    Task(const Attention& call, AttentionTask task, char* scratch)
        : S(call, call.plan.item[task.item].row_end - call.plan.item[task.item].row_begin,
            task.head_end - task.head_begin, reinterpret_cast<uintptr_t>(scratch)),
          call(call),
          item(call.plan.item[task.item]),
          rows(call.plan.row + item.row_begin),
          head_begin(task.head_begin),
          heads(task.head_end - task.head_begin),
          group(call.group),
          lanes((item.row_end - item.row_begin) * group),
          key_terms(call.pool.k_dim / Element::TERMS),
          value_dim(call.pool.v_dim),
          prefetch(call, task.head_begin, task.head_end - task.head_begin) {}

    // Damage is rare and shows in the sums, so that they alone are looked at: all is done again then, with care.
    void run() {
        attend();
        if (!finite()) {
            careful = true;
            attend();
        }
        for (int64_t head = 0; head < heads; ++head) finish(head);
    }

private:
    // Tokens [at, at + count) of a segment's node; count 0: the end.
    struct Chunk {
        int32_t seg;
        int64_t at, count;
    };

    void attend() {
        begin();
        Chunk chunk{item.seg_begin, 0, 0};
        advance(chunk);
        while (chunk.count) {
            Chunk next = chunk;
            advance(next);
            // Those of the first block of lanes: every 12 tokens with all of K, every 12 elements of V with all tokens.
            const int64_t steps =
                heads * chunk.count * (key_terms + value_dim / Element::TERMS) / (12 * Prefetch::TERMS);
            prefetch.begin(slots_of(next), next.count, steps + 1);
            for (int64_t head = 0; head < heads; ++head) attend(chunk, head);
            chunk = next;
        }
    }

    bool finite() const {
        vi bad{};
        for (int64_t i = 0; i < heads * value_dim * stride; i += VL) {
            const vf x = load(outputs + i);
            bad |= x - x != vf{};
        }
        bool some = false;
        for (int i = 0; i < VL; ++i) some |= bad[i] != 0;
        return !some;
    }

    void advance(Chunk& chunk) const {
        const int64_t token_bytes = heads * (call.pool.k_dim + value_dim) * (call.dtype == Dtype::fp32 ? 4 : 2);
        int64_t most = CACHED / token_bytes / TILE * TILE;
        most = most < TILE ? TILE : most > CHUNK ? CHUNK : most;
        chunk.at += chunk.count;
        for (bool fresh = chunk.count == 0;; ++chunk.seg, fresh = true) {
            chunk.count = 0;
            if (chunk.seg == item.seg_end) return;
            const Seg& seg = call.plan.seg[chunk.seg];
            const int32_t length = call.plan.node_len[seg.node], stop = seg.stop < length ? seg.stop : length;
            if (fresh) chunk.at = seg.start;
            if (chunk.at < stop) {
                chunk.count = stop - chunk.at < most ? stop - chunk.at : most;
                return;
            }
        }
    }

    const int32_t* slots_of(const Chunk& chunk) const {
        return chunk.count ? call.slot_index + call.plan.seg[chunk.seg].index_begin + chunk.at : nullptr;
    }

    void begin() {
        even = call.plan.header->window == 0;
        for (int64_t r = 0; r < item.row_end - item.row_begin; ++r) even = even && rows[r].tip < 0;
        const int64_t item_size = call.dtype == Dtype::fp32 ? 4 : 2;
        for (int64_t head = 0; head < heads; ++head) {
            Term* to = queries + head * key_terms * stride;
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t qo_head = (head_begin + head) * group + lane % group;
                const int64_t at = rows[lane / group].row * call.q_row_stride + qo_head * call.q_head_stride;
                gather_query(static_cast<const char*>(call.q) + at * item_size, to + lane);
            }
            for (int64_t k = 0; k < key_terms; ++k)
                for (int64_t lane = lanes; lane < stride; ++lane) to[k * stride + lane] = 0;
        }
        __builtin_memset(outputs, 0, 4 * heads * value_dim * stride);
        __builtin_memset(masses, 0, 4 * heads * stride);
        __builtin_memset(lost, 0, 4 * heads * stride);
        for (int64_t i = 0; i < heads * stride; ++i) tops[i] = -INF;
    }

    void gather_query(const void* from, float* to) {
        for (int64_t d = 0; d < key_terms; ++d) to[d * stride] = element(from, d);
    }

    void gather_query(const void* from, uint32_t* to) {
        for (int64_t k = 0; k < key_terms; ++k)
            __builtin_memcpy(to + k * stride, static_cast<const char*>(from) + 4 * k, 4);
    }

    // One KV head, all rows of the segment.
    void attend(const Chunk& chunk, int64_t head) {
        const Seg& seg = call.plan.seg[chunk.seg];
        const int64_t at = chunk.at, count = chunk.count;
        const int32_t* slots = slots_of(chunk);
        const Tile<Element> k = key_tile(slots, count, head_begin + head);
        const Tile<Element> v = value_tile(slots, count, head_begin + head);
        const int64_t lane_begin = (seg.row_lo - item.row_begin) * group;
        const int64_t lane_end = (seg.row_hi - item.row_begin) * group;
        for (int64_t lane = lane_begin; lane < lane_end; lane += BLOCK) {
            const int64_t n = lane_end - lane < BLOCK ? lane_end - lane : BLOCK;
            int64_t begin = 0, end = count;  // of the tokens any lane of the block sees
            const bool whole = even || see(seg, lane, n, at, begin, end);
            if (begin >= end) continue;
            const int vectors = int(ceil_div(n, VL));
            const Term* q = queries + head * key_terms * stride + lane;
            for (int64_t t = 0; t < key_terms; ++t)
                for (int i = 0; i < vectors; ++i)
                    __builtin_memcpy(block_q + t * BLOCK + i * VL, q + t * stride + i * VL, 4 * VL);
            for (int64_t tile = begin; tile < end; tile += TILE) {
                const int64_t tokens = end - tile < TILE ? end - tile : TILE;
                product<Element>(vectors, tokens, k.data + tile * k.token_stride, k.token_stride, k.dim_stride, block_q,
                                 scores, BLOCK, key_terms, nullptr, vi{}, prefetch);
                vf factor[VECTORS];
                weigh(seg, lane, n, at + tile, tokens, head, whole, factor);
                const int64_t terms = ceil_div(tokens, Element::TERMS), padded = round_up(terms, Element::PAD);
                if (padded > terms) __builtin_memset(weights + terms * BLOCK, 0, 4 * (padded - terms) * BLOCK);
                product<Element>(vectors, value_dim, v.data + tile / Element::TERMS * v.token_stride, v.dim_stride,
                                 v.token_stride, weights, outputs + head * value_dim * stride + lane, stride, padded,
                                 factor, FORKTREE_ISA::lanes() < int32_t(n - (vectors - 1) * VL), prefetch);
                if (careful) spoil(slots + tile, tokens, head, lane, n);
            }
        }
    }

    // Fills first and last for n lanes; narrows [begin, end), offsets from `at`, which may end up empty. Whether all
    // lanes see all of it.
    bool see(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t& begin, int64_t& end) {
        const int64_t window = call.plan.header->window;
        int64_t lowest = INT32_MAX, highest = -1, inner_first = 0, inner_last = INT32_MAX;
        bool whole = true;
        for (int64_t i = 0; i < n; ++i) {
            const Row& row = rows[(lane + i) / group];
            const int64_t distance = int64_t(call.plan.row_pos[row.row]) - seg.pos;
            int64_t from = 0, to = INT32_MAX;
            if (window) {
                from = distance - window + 1 > 0 ? distance - window + 1 : 0;
                to = distance < INT32_MAX ? distance : INT32_MAX;
            }
            if (row.tip == seg.node) {
                to = to < row.last ? to : row.last;
                whole = whole && row.mask < 0;
            }
            first[i] = int32_t(from);
            last[i] = int32_t(to < -1 ? -1 : to);
            lowest = from < lowest ? from : lowest;
            highest = to > highest ? to : highest;
            inner_first = from > inner_first ? from : inner_first;
            inner_last = to < inner_last ? to : inner_last;
        }
        for (int64_t i = n; i < round_up(n, VL); ++i) first[i] = INT32_MAX, last[i] = -1;
        if (lowest > at) begin = (lowest - at) / TILE * TILE;  // tiles lie where they would without a window
        if (highest < at + end - 1) end = highest - at + 1;
        return whole && inner_first <= at + begin && inner_last >= at + end - 1;
    }

    // Turns scores into weights and moves tops and masses on. factor: by what the outputs so far are to be multiplied.
    void weigh(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens, int64_t head, bool whole,
               vf* factor) {
        const int vectors = int(ceil_div(n, VL));
        // What is scaled only is scaled within the exponential.
        const bool scaled_only = !call.biased();
        if (!scaled_only) reshape_scores(seg, lane, n, at, tokens, head);
        if (!whole) hide(seg, lane, n, at, tokens);
        const float unit = scaled_only ? call.scale * LOG2_E : 1.0f;
        for (int v = 0; v < vectors; ++v) {
            float* top = tops + head * stride + lane + v * VL;
            float* mass = masses + head * stride + lane + v * VL;
            const vi ours = FORKTREE_ISA::lanes() + v * VL < int32_t(n);
            float* column = scores + v * VL;
            vf highest = splat(-INF);
            for (int64_t t = 0; t < tokens; ++t) highest = max(highest, load(column + t * BLOCK));
            const vf old_top = load(top), old_mass = load(mass);
            vf new_top = highest * unit;
            if constexpr (Element::TERMS == 1) new_top = FORKTREE_ISA::ceil(new_top);
            new_top = max(old_top, new_top);
            const vf base = new_top == -INF ? vf{} : new_top;
            factor[v] = exp2(old_top - base, vf{});
            const vf sum = exp_column(column, weights + v * VL, tokens, unit, base, old_mass * factor[v],
                                      lost + head * stride + lane + v * VL, factor[v], ours);
            store(top, ours ? new_top : old_top);
            store(mass, ours ? sum : old_mass);
        }
    }

    // Weights of a column of scores, added to `sum`. In fp32 with what rounding lost so far (Kahan, 1965): a sum over
    // all tokens one by one, as it must be if segments are to leave no trace, would lose more than one tile after the
    // other.
    vf exp_column(const float* column, float* to, int64_t tokens, float unit, vf base, vf sum, float* lost_so_far,
                  vf factor, vi ours) {
        const vf old_lost = load(lost_so_far);
        vf lost = old_lost * factor;
        for (int64_t t = 0; t < tokens; ++t) {
            const vf p = exp2(load(column + t * BLOCK) * unit, base);
            store(to + t * BLOCK, p);
            const vf more = p - lost, total = sum + more;
            lost = (total - sum) - more;
            sum = total;
        }
        store(lost_so_far, ours ? lost : old_lost);
        return sum;
    }

#if defined(__AVX512BF16__)
    vf exp_column(const float* column, uint32_t* to, int64_t tokens, float unit, vf base, vf sum, float*, vf, vi) {
        vf mine{};
        for (int64_t t = 0; t < tokens; t += 2) {
            const vf p = exp2(load(column + t * BLOCK) * unit - base, vf{});
            vf next{};
            if (t + 1 < tokens) next = exp2(load(column + (t + 1) * BLOCK) * unit - base, vf{});
            mine += p;
            mine += next;
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)p));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)next));
            _mm512_storeu_si512(to + t / 2 * BLOCK, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        return sum + mine;
    }
#endif

    // Scale, soft-cap and ALiBi, in base 2.
    void reshape_scores(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens, int64_t head) {
        for (int64_t begin = 0; begin < n; begin += VL) {
            float slope[VL] = {}, distance[VL] = {};  // distance: from the row to offset 0 of the node
            if (call.alibi_slopes)
                for (int64_t i = begin; i < n && i < begin + VL; ++i) {
                    slope[i - begin] = call.alibi_slopes[(head_begin + head) * group + (lane + i) % group] * LOG2_E;
                    const Row& row = rows[(lane + i) / group];
                    distance[i - begin] = float(int64_t(seg.pos) - call.plan.row_pos[row.row]);
                }
            const vf slopes = load(slope), distances = load(distance);
            for (int64_t t = 0; t < tokens; ++t) {
                float* score = scores + t * BLOCK + begin;
                vf s = load(score) * call.scale;
                if (call.softcap) s = FORKTREE_ISA::tanh(s / call.softcap) * call.softcap;
                store(score, s * LOG2_E + slopes * (distances + float(at + t)));
            }
        }
    }

    // Scores of what lanes do not see become -inf.
    void hide(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens) {
        for (int64_t begin = 0; begin < n; begin += VL) {
            const vi from = load(first + begin), to = load(last + begin);
            for (int64_t t = 0; t < tokens; ++t) {
                float* score = scores + t * BLOCK + begin;
                const vi offset = splat(int32_t(at + t));
                store(score, (offset >= from) & (offset <= to) ? load(score) : splat(-INF));
            }
        }
        for (int64_t i = 0; i < n; ++i) {
            const Row& row = rows[(lane + i) / group];
            if (row.tip != seg.node || row.mask < 0) continue;
            const int64_t end = row.last - at < tokens ? row.last - at + 1 : tokens;  // beyond, all is hidden already
            for (int64_t t = row.tail > at ? row.tail - at : 0; t < end; ++t) {
                const int64_t bit = at + t - row.tail;
                if (!(call.plan.mask[row.mask + bit / 32] >> bit % 32 & 1)) scores[t * BLOCK + i] = -INF;
            }
        }
    }

    // Adds what is not finite in V, which is 0 in the tile, to the lanes that see it.
    void spoil(const int32_t* slots, int64_t tokens, int64_t head, int64_t lane, int64_t n) {
        for (int64_t t = 0; t < tokens; ++t) {
            const char* from = v_at(slots[t], head_begin + head);
            for (int64_t d = 0; d < value_dim; ++d) {
                const float x = element(from, d);
                if (x - x == 0.0f) continue;
                float* to = outputs + (head * value_dim + d) * stride + lane;
                for (int64_t i = 0; i < n; ++i)
                    if (scores[t * BLOCK + i] != -INF) to[i] += x;
            }
        }
    }

    // ---------------------------------------------------------------- tiles

    const char* k_at(int64_t slot, int64_t head) const {
        return static_cast<const char*>(call.pool.k) +
               (slot * call.pool.k_slot_stride + head * call.pool.k_head_stride) * (call.dtype == Dtype::fp32 ? 4 : 2);
    }

    const char* v_at(int64_t slot, int64_t head) const {
        return static_cast<const char*>(call.pool.v) +
               (slot * call.pool.v_slot_stride + head * call.pool.v_head_stride) * (call.dtype == Dtype::fp32 ? 4 : 2);
    }

    float element(const void* from, int64_t d) const {
        if (call.dtype == Dtype::fp32) return static_cast<const float*>(from)[d];
        if (call.dtype == Dtype::bf16) return to_float(static_cast<const Bf16*>(from)[d]);
        return to_float(static_cast<const Fp16*>(from)[d]);
    }

    // Copies, without gaps between tokens: the rows of a pool are often powers of two, and a few of those already want
    // the same place in the cache.
    template <class At>
    Tile<Single> tile(const At& at, int64_t count, int64_t dim, float* to) const {
        for (int64_t t = 0; t < count; ++t) {
            const char* from = at(t);
            if (call.dtype == Dtype::fp32) __builtin_memcpy(to + t * dim, from, 4 * dim);
            else widen(reinterpret_cast<const uint16_t*>(from), to + t * dim, dim, call.dtype);
        }
        return {to, dim, 1};
    }

    Tile<Element> key_tile(const int32_t* slots, int64_t count, int64_t head) {
        if constexpr (Element::TERMS == 1) {
            return tile([&](int64_t t) { return k_at(slots[t], head); }, count, call.pool.k_dim, keys);
        } else {
            for (int64_t t = 0; t < count; ++t)
                __builtin_memcpy(keys + t * key_terms, k_at(slots[t], head), 4 * key_terms);
            return {keys, key_terms, 1};
        }
    }

    Tile<Element> value_tile(const int32_t* slots, int64_t count, int64_t head) {
        const Tile<Element> tile = values_of(slots, count, head);
        for (int64_t t = 0; careful && t < ceil_div(count, Element::TERMS); ++t)
            for (int64_t d = 0; d < value_dim; ++d) {
                Term& x = values[t * tile.token_stride + d * tile.dim_stride];
                x = finite_or_0(x);
            }
        return tile;
    }

    static float finite_or_0(float x) { return x - x == 0.0f ? x : 0.0f; }
    static uint32_t finite_or_0(uint32_t pair) {
        for (const uint32_t half : {0xffffu, 0xffff0000u})
            if ((pair & half & 0x7f807f80u) == (half & 0x7f807f80u)) pair &= ~half;
        return pair;
    }

    Tile<Element> values_of(const int32_t* slots, int64_t count, int64_t head) {
        if constexpr (Element::TERMS == 1) {
            return tile([&](int64_t t) { return v_at(slots[t], head); }, count, value_dim, values);
        } else {
            const auto row = [&](int64_t t) { return reinterpret_cast<const uint16_t*>(v_at(slots[t], head)); };
            const int64_t pairs = ceil_div(count, 2);
            for (int64_t p = 0; p < pairs; ++p) {
                Term* to = Element::PAD > 1 ? values_row : values + p * value_dim;
                if (2 * p + 1 < count) {
                    interleave(row(2 * p), row(2 * p + 1), to);
                } else {
                    for (int64_t d = 0; d < value_dim; ++d) to[d] = row(2 * p)[d];
                }
                if constexpr (Element::PAD > 1)
                    for (int64_t d = 0; d < value_dim; ++d) values[d * (CHUNK / 2) + p] = to[d];
            }
            if constexpr (Element::PAD == 1) return {values, value_dim, 1};
            const int64_t padded = round_up(pairs, Element::PAD);
            for (int64_t d = 0; d < value_dim; ++d)
                __builtin_memset(values + d * (CHUNK / 2) + pairs, 0, 4 * (padded - pairs));
            return {values, 1, CHUNK / 2};
        }
    }

    // to[d] = low[d] | high[d] << 16
    void interleave(const uint16_t* low, const uint16_t* high, Term* to) const {
        int64_t d = 0;
#if defined(__AVX512BF16__)
        const __m512i first = _mm512_loadu_si512(interleave_indices.at),
                      second = _mm512_loadu_si512(interleave_indices.at + 32);
        for (; d + 32 <= value_dim; d += 32) {
            const __m512i a = _mm512_loadu_si512(low + d), b = _mm512_loadu_si512(high + d);
            _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, first, b));
            _mm512_storeu_si512(to + d + 16, _mm512_permutex2var_epi16(a, second, b));
        }
#endif
        for (; d < value_dim; ++d) to[d] = uint32_t(low[d]) | uint32_t(high[d]) << 16;
    }

    void finish(int64_t head) {
        const int64_t num_heads = call.num_qo_heads;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t row = lane / group, qo_head = (head_begin + head) * group + lane % group;
            const float* column = outputs + head * value_dim * stride + lane;
            const float top = tops[head * stride + lane], mass = masses[head * stride + lane];
            if (item.partial < 0) {
                const int64_t to = rows[row].token * num_heads + qo_head;
                const float weight = close(call, qo_head, top, mass, to);
                for (int64_t d = 0; d < value_dim; ++d) output[d] = column[d * stride] * weight;
                put(call, to, output);
            } else {
                const int64_t to = (item.partial + row) * num_heads + qo_head;
                call.partial_max[to] = top;
                call.partial_mass[to] = mass;
                for (int64_t d = 0; d < value_dim; ++d) call.partial_out[to * value_dim + d] = column[d * stride];
            }
        }
    }
};

void merge(const Attention& call, int64_t token, float* sum) {
    const int64_t heads = call.num_qo_heads, dim = call.pool.v_dim;
    const int32_t* begin = call.plan.merge_partial + call.plan.merge_indptr[token];
    const int32_t* end = call.plan.merge_partial + call.plan.merge_indptr[token + 1];
    for (int64_t head = 0; head < heads; ++head) {
        float top = -INF, mass = 0.0f;
        for (const int32_t* p = begin; p < end; ++p) {
            const float x = call.partial_max[*p * heads + head];
            top = x > top ? x : top;
        }
        const float base = top == -INF ? 0.0f : top;
        __builtin_memset(sum, 0, 4 * dim);
        for (const int32_t* p = begin; p < end; ++p) {
            const int64_t state = *p * heads + head;
            const float factor = __builtin_exp2f(call.partial_max[state] - base);
            mass += call.partial_mass[state] * factor;
            const float* from = call.partial_out + state * dim;
            for (int64_t d = 0; d < dim; ++d) sum[d] += from[d] * factor;
        }
        const int64_t to = token * heads + head;
        const float weight = close(call, head, top, mass, to);
        for (int64_t d = 0; d < dim; ++d) sum[d] *= weight;
        put(call, to, sum);
    }
}

template <class Element>
int64_t scratch(const Attention& call, int64_t rows, int64_t heads) {
    return Scratch<Element>(call, rows, heads, 0).size;
}

template <class Element>
void run(const Attention& call, AttentionTask task, char* scratch) {
#if defined(FORKTREE_TILES)
    tiles_begin();
#endif
    Task<Element>(call, task, scratch).run();
#if defined(FORKTREE_TILES)
    tiles_end();
#endif
}

template <class Element>
AttentionKernel kernel_of() {
    return {scratch<Element>, run<Element>, merge};
}

}  // namespace

AttentionKernel attention_kernel(const Attention& call) {
#if defined(__AVX512BF16__)
    if (call.dtype == Dtype::bf16 && call.pool.k_dim % 2 == 0) return kernel_of<Pair>();
#endif
    (void)call;
    return kernel_of<Single>();
}

}  // namespace forktree::FORKTREE_ISA
