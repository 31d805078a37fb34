// Scores of the next token on a CPU, compiled once for each instruction set.
//
// The lanes of a vector are rows of hidden states, and each element of lm_head is broadcast against them: logits of 64
// tokens are computed token by token, so that maxima, sums and samples work down the lanes. A lane's results depend
// neither on its neighbours nor on their number.
//
// lm_head streams from memory in order: a few of its rows are copied, widened if need be, to where the product reads
// them, while the next ones are prefetched.
#include "cpu/score_tokens/score_tokens.hpp"
#include "simd/elements.hpp"
#if defined(FORKTREE_TILES)
#include "simd/amx.hpp"
#endif

namespace forktree::FORKTREE_ISA {
namespace {

constexpr int64_t TILE = NOISE_TILE;  // tokens whose logits are held at a time
constexpr int STAGED = 16;            // rows of lm_head that are staged at a time
constexpr int64_t DEPTH = 128;        // terms of these rows; their sum is added to the logits
constexpr int64_t STRIDE = DEPTH + 16;
#if defined(__AVX512F__)
constexpr int SUMS = 16;  // vectors that are summed up at once, of 32 registers
#else
constexpr int SUMS = 8;  // of 16
#endif
constexpr float LOG2_E = 1.44269504f, INF = __builtin_inff();

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Element>
int64_t terms_of(const ScoreTokensParams& call) {
    return round_up(call.hidden_size, 16 * Element::TERMS) / Element::TERMS;  // whole tiles of AMX
}

// ------------------------------------------------------------------ the product

inline vi load_bytes(const char* from) {
    vi x;
    __builtin_memcpy(&x, from, sizeof x);
    return x;
}

// n elements as terms; those up to `terms` become 0.
inline void stage(const void* from, float* to, int64_t n, int64_t terms, Dtype dtype) {
    if (dtype == Dtype::fp32)
        for (int64_t i = 0; i < n; ++i) to[i] = static_cast<const float*>(from)[i];
    else widen(static_cast<const uint16_t*>(from), to, n, dtype);
    for (int64_t i = n; i < terms; ++i) to[i] = 0.0f;
}

inline void stage(const void* from, uint32_t* to, int64_t n, int64_t terms, Dtype) {
    const char* bytes = static_cast<const char*>(from);
    int64_t i = 0;
    for (; 2 * (i + VL) <= n; i += VL) store(reinterpret_cast<int32_t*>(to + i), load_bytes(bytes + 4 * i));
    for (; i < terms; ++i) {
        to[i] = 0;
        if (2 * i < n) __builtin_memcpy(to + i, bytes + 4 * i, 2 * i + 2 <= n ? 4 : 2);
    }
}

// What is read next is asked for a few lines at a time, while something else is computed.
struct Ahead {
    const char *at, *end;
    int64_t lines;  // to ask for in each step

    void step() {
        for (int64_t i = 0; i < lines && at < end; ++i, at += 64) __builtin_prefetch(at, 0, 2);
    }
};
constexpr int64_t STEP = 16;  // terms of a product between two steps

// logits[m, lane] (+)= sum over k of rows[m, k] * packed[k, lane], for M rows of lm_head and V vectors of lanes.
template <class Element, int M, int V>
inline void multiply(const typename Element::Term* rows, const typename Element::Term* packed, float* logits,
                     int64_t lanes, int64_t terms, bool first, Ahead& ahead) {
    vf sum[M][V];
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) sum[m][v] = vf{};
    for (int64_t begin = 0; begin < terms; begin += STEP) {  // terms: a multiple of it
        ahead.step();
        for (int64_t k = begin; k < begin + STEP; ++k)
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v)
                    sum[m][v] = Element::multiply_add(sum[m][v], rows[m * STRIDE + k], packed + k * lanes + v * VL);
    }
    for (int m = 0; m < M; ++m)
        for (int v = 0; v < V; ++v) {
            float* to = logits + m * lanes + v * VL;
            store(to, first ? sum[m][v] : load(to) + sum[m][v]);
        }
}

