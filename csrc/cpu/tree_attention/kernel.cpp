// Tree attention on a CPU, compiled once for each instruction set.
//
// The lanes of a vector are query rows: lane = row * G + query head. The query heads of a group, and all branches that
// see a token, thus share every vector. K and V need no transposing: each of their elements is broadcast against a
// vector of rows, and the softmax works down the lanes.
//
//     scores [token, lane]  = sum over d      of K[token, d] * Qt[d, lane]
//     Ot     [d, lane]     += sum over tokens of V[token, d] * P[token, lane]
//
// Both are the same small product (`product`). There are two element types: fp32, into which narrower K and V are
// widened a tile at a time; and pairs of bf16, which AVX-512-BF16 multiplies and adds two at a time, and for which the
// V of two tokens are interleaved. A lane's result does not depend on its neighbours, nor on how many heads or rows
// share the task.
//
// In fp32 a lane's result does not depend on how segments cut the tokens it sees either, so a prompt's output is the
// same whether or not others share parts of it: weights are relative to an integer power of two, so that the step to a
// higher one is exact. Pairs of bf16 weights are relative to the highest score, whose weight then has no rounding
// error.
#include "cpu/tree_attention/kv_tiles.hpp"
#include "cpu/tree_attention/results.hpp"
#include "cpu/tree_attention/scratch.hpp"
#include "simd/product.hpp"

namespace forktree::FORKTREE_ISA {
namespace {

template <class Element>
class Task : Scratch<Element> {
    typedef typename Element::Term Term;
    typedef Scratch<Element> S;
    using S::stride, S::queries, S::outputs, S::tops, S::masses, S::lost, S::block_q, S::scores, S::weights, S::first,
        S::last, S::output;

    const Attention& call;
    const Item item;
    const Row* rows;  // those of the item
    const int64_t head_begin, heads, group, lanes, key_terms, value_dim;
    bool whole_segments = true;  // whether rows see every segment as a whole
    KvTiles<Element> tiles;
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
          tiles(call, *this),
          prefetch(call, task.head_begin, task.head_end - task.head_begin) {}

    // NaN or inf in V reaches rows that do not see it, as 0 * NaN is NaN. This is rare and shows in the outputs, so
    // only they are checked; if it has happened, V is sanitized and everything is computed again.
    void run() {
        attend();
        if (!finite()) {
            tiles.sanitize_v = true;
            attend();
        }
        for (int64_t head = 0; head < heads; ++head) store_results(head);
    }

private:
    // Tokens [at, at + count) of a segment's node; a count of 0 is the end.
    struct KvTile {
        int32_t seg;
        int64_t at, count;
    };

