#include "cpu/score_tokens.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/memory.hpp"
#include "common/parallel.hpp"

namespace forktree {
namespace {

constexpr int64_t CHUNK = 8 * NOISE_TILE;  // tokens of a task
constexpr int64_t CANDIDATES = 384;        // most likely tokens kept of a row that truncates
constexpr int64_t MOST_ROWS = 64;          // rows that share one reading of lm_head
constexpr int64_t MOST_BYTES = 15 << 20;   // of scratch
constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

ScoringKernel kernel(Dtype dtype){FORKTREE_RETURN_OF_ISA(scoring_kernel(dtype))}

int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

bool better(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

// Sampling of a row; temperature 0 is greedy.
struct Setting {
    double temperature, top_k, top_p, min_p;

    Setting(const ScoreTokensParams& call, int64_t row)
        : temperature(call.settings[row]),
          top_k(call.settings[call.rows + row]),
          top_p(call.settings[2 * call.rows + row]),
          min_p(call.settings[3 * call.rows + row]) {}

    bool limits(int64_t vocab) const { return top_k > 0 && top_k < double(vocab); }
    bool truncates(int64_t vocab) const { return temperature > 0 && (limits(vocab) || top_p < 1 || min_p > 0); }
};

// ------------------------------------------------------------------ scratch

// Where everything lies, for passes over blocks of at most `rows` rows: the rows themselves, packed; then sums of
// chunks and what each thread works with, or bins and what each thread works with but its lists.
struct Room {
    int64_t rows, chunks, raw_keep, shaped_keep;
    int threads;
    int64_t packed, sums, scratch, lists, bins;  // bytes; scratch and lists of each thread

    static int64_t room(int64_t keep) { return keep ? keep + std::max<int64_t>(keep / 2, NOISE_TILE) : 0; }

    Room(const ScoreTokensParams& call, const ScoringKernel& kernel, int most_threads) : threads(most_threads) {
        bool truncates = false;
        for (int64_t row = 0; call.keys && row < call.rows; ++row)
            truncates |= Setting(call, row).truncates(call.vocab);
        const int64_t kept = truncates ? CANDIDATES : 0;
        const bool reordered = call.edit_indptr || call.allowed;  // shaped logits in another order than the model's
        raw_keep = std::max(call.top_k, reordered ? 0 : kept);
        shaped_keep = reordered ? kept : 0;
        chunks = ceil_div(call.vocab, CHUNK);
        const int64_t block = kernel.lane_block;
        rows = std::min(call.rows, MOST_ROWS);
        for (;;) {
            const int64_t lanes = ceil_div(rows, block) * block;
            packed = aligned(kernel.packed_bytes(call, lanes));
            sums = aligned(CHUNK_SUMS * chunks * lanes * 4);
            scratch = aligned(kernel.scratch_bytes(call, lanes));
            lists = aligned(rows * int64_t(sizeof(Candidate)) * (room(raw_keep) + room(shaped_keep)));
            bins = truncates ? rows * BINS * int64_t(sizeof(uint64_t)) : 0;
            if (bytes() <= MOST_BYTES || (rows == 1 && threads == 1)) break;
            if (rows > 1) rows = rows > block ? (rows - 1) / block * block : rows / 2;
            else --threads;
        }
    }

    int64_t bytes() const { return packed + std::max(sums + threads * (scratch + lists), bins + threads * scratch); }

private:
    static int64_t aligned(int64_t size) { return ceil_div(size, 64) * 64; }
};

// ------------------------------------------------------------------ a block of rows

// Sums over the vocabulary, relative to the highest: as ChunkSums.
struct Total {
    double max = -INF, sum = 0, weighted = 0;

    double lse() const { return max == -INF && sum == 0 ? -INF : max + std::log(sum); }
};

// What is known of the draw of a row before it is made.
struct Nucleus {
    float highest = 0;   // s
    double limit = 0;    // tokens that top-k leaves; 0: all
    double share = 1;    // top-p
    float least = -INF;  // threshold of min-p
};

class Block {
    const ScoreTokensParams& call;
    const ScoringKernel kernel;
    const Room& room;
    char* const memory;
    const std::vector<int32_t> rows;
    const int64_t n;
    ScoringPass pass{};
    std::vector<float> inverse, threshold, highest;
    std::vector<uint8_t> greedy, waits, by_count;
    std::vector<uint32_t> prefix, lowest;
    std::vector<std::vector<CandidateList>> raw, shaped;  // by worker and lane
    std::vector<std::vector<Lead>> leads;

public:
    Block(const ScoreTokensParams& call, const ScoringKernel& kernel, const Room& room, char* memory,
          std::vector<int32_t> which)
        : call(call), kernel(kernel), room(room), memory(memory), rows(std::move(which)), n(int64_t(rows.size())) {
        pass.call = &call;
        pass.rows = n;
        pass.lanes = ceil_div(n, kernel.lane_block) * kernel.lane_block;
        pass.row = rows.data();
        pass.packed = memory;
        leads.assign(room.threads, std::vector<Lead>(pass.lanes, Lead{-INF, -1, 0, 0}));
        if (!call.keys) return;
        inverse.assign(pass.lanes, 1.0f);
        greedy.assign(pass.lanes, 0);
        waits.assign(pass.lanes, 0);
        for (int64_t i = 0; i < n; ++i) {
            const Setting setting(call, rows[i]);
            greedy[i] = setting.temperature == 0;
            if (!greedy[i]) inverse[i] = float(1 / setting.temperature);
        }
        pass.inverse = inverse.data();
        pass.greedy = greedy.data();
        pass.waits = waits.data();
    }

    // The whole request for these rows. Returns those whose draw needs more passes, and what is known of it.
    void score(std::vector<int32_t>& later, std::vector<Nucleus>& nuclei) {
        if (call.keys)
            for (int64_t i = 0; i < n; ++i) waits[i] = Setting(call, rows[i]).truncates(call.vocab);
        pass.purpose = Purpose::score;
        make_lists();
        kernel.pack(pass);
        walk();
        std::vector<Candidate> best;
        for (int64_t i = 0; i < n; ++i) {
            const Total plain = total(i, 0), after = total(i, 3);
            const double lse = plain.lse();
            call.lse[rows[i]] = float(lse);
            if (call.entropy) call.entropy[rows[i]] = float(lse - plain.max - plain.weighted / plain.sum);
            gather(raw, i, best);
            write_top(rows[i], best);
            if (!call.keys) continue;
            if (!std::isfinite(lse) || !(after.sum > 0)) {
                write_none(rows[i]);
            } else if (!waits[i]) {
                write_draw(i, after.lse());
            } else {
                if (room.shaped_keep) gather(shaped, i, best);
                Nucleus nucleus;
                if (!draw_candidates(i, best, after, nucleus)) {
                    later.push_back(rows[i]);
                    nuclei.push_back(nucleus);
                }
            }
        }
    }

    // The draws that `score` could not make: a search of their thresholds, then one more pass.
    void draw(const std::vector<Nucleus>& nuclei) {
        kernel.pack(pass);
        threshold.assign(pass.lanes, INF);
        highest.assign(pass.lanes, 0.0f);
        lowest.assign(pass.lanes, 0);
        for (int64_t i = 0; i < n; ++i) {
            threshold[i] = -INF;
            highest[i] = nuclei[i].highest;
        }
        std::vector<double> targets(n, 0);
        for (int64_t i = 0; i < n; ++i) targets[i] = nuclei[i].limit;
        search(true, targets);
        for (int64_t i = 0; i < n; ++i) targets[i] = nuclei[i].share < 1 ? nuclei[i].share : 0;
        search(false, targets);
        for (int64_t i = 0; i < n; ++i) threshold[i] = std::max(threshold[i], nuclei[i].least);
        pass.threshold = threshold.data();
        pass.purpose = Purpose::draw;
        walk();
        for (int64_t i = 0; i < n; ++i) write_draw(i, total(i, 3).lse());
    }

private:
    // ---- passes

    float* sums(int64_t chunk, int64_t which) const {
        return reinterpret_cast<float*>(memory + room.packed) + (chunk * CHUNK_SUMS + which) * pass.lanes;
    }
    uint64_t* bins() const { return reinterpret_cast<uint64_t*>(memory + room.packed); }

    char* of_worker(int worker) const {
        const bool counts = pass.purpose == Purpose::count, lists = pass.purpose == Purpose::score;
        return memory + room.packed + (counts ? room.bins : room.sums) +
               worker * (room.scratch + (lists ? room.lists : 0));
    }

    void make_lists() {
        for (int worker = 0; worker < room.threads; ++worker) {
            Candidate* at = reinterpret_cast<Candidate*>(of_worker(worker) + room.scratch);
            const auto make = [&](std::vector<std::vector<CandidateList>>& lists, int64_t keep) {
                if (!keep) return;
                lists.emplace_back();
                for (int64_t i = 0; i < n; ++i, at += Room::room(keep))
                    lists.back().push_back({at, 0, keep, Room::room(keep), NOT_A_NUMBER});
            };
            make(raw, room.raw_keep);
            make(shaped, room.shaped_keep);
        }
    }

    void walk() {
        parallel_workers(room.chunks, room.threads, [&](int64_t chunk, int worker) {
            ScoringWorker own{of_worker(worker), raw.empty() ? nullptr : raw[worker].data(),
                              shaped.empty() ? nullptr : shaped[worker].data(), leads[worker].data()};
            const ChunkSums to{sums(chunk, 0), sums(chunk, 1), sums(chunk, 2), sums(chunk, 3), sums(chunk, 4)};
            kernel.walk(pass, chunk * CHUNK, std::min((chunk + 1) * CHUNK, call.vocab), to, own);
        });
    }

    // Of a lane over all chunks, in their order; first: 0 for logits as they are, 3 for shaped ones.
    Total total(int64_t lane, int64_t first) const {
        Total all;
        for (int64_t chunk = 0; chunk < room.chunks; ++chunk)
            all.max = std::max(all.max, double(sums(chunk, first)[lane]));
        for (int64_t chunk = 0; chunk < room.chunks; ++chunk) {
            const double sum = sums(chunk, first + 1)[lane], distance = sums(chunk, first)[lane] - all.max;
            if (sum == 0) continue;
            const double down = std::exp(distance);
            all.sum += sum * down;
            if (first == 0 && down > 0) all.weighted += (sums(chunk, 2)[lane] + sum * distance) * down;
        }
        return all;
    }

    // ---- lists

    // The best of a lane's lists, best first.
    static void gather(const std::vector<std::vector<CandidateList>>& lists, int64_t lane,
                       std::vector<Candidate>& best) {
        best.clear();
        for (const auto& of_worker : lists) {
            const CandidateList& list = of_worker[lane];
            best.insert(best.end(), list.items, list.items + list.size);
        }
        if (lists.empty()) return;
        const int64_t keep = std::min<int64_t>(lists[0][lane].keep, int64_t(best.size()));
        std::partial_sort(best.begin(), best.begin() + keep, best.end(), better);
        best.resize(size_t(keep));
    }

    void write_top(int64_t row, const std::vector<Candidate>& best) const {
        for (int64_t k = 0; k < call.top_k; ++k) {
            const bool found = k < int64_t(best.size());  // not where logits are NaN
            call.top_ids[row * call.top_k + k] = found ? best[k].id : 0;
            call.top_logits[row * call.top_k + k] = found ? best[k].value : NOT_A_NUMBER;
        }
    }

    // ---- draws

    void write(int64_t row, const Lead& lead, double log_prob) const {
        call.token[row] = lead.token;
        call.token_logit[row] = lead.logit;
        call.shaped_log_prob[row] = float(log_prob);
    }

    void write_none(int64_t row) const { write(row, {0, 0, 0, NOT_A_NUMBER}, NOT_A_NUMBER); }

    void write_draw(int64_t lane, double lse) const {
        Lead best{-INF, -1, 0, 0};
        for (const auto& of_worker : leads) {
            const Lead& lead = of_worker[lane];
            const bool first = lead.score == best.score && lead.token >= 0 && lead.token < best.token;
            if (lead.token >= 0 && (best.token < 0 || lead.score > best.score || first)) best = lead;
        }
        if (best.token < 0) return write_none(rows[lane]);
        write(rows[lane], best, greedy[lane] ? 0.0 : double(best.shaped) - lse);
    }

    // The draw from the best tokens alone, if it is known that no other is left.
    bool draw_candidates(int64_t lane, const std::vector<Candidate>& best, const Total& after, Nucleus& nucleus) {
        const Setting setting(call, rows[lane]);
        const int64_t count = int64_t(best.size());
        const float factor = room.shaped_keep ? 1.0f : inverse[lane];
        std::vector<float> s;
        for (const Candidate& candidate : best) s.push_back(candidate.value * factor);
        const bool all = count == call.vocab;
        const float last = s.back();
        nucleus.highest = s[0];
        nucleus.share = setting.top_p;
        if (setting.min_p > 0) nucleus.least = s[0] + float(std::log(setting.min_p));
        if (setting.limits(call.vocab)) nucleus.limit = setting.top_k;

        float threshold = -INF;
        bool known = true;  // whether the threshold is that of the whole vocabulary
        double mass = after.sum * std::exp(after.max - s[0]);
        if (nucleus.limit > 0) {
            known = nucleus.limit <= double(count);
            if (known) threshold = s[size_t(nucleus.limit) - 1];
            known = known && (all || threshold > last);
            mass = 0;
            for (const float x : s) mass += x >= threshold ? std::exp(double(x) - s[0]) : 0;
        }
        if (setting.top_p < 1) {
            double sum = 0;
            int64_t j = 0;
            while (j < count && sum < setting.top_p * mass) sum += std::exp(double(s[j++]) - s[0]);
            const bool reached = all || sum >= setting.top_p * mass;
            if (reached) threshold = std::max(threshold, s[std::max<int64_t>(j, 1) - 1]);
            known = known && reached;
        }
        if (nucleus.limit == 0 || setting.top_p == 1) known = known || nucleus.least > last;  // it is the highest
        threshold = std::max(threshold, nucleus.least);
        if (!known || !(all || threshold > last)) return false;

        std::vector<std::pair<int32_t, int64_t>> left;  // id, place among the best
        double sum = 0;
        for (int64_t j = 0; j < count; ++j) {
            if (!(s[j] >= threshold) || s[j] == -INF) continue;
            left.emplace_back(best[j].id, j);
            sum += std::exp(double(s[j]) - s[0]);
        }
        std::sort(left.begin(), left.end());
        Lead lead{-INF, -1, 0, 0};
        for (size_t begin = 0, end; begin < left.size(); begin = end) {
            const int64_t tile = left[begin].first / NOISE_TILE;
            float top = -INF, total = 0;
            for (end = begin; end < left.size() && left[end].first / NOISE_TILE == tile; ++end)
                top = std::max(top, s[left[end].second]);
            for (size_t i = begin; i < end; ++i) total += std::exp(s[left[i].second] - top);
            const uint64_t bits = mix64(call.keys[rows[lane]] ^ uint64_t(tile));
            const double exponential = -std::log1p(-(double(bits >> 32) + 0.5) * 0x1p-32);
            const float score = float(top + std::log(double(total)) - std::log(exponential));
            if (!(score > lead.score)) continue;
            const float aim = float(uint32_t(bits)) * 0x1p-32f * total;
            float below = 0;
            for (size_t i = begin; i < end; ++i) {
                const int64_t j = left[i].second;
                lead = {score, left[i].first, s[j], best[j].value};
                below += std::exp(s[j] - top);
                if (below > aim) break;
            }
        }
        // Edited logits are not the model's own: those are computed again.
        if (room.shaped_keep) lead.logit = logit(lane, lead.token);
        write(rows[lane], lead, double(lead.shaped) - s[0] - std::log(sum));
        return true;
    }

    // ---- thresholds

    // Raises each lane's threshold to the highest value that leaves `targets` tokens (by count), or that share of the
    // mass that is above the threshold so far. Target 0: that lane has no part in it.
    void search(bool count, std::vector<double>& targets) {
        if (std::all_of(targets.begin(), targets.end(), [](double x) { return x == 0; })) return;
        by_count.assign(pass.lanes, count);
        prefix.assign(pass.lanes, 0);
        for (int64_t i = 0; i < n; ++i) lowest[i] = targets[i] ? ordered_bits(threshold[i]) : 0xffffffffu;
        pass.purpose = Purpose::count;
        pass.highest = highest.data();
        pass.by_count = by_count.data();
        pass.prefix = prefix.data();
        pass.lowest = lowest.data();
        pass.bins = bins();
        for (pass.level = 0; pass.level < LEVELS; ++pass.level) {
            std::memset(bins(), 0, size_t(n * BINS) * sizeof(uint64_t));
            walk();
            const int above = pass.level ? SHIFTS[pass.level - 1] : 32;
            for (int64_t i = 0; i < n; ++i) {
                if (!targets[i]) continue;
                const uint64_t* own = bins() + i * BINS;
                if (pass.level == 0 && !count) {
                    double mass = 0;
                    for (int64_t b = 0; b < BINS; ++b) mass += double(own[b]);
                    targets[i] *= mass;
                }
                int64_t bin = (int64_t(1) << (above - SHIFTS[pass.level])) - 1, least = 0;
                while (least < bin && !own[least])
                    ++least;  // where it ends, should rounding leave the target unreached
                while (bin > least && targets[i] > double(own[bin])) targets[i] -= double(own[bin--]);
                prefix[i] = prefix[i] << (above - SHIFTS[pass.level]) | uint32_t(bin);
            }
        }
        for (int64_t i = 0; i < n; ++i)
            if (targets[i]) threshold[i] = std::max(threshold[i], ordered_float(prefix[i]));
    }

    float logit(int64_t lane, int64_t token) const {
        return with_dtype(int(call.dtype), [&](auto x) {
            using T = decltype(x);
            const T* a = static_cast<const T*>(call.hidden) + rows[lane] * call.row_stride;
            const T* b = static_cast<const T*>(call.lm_head) + token * call.hidden_size;
            double sum = 0;
            for (int64_t k = 0; k < call.hidden_size; ++k) sum += double(to_float(a[k])) * to_float(b[k]);
            const double z = (sum + (call.bias ? call.bias[token] : 0.0f)) * call.scale;
            return float(call.softcap ? call.softcap * std::tanh(z / call.softcap) : z);
        });
    }
};

int threads_for(const ScoreTokensParams& call, const ScoringKernel& kernel, int threads) {
    // A thread is worth calling for some 10 us of work.
    const int64_t vectors = ceil_div(std::min(call.rows, MOST_ROWS), kernel.lane_block);
    return int(std::clamp<int64_t>(call.vocab * call.hidden_size * vectors / 30000, 1,
                                   std::clamp<int64_t>(threads, 1, ceil_div(call.vocab, CHUNK))));
}

}  // namespace

void shrink(CandidateList& list) {
    std::nth_element(list.items, list.items + list.keep - 1, list.items + list.size, better);
    list.size = list.keep;
    list.floor = list.items[list.keep - 1].value;
}

int64_t score_tokens(const ScoreTokensParams& call, int threads) {
    if (call.vocab > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("lm_head must have fewer than 2^31 rows, got " + std::to_string(call.vocab));
    const ScoringKernel own = kernel(call.dtype);
    const Room room(call, own, threads_for(call, own, threads));
    static thread_local Memory memory;
    char* const scratch = memory.get(room.bytes());
    std::vector<int32_t> later;
    std::vector<Nucleus> nuclei;
    for (int64_t first = 0; first < call.rows; first += room.rows) {
        std::vector<int32_t> rows;
        for (int64_t row = first; row < std::min(first + room.rows, call.rows); ++row) rows.push_back(int32_t(row));
        Block(call, own, room, scratch, rows).score(later, nuclei);
    }
    for (size_t first = 0; first < later.size(); first += size_t(room.rows)) {
        const size_t last = std::min(first + size_t(room.rows), later.size());
        Block(call, own, room, scratch, {later.begin() + first, later.begin() + last})
            .draw({nuclei.begin() + first, nuclei.begin() + last});
    }
    return room.bytes();
}

}  // namespace forktree