#if defined(__AVX512F__)
// The same for one vector of which half the lanes are in use. The other half of logits becomes 0.
template <class Element>
inline void multiply_half(const typename Element::Term* rows, const typename Element::Term* packed, float* logits,
                          int64_t lanes, int64_t terms, bool first, Ahead& ahead) {
    hf sum[STAGED];
    for (int m = 0; m < STAGED; ++m) sum[m] = hf{};
    for (int64_t begin = 0; begin < terms; begin += STEP) {
        ahead.step();
        for (int64_t k = begin; k < begin + STEP; ++k)
            for (int m = 0; m < STAGED; ++m)
                sum[m] = Element::multiply_add(sum[m], rows[m * STRIDE + k], packed + k * lanes);
    }
    for (int m = 0; m < STAGED; ++m) {
        float* to = logits + m * lanes;
        const vf more = (vf)_mm512_zextps256_ps512((__m256)sum[m]);
        store(to, first ? more : load(to) + more);
    }
}
#endif

template <class Element, int V>
inline void multiply_staged(const typename Element::Term* rows, const typename Element::Term* packed, float* logits,
                            int64_t lanes, int64_t terms, bool first, Ahead& ahead) {
#if defined(FORKTREE_TILES)
    if constexpr (Element::TERMS == 2) {
        if (first) {
            tile_zero<0>();
            if constexpr (V > 1) tile_zero<1>();
        } else {
            tile_load<0>(logits, 4 * lanes);
            if constexpr (V > 1) tile_load<1>(logits + VL, 4 * lanes);
        }
        for (int64_t k = 0; k < terms; k += 16) {
            ahead.step();
            tile_load<4>(rows + k, 4 * STRIDE);
            tile_load<5>(packed + k * lanes, 4 * lanes), tile_multiply_add<0, 4, 5>();
            if constexpr (V > 1) tile_load<5>(packed + k * lanes + VL, 4 * lanes), tile_multiply_add<1, 4, 5>();
        }
        tile_store<0>(logits, 4 * lanes);
        if constexpr (V > 1) tile_store<1>(logits + VL, 4 * lanes);
        return;
    }
#endif
    constexpr int M = SUMS / V;
    for (int64_t m = 0; m < STAGED; m += M)
        multiply<Element, M, V>(rows + m * STRIDE, packed, logits + m * lanes, lanes, terms, first, ahead);
}

// ------------------------------------------------------------------ sums down the lanes

inline vf exp(vf x) { return exp2(x * LOG2_E, vf{}); }

inline vf top_of(const float* x, int64_t n, int64_t lanes) {
    vf top = splat(-INF);
    for (int64_t j = 0; j < n; ++j) top = max(top, load(x + j * lanes));
    return top;
}

inline vf base_of(vf top) { return top == -INF ? vf{} : top; }  // -inf - -inf would be NaN

struct Sums {
    vf max, sum, weighted;  // sum of e^(x - max); of that times (x - max)
};

template <bool WEIGHTED>
inline Sums sums_of(const float* x, int64_t n, int64_t lanes, vf top) {
    const vf base = base_of(top);
    vf sum[4] = {}, weighted[4] = {};
    const auto take = [&](int64_t j, int i) {
        const vf y = load(x + j * lanes) - base, e = exp(y);
        sum[i] += e;
        if constexpr (WEIGHTED) weighted[i] += e == 0.0f ? vf{} : e * y;  // 0 * -inf
    };
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
        for (int i = 0; i < 4; ++i) take(j + i, i);
    for (; j < n; ++j) take(j, 0);
    return {top, (sum[0] + sum[1]) + (sum[2] + sum[3]), (weighted[0] + weighted[1]) + (weighted[2] + weighted[3])};
}

// The sums of both.
inline void add(float* max_to, float* sum_to, float* weighted_to, const Sums& more) {
    const vf max_from = load(max_to), sum_from = load(sum_to), top = max(max_from, more.max), base = base_of(top);
    const vf down = exp(max_from - base), down_more = exp(more.max - base);
    store(max_to, top);
    store(sum_to, sum_from * down + more.sum * down_more);
    if (!weighted_to) return;
    // a side that no longer counts may be infinitely far
    const vf shift = down == 0.0f ? vf{} : (load(weighted_to) + sum_from * (max_from - base)) * down;
    const vf shift_more = down_more == 0.0f ? vf{} : (more.weighted + more.sum * (more.max - base)) * down_more;
    store(weighted_to, shift + shift_more);
}

inline bool any(vi mask) {
    int32_t all = 0;
    for (int i = 0; i < VL; ++i) all |= mask[i];
    return all != 0;
}