    void attend() {
        begin();
        KvTile tile{item.seg_begin, 0, 0};
        advance(tile);
        while (tile.count) {
            KvTile next = tile;
            advance(next);
            // While the first block of lanes is computed, `product` takes 12 rows, tokens of K or elements of V, at a
            // time.
            const int64_t steps =
                heads * tile.count * (key_terms + value_dim / Element::TERMS) / (12 * Prefetch::TERMS);
            prefetch.begin(slots_of(next), next.count, steps + 1);
            for (int64_t head = 0; head < heads; ++head) attend(tile, head);
            tile = next;
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

    // Moves on to the next tile of the item's segments.
    void advance(KvTile& tile) const {
        const int64_t token_bytes = heads * (call.pool.k_dim + value_dim) * (call.dtype == Dtype::fp32 ? 4 : 2);
        int64_t maximum = CACHED / token_bytes / SCORE_TILE * SCORE_TILE;
        maximum = maximum < SCORE_TILE ? SCORE_TILE : maximum > KV_TILE ? KV_TILE : maximum;
        tile.at += tile.count;
        for (bool fresh = tile.count == 0;; ++tile.seg, fresh = true) {
            tile.count = 0;
            if (tile.seg == item.seg_end) return;
            const Seg& seg = call.plan.seg[tile.seg];
            const int32_t length = call.plan.node_len[seg.node], stop = seg.stop < length ? seg.stop : length;
            if (fresh) tile.at = seg.start;
            if (tile.at < stop) {
                tile.count = stop - tile.at < maximum ? stop - tile.at : maximum;
                return;
            }
        }
    }

    const int32_t* slots_of(const KvTile& tile) const {
        return tile.count ? call.slot_index + call.plan.seg[tile.seg].index_begin + tile.at : nullptr;
    }

    void begin() {
        whole_segments = call.plan.header->window == 0;
        for (int64_t r = 0; r < item.row_end - item.row_begin; ++r) whole_segments = whole_segments && rows[r].tip < 0;
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
        for (int64_t d = 0; d < key_terms; ++d) to[d * stride] = element(call.dtype, from, d);
    }

    void gather_query(const void* from, uint32_t* to) {
        for (int64_t k = 0; k < key_terms; ++k)
            __builtin_memcpy(to + k * stride, static_cast<const char*>(from) + 4 * k, 4);
    }

    // Attends to a tile of one KV head, for all rows of the segment.
    void attend(const KvTile& tile, int64_t head) {
        const Seg& seg = call.plan.seg[tile.seg];
        const int64_t at = tile.at, count = tile.count;
        const int32_t* slots = slots_of(tile);
        const KvTerms<Element> k = tiles.keys(slots, count, head_begin + head);
        const KvTerms<Element> v = tiles.values(slots, count, head_begin + head);
        const int64_t lane_begin = (seg.row_lo - item.row_begin) * group;
        const int64_t lane_end = (seg.row_hi - item.row_begin) * group;
        for (int64_t lane = lane_begin; lane < lane_end; lane += BLOCK) {
            const int64_t n = lane_end - lane < BLOCK ? lane_end - lane : BLOCK;
            int64_t begin = 0, end = count;  // of the tokens that any lane of the block sees
            const bool whole = whole_segments || find_visible(seg, lane, n, at, begin, end);
            if (begin >= end) continue;
            const int vectors = int(ceil_div(n, VL));
            const Term* q = queries + head * key_terms * stride + lane;
            for (int64_t t = 0; t < key_terms; ++t)
                for (int i = 0; i < vectors; ++i)
                    __builtin_memcpy(block_q + t * BLOCK + i * VL, q + t * stride + i * VL, 4 * VL);
            for (int64_t token = begin; token < end; token += SCORE_TILE) {
                const int64_t tokens = end - token < SCORE_TILE ? end - token : SCORE_TILE;
                product<Element>(vectors, tokens, k.data + token * k.token_stride, k.token_stride, k.dim_stride,
                                 block_q, scores, BLOCK, key_terms, nullptr, vi{}, prefetch);
                vf factor[VECTORS];
                softmax_step(seg, lane, n, at + token, tokens, head, whole, factor);
                const int64_t terms = ceil_div(tokens, Element::TERMS), padded = round_up(terms, Element::PAD);
                if (padded > terms) __builtin_memset(weights + terms * BLOCK, 0, 4 * (padded - terms) * BLOCK);
                product<Element>(vectors, value_dim, v.data + token / Element::TERMS * v.token_stride, v.dim_stride,
                                 v.token_stride, weights, outputs + head * value_dim * stride + lane, stride, padded,
                                 factor, FORKTREE_ISA::lanes() < int32_t(n - (vectors - 1) * VL), prefetch);
                if (tiles.sanitize_v) poison(slots + token, tokens, head, lane, n);
            }
        }
    }

    // Fills `first` and `last` for n lanes, and narrows [begin, end), offsets from `at`, to what any lane sees, which
    // may be nothing. Returns whether all lanes see all of it.
    bool find_visible(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t& begin, int64_t& end) {
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
        if (lowest > at)
            begin = (lowest - at) / SCORE_TILE * SCORE_TILE;  // tiles begin where they would without a window
        if (highest < at + end - 1) end = highest - at + 1;
        return whole && inner_first <= at + begin && inner_last >= at + end - 1;
    }

    // Turns scores into weights and updates tops and masses. Sets the factor by which earlier outputs must be
    // multiplied.
    void softmax_step(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens, int64_t head, bool whole,
                      vf* factor) {
        const int vectors = int(ceil_div(n, VL));
        // If scores are only scaled, the exponential does that.
        const bool scaled_only = !call.biased();
        if (!scaled_only) reshape_scores(seg, lane, n, at, tokens, head);
        if (!whole) apply_mask(seg, lane, n, at, tokens);
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

    // Computes the weights of a column of scores and adds them to `sum`. In fp32 tokens are added one by one, so that
    // the result does not depend on where segments end; such a sum loses more to rounding than a sum of tiles does, so
    // the loss is carried along (Kahan, 1965).
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

    // Applies scale, soft cap and ALiBi to the scores, in base 2.
    void reshape_scores(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens, int64_t head) {
        for (int64_t begin = 0; begin < n; begin += VL) {
            float slope[VL] = {}, distance[VL] = {};  // distance from the row to offset 0 of the node
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

    // Sets the scores of tokens that lanes do not see to -inf.
    void apply_mask(const Seg& seg, int64_t lane, int64_t n, int64_t at, int64_t tokens) {
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
            const int64_t end = row.last - at < tokens ? row.last - at + 1 : tokens;  // later tokens are masked already
            for (int64_t t = row.tail > at ? row.tail - at : 0; t < end; ++t) {
                const int64_t bit = at + t - row.tail;
                if (!(call.plan.mask[row.mask + bit / 32] >> bit % 32 & 1)) scores[t * BLOCK + i] = -INF;
            }
        }
    }

    // Adds the elements of V that are not finite, which are 0 in the tile, to the lanes that see them.
    void poison(const int32_t* slots, int64_t tokens, int64_t head, int64_t lane, int64_t n) {
        for (int64_t t = 0; t < tokens; ++t) {
            const char* from = tiles.v_at(slots[t], head_begin + head);
            for (int64_t d = 0; d < value_dim; ++d) {
                const float x = element(call.dtype, from, d);
                if (x - x == 0.0f) continue;
                float* to = outputs + (head * value_dim + d) * stride + lane;
                for (int64_t i = 0; i < n; ++i)
                    if (scores[t * BLOCK + i] != -INF) to[i] += x;
            }
        }
    }

    void store_results(int64_t head) {
        const int64_t num_heads = call.num_qo_heads;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t row = lane / group, qo_head = (head_begin + head) * group + lane % group;
            const float* column = outputs + head * value_dim * stride + lane;
            const float top = tops[head * stride + lane], mass = masses[head * stride + lane];
            if (item.partial < 0) {
                const int64_t to = rows[row].token * num_heads + qo_head;
                const float factor = store_lse(call, qo_head, top, mass, to);
                for (int64_t d = 0; d < value_dim; ++d) output[d] = column[d * stride] * factor;
                store_output(call, to, output);
            } else {
                const int64_t to = (item.partial + row) * num_heads + qo_head;
                call.partial_max[to] = top;
                call.partial_mass[to] = mass;
                for (int64_t d = 0; d < value_dim; ++d) call.partial_out[to * value_dim + d] = column[d * stride];
            }
        }
    }
};

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