// ------------------------------------------------------------------ a vocab tile

template <class Element>
class VocabPass {
    typedef typename Element::Term Term;

    const ScoringPass& pass;
    const ScoreTokensParams& call;
    const int64_t lanes, terms;
    const VocabTileSums& sums;
    ScoringWorker& worker;
    float* logits;    // [TILE, lanes]
    float* edited;    // [TILE, lanes], of one vector of lanes at a time: only its columns are used
    Term* staged;     // [STAGED, STRIDE]
    int32_t* cursor;  // [lanes] next edit
    Ahead ahead;

public:
    static int64_t bytes(int64_t lanes) { return 4 * (2 * TILE * lanes + STAGED * STRIDE + round_up(lanes, 16)); }

    VocabPass(const ScoringPass& pass, const VocabTileSums& sums, ScoringWorker& worker)
        : pass(pass),
          call(*pass.call),
          lanes(pass.lanes),
          terms(terms_of<Element>(call)),
          sums(sums),
          worker(worker),
          logits(reinterpret_cast<float*>(worker.scratch)),
          edited(logits + TILE * lanes),
          staged(reinterpret_cast<Term*>(edited + TILE * lanes)),
          cursor(reinterpret_cast<int32_t*>(staged + STAGED * STRIDE)) {}

    void run(int64_t begin, int64_t end) {
        for (int64_t lane = 0; lane < (pass.purpose == Purpose::count ? 0 : lanes); ++lane) {
            sums.max[lane] = sums.shaped_max[lane] = -INF;
            sums.sum[lane] = sums.weighted[lane] = sums.shaped_sum[lane] = 0.0f;
        }
        if (edits()) seek(begin);
        ahead = {head(begin), nullptr, 0};
        for (int64_t token = begin; token < end; token += TILE) {
            const int64_t n = end - token < TILE ? end - token : TILE;
            multiply_tile(token, n);
            for (int64_t lane = 0; lane < lanes; lane += VL) {
                finish(token, n, lane);
                if (pass.purpose == Purpose::score) score(token, n, lane);
                else if (pass.purpose == Purpose::sample) sample_left(token, n, lane);
                else count(token, n, lane);
            }
        }
    }

private:
    const char* head(int64_t token) const {
        return static_cast<const char*>(call.lm_head) + token * call.hidden_size * (call.dtype == Dtype::fp32 ? 4 : 2);
    }

    bool edits() const { return pass.inverse && call.edit_indptr; }
    bool shapes() const { return edits() || call.allowed; }

    // ---- logits

    void multiply_tile(int64_t token, int64_t n) {
        const Term* packed = static_cast<const Term*>(pass.packed);
        const int64_t pairs = lanes / (2 * VL), single = lanes / VL % 2;
        const int64_t steps = terms / STEP * (pairs * (STAGED * 2 / SUMS) + single * (STAGED / SUMS));
        const int64_t depth = DEPTH * Element::TERMS, item = call.dtype == Dtype::fp32 ? 4 : 2;
        for (int64_t row = 0; row < n; row += STAGED) {
            const int64_t real = n - row < STAGED ? n - row : STAGED;
            ahead.end = head(token + row + 2 * STAGED < call.vocab ? token + row + 2 * STAGED : call.vocab);
            ahead.lines = ((ahead.end - ahead.at) / 64 + steps) / steps;
            for (int64_t k = 0; k < terms; k += DEPTH) {
                const int64_t here = terms - k < DEPTH ? terms - k : DEPTH;
                const int64_t first = k * Element::TERMS;
                const int64_t left = call.hidden_size - first < depth ? call.hidden_size - first : depth;
                for (int64_t m = 0; m < STAGED; ++m) {
                    if (m < real)
                        stage(head(token + row + m) + first * item, staged + m * STRIDE, left, here, call.dtype);
                    else __builtin_memset(staged + m * STRIDE, 0, 4 * here);
                }
                for (int64_t lane = 0; lane < lanes;) {
                    const Term* right = packed + k * lanes + lane;
                    float* to = logits + row * lanes + lane;
#if defined(__AVX512F__) && !defined(FORKTREE_TILES)
                    if (pass.rows <= VL / 2) {
                        multiply_half<Element>(staged, right, to, lanes, here, k == 0, ahead);
                        break;
                    }
#endif
                    if (lane + 2 * VL <= lanes) {
                        multiply_staged<Element, 2>(staged, right, to, lanes, here, k == 0, ahead);
                        lane += 2 * VL;
                    } else {
                        multiply_staged<Element, 1>(staged, right, to, lanes, here, k == 0, ahead);
                        lane += VL;
                    }
                }
            }
        }
    }

    // Applies scale, bias and cap.
    void finish(int64_t token, int64_t n, int64_t lane) {
        if (call.scale == 1.0f && !call.bias && call.softcap == 0.0f) return;
        const float inverse_cap = call.softcap == 0.0f ? 0.0f : 1.0f / call.softcap;
        for (int64_t j = 0; j < n; ++j) {
            float* at = logits + j * lanes + lane;
            vf z = load(at);
            if (call.bias) z += call.bias[token + j];
            z *= call.scale;
            if (call.softcap != 0.0f) z = tanh(z * inverse_cap) * call.softcap;
            store(at, z);
        }
    }

    // ---- edits, mask, temperature

    // Moves the cursors to the first edits of tokens from `token` on.
    void seek(int64_t token) {
        for (int64_t lane = 0; lane < pass.rows; ++lane) {
            const int32_t row = pass.row[lane];
            int32_t low = call.edit_indptr[row], high = call.edit_indptr[row + 1];
            while (low < high) {
                const int32_t middle = low + (high - low) / 2;
                if (call.edit_ids[middle] < token) low = middle + 1;
                else high = middle;
            }
            cursor[lane] = low;
        }
    }

    // Shaped logits of a vector of lanes, [n, lanes] at the columns of that vector.
    const float* shape(int64_t token, int64_t n, int64_t lane) {
        const vf inverse = load(pass.inverse + lane);
        if (!shapes() && !any(inverse != 1.0f)) return logits + lane;
        float* to = edited + lane;
        for (int64_t j = 0; j < n; ++j) store(to + j * lanes, load(logits + lane + j * lanes));
        const int64_t real = pass.rows - lane < VL ? pass.rows - lane : VL;
        if (edits())
            for (int64_t i = 0; i < real; ++i) edit(token, n, lane + i, to + i);
        if (call.allowed) forbid(token, n, lane, real, to);
        for (int64_t j = 0; j < n; ++j) store(to + j * lanes, load(to + j * lanes) * inverse);
        return to;
    }

    void edit(int64_t token, int64_t n, int64_t lane, float* to) {
        const int32_t stop = call.edit_indptr[pass.row[lane] + 1];
        int32_t at = cursor[lane];
        for (; at < stop && call.edit_ids[at] < token + n; ++at) {
            if (call.edit_ids[at] < token) continue;  // not in ascending order
            float& z = to[(call.edit_ids[at] - token) * lanes];
            const float value = call.edit_values[at];
            if (call.edit_ops[at] == 0) z += value;
            else z = z > 0 ? z / value : z * value;
        }
        cursor[lane] = at;
    }

    void forbid(int64_t token, int64_t n, int64_t lane, int64_t real, float* to) {
        const int64_t words = (call.vocab + 31) / 32;
        for (int64_t first = 0; first < n; first += 32) {
            vi word{};
            for (int64_t i = 0; i < real; ++i)
                word[i] = call.allowed[pass.row[lane + i] * words + (token + first) / 32];
            for (int64_t j = first; j < n && j < first + 32; ++j, word = word >> 1)
                store(to + j * lanes, (word & 1) != 0 ? load(to + j * lanes) : splat(-INF));
        }
    }

    // ---- results

    void score(int64_t token, int64_t n, int64_t lane) {
        const float* z = logits + lane;
        const vf top = top_of(z, n, lanes);
        if (worker.raw) push(worker.raw, z, token, n, lane, top);
        const Sums plain = call.entropy ? sums_of<true>(z, n, lanes, top) : sums_of<false>(z, n, lanes, top);
        add(sums.max + lane, sums.sum + lane, call.entropy ? sums.weighted + lane : nullptr, plain);
        if (!pass.inverse) return;
        const float* s = shape(token, n, lane);
        if (s == z) {
            store(sums.shaped_max + lane, load(sums.max + lane));
            store(sums.shaped_sum + lane, load(sums.sum + lane));
            return sample(s, token, n, lane, plain);
        }
        const vf shaped_top = top_of(s, n, lanes);
        if (worker.shaped) push(worker.shaped, s, token, n, lane, shaped_top);
        const Sums shaped = sums_of<false>(s, n, lanes, shaped_top);
        add(sums.shaped_max + lane, sums.shaped_sum + lane, nullptr, shaped);
        sample(s, token, n, lane, shaped);
    }

    void push(CandidateList* lists, const float* x, int64_t token, int64_t n, int64_t lane, vf top) {
        vf floor;
        for (int i = 0; i < VL; ++i) floor[i] = lane + i < pass.rows ? lists[lane + i].floor : INF;
        const vi passed = ~(top <= floor);  // a NaN floor is below all values
        if (!any(passed)) return;
        for (int i = 0; i < VL && lane + i < pass.rows; ++i) {
            if (!passed[i]) continue;
            CandidateList& list = lists[lane + i];
            for (int64_t j = 0; j < n; ++j) {
                const float value = x[j * lanes + i];
                if (value <= list.floor || value != value) continue;
                if (list.size == list.capacity) {
                    shrink(list);
                    if (value <= list.floor) continue;
                }
                list.items[list.size++] = {value, int32_t(token + j)};
            }
        }
    }

    // Updates each lane's Gumbel argmax by a tile.
    void sample(const float* s, int64_t token, int64_t n, int64_t lane, const Sums& tile) {
        alignas(64) float exponential[VL];
        uint32_t low[VL];
        noise(token / TILE, lane, exponential, low);
        vf best, greedy;
        for (int i = 0; i < VL; ++i) {
            const bool real = lane + i < pass.rows;
            best[i] = real && !pass.waits[lane + i] ? worker.argmax[lane + i].score : INF;
            greedy[i] = real ? pass.greedy[lane + i] : 0.0f;
        }
        const vf mass = base_of(tile.max) + log(tile.sum) - log(load(exponential));
        vf score = greedy != 0.0f ? tile.max : mass;
        score = tile.max == -INF ? splat(-INF) : score;
        const vi wins = score > best;
        if (!any(wins)) return;
        alignas(64) float weights[TILE * VL];
        const vf base = base_of(tile.max);
        for (int64_t j = 0; j < n; ++j) store(weights + j * VL, exp(load(s + j * lanes) - base));
        for (int i = 0; i < VL; ++i) {
            if (!wins[i]) continue;
            int64_t at = 0;
            if (greedy[i] != 0.0f) {
                while (s[at * lanes + i] != tile.max[i]) ++at;
            } else {
                float total = 0.0f, below = 0.0f;
                for (int64_t j = 0; j < n; ++j) total += weights[j * VL + i];
                const float aim = float(low[i]) * 0x1p-32f * total;
                for (int64_t j = 0; j < n; ++j) {
                    const float weight = weights[j * VL + i];
                    if (weight > 0.0f) at = j;  // the last token with any, in case rounding leaves the aim unreached
                    below += weight;
                    if (weight > 0.0f && below > aim) break;
                }
            }
            worker.argmax[lane + i] = {score[i], int32_t(token + at), s[at * lanes + i], logits[at * lanes + lane + i]};
        }
    }

    // E = -log1p(-v), as accurate for small v as for large: 2 atanh(v / (2 - v)), or the log of 1 - v.
    void noise(int64_t tile, int64_t lane, float* exponential, uint32_t* low) const {
        vf v{}, rest = splat(1.0f);
        for (int i = 0; i < VL; ++i) {
            low[i] = 0;
            if (lane + i >= pass.rows) continue;
            const uint64_t bits = mix64(call.keys[pass.row[lane + i]] ^ uint64_t(tile));
            const uint32_t high = uint32_t(bits >> 32);
            low[i] = uint32_t(bits);
            v[i] = float((double(high) + 0.5) * 0x1p-32);
            rest[i] = float((double(~high) + 0.5) * 0x1p-32);
        }
        const vf y = v / (2.0f - v), z = y * y;
        vf p = splat(1.0f / 17);
        for (int d = 15; d > 0; d -= 2) p = p * z + 1.0f / float(d);
        store(exponential, v < 0.5f ? 2.0f * y * p : -log(rest));
    }

    // ---- rows that need another pass

    void sample_left(int64_t token, int64_t n, int64_t lane) {
        const float* s = shape(token, n, lane);
        const vf threshold = load(pass.threshold + lane);
        float* left = edited + lane;
        for (int64_t j = 0; j < n; ++j) {
            const vf x = load(s + j * lanes);
            store(left + j * lanes, x >= threshold ? x : splat(-INF));
        }
        const Sums tile = sums_of<false>(left, n, lanes, top_of(left, n, lanes));
        add(sums.shaped_max + lane, sums.shaped_sum + lane, nullptr, tile);
        sample(left, token, n, lane, tile);
    }

    void count(int64_t token, int64_t n, int64_t lane) {
        const float* s = shape(token, n, lane);
        const vf highest = load(pass.highest + lane);
        const int shift = SHIFTS[pass.level], above = pass.level ? SHIFTS[pass.level - 1] : 32;
        const uint32_t digit = (1u << (above - shift)) - 1;
        for (int64_t j = 0; j < n; ++j) {
            const vf x = load(s + j * lanes), mass = exp(x - highest) * 0x1p40f;
            for (int i = 0; i < VL && lane + i < pass.rows; ++i) {
                const uint32_t bits = ordered_bits(x[i]);
                if (bits < pass.lowest[lane + i] || (pass.level && bits >> above != pass.prefix[lane + i])) continue;
                const uint64_t amount = pass.by_count[lane + i] ? 1 : uint64_t(mass[i]);
                __atomic_fetch_add(&pass.bins[(lane + i) * BINS + (bits >> shift & digit)], amount, __ATOMIC_RELAXED);
            }
        }
    }
};

// ------------------------------------------------------------------ entry points

inline float number(const void* from, int64_t i, Dtype dtype) {
    if (dtype == Dtype::fp32) return static_cast<const float*>(from)[i];
    if (dtype == Dtype::bf16) return to_float(static_cast<const Bf16*>(from)[i]);
    return to_float(static_cast<const Fp16*>(from)[i]);
}

inline float term(const void* from, int64_t k, int64_t size, Dtype dtype, float*) {
    return k < size ? number(from, k, dtype) : 0.0f;
}

inline uint32_t term(const void* from, int64_t k, int64_t size, Dtype, uint32_t*) {
    uint16_t half[2] = {};
    const int64_t left = size - 2 * k;
    if (left > 0) __builtin_memcpy(half, static_cast<const char*>(from) + 4 * k, left > 1 ? 4 : 2);
    return half[0] | uint32_t(half[1]) << 16;
}

template <class Element>
void pack(const ScoringPass& pass) {
    typedef typename Element::Term Term;
    const ScoreTokensParams& call = *pass.call;
    Term* packed = static_cast<Term*>(pass.packed);
    const int64_t terms = terms_of<Element>(call), item = call.dtype == Dtype::fp32 ? 4 : 2;
    for (int64_t lane = 0; lane < pass.lanes; ++lane) {
        const char* from = static_cast<const char*>(call.hidden);
        if (lane < pass.rows) from += pass.row[lane] * call.row_stride * item;
        for (int64_t k = 0; k < terms; ++k)
            packed[k * pass.lanes + lane] =
                lane < pass.rows ? term(from, k, call.hidden_size, call.dtype, static_cast<Term*>(nullptr)) : Term(0);
    }
}

template <class Element>
int64_t packed_bytes(const ScoreTokensParams& call, int64_t lanes) {
    return 4 * terms_of<Element>(call) * lanes;
}

template <class Element>
int64_t scratch_bytes(const ScoreTokensParams&, int64_t lanes) {
    return VocabPass<Element>::bytes(lanes);
}

template <class Element>
void run(const ScoringPass& pass, int64_t begin, int64_t end, const VocabTileSums& sums, ScoringWorker& worker) {
#if defined(FORKTREE_TILES)
    tiles_begin();
#endif
    VocabPass<Element>(pass, sums, worker).run(begin, end);
#if defined(FORKTREE_TILES)
    tiles_end();
#endif
}

template <class Element>
ScoringKernel kernel_of() {
    return {VL, packed_bytes<Element>, scratch_bytes<Element>, pack<Element>, run<Element>};
}

}  // namespace

ScoringKernel scoring_kernel(Dtype dtype) {
#if defined(__AVX512BF16__)
    if (dtype == Dtype::bf16) return kernel_of<Pair>();
#endif
    (void)dtype;
    return kernel_of<Single>();
}

}  // namespace forktree::FORKTREE_ISA
