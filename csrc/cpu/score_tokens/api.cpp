// One call of score_tokens: blocks of rows, scratch, passes and lists.
#include <stdexcept>
#include <string>

#include "common/memory.hpp"
#include "common/parallel.hpp"
#include "cpu/score_tokens/block.hpp"

namespace forktree {
namespace {

constexpr int64_t MAX_CANDIDATES = 384;  // most likely tokens kept of a row that truncates
constexpr int64_t MAX_ROWS = 64;         // rows that share one reading of lm_head
constexpr int64_t MAX_SCRATCH_BYTES = 15 << 20;

ScoringKernel kernel(Dtype dtype) { FORKTREE_RETURN_OF_ISA(scoring_kernel(dtype)) }

bool better(const Candidate& a, const Candidate& b) { return a.value > b.value || (a.value == b.value && a.id < b.id); }

int64_t aligned(int64_t size) { return ceil_div(size, 64) * 64; }

// The best of a lane's lists, best first.
void gather(const std::vector<std::vector<CandidateList>>& lists, int64_t lane, std::vector<Candidate>& best) {
    best.clear();
    for (const auto& own : lists) {
        const CandidateList& list = own[lane];
        best.insert(best.end(), list.items, list.items + list.size);
    }
    if (lists.empty()) return;
    const int64_t keep = std::min<int64_t>(lists[0][lane].keep, int64_t(best.size()));
    std::partial_sort(best.begin(), best.begin() + keep, best.end(), better);
    best.resize(size_t(keep));
}

int threads_for(const ScoreTokensParams& call, const ScoringKernel& kernel, int threads) {
    // A thread is worth calling for some 10 us of work.
    const int64_t vectors = ceil_div(std::min(call.rows, MAX_ROWS), kernel.lane_block);
    return int(std::clamp<int64_t>(call.vocab * call.hidden_size * vectors / 30000, 1,
                                   std::clamp<int64_t>(threads, 1, ceil_div(call.vocab, VOCAB_TILE))));
}

}  // namespace

ScratchLayout::ScratchLayout(const ScoreTokensParams& call, const ScoringKernel& kernel, int max_threads)
    : threads(max_threads) {
    bool truncates = false;
    for (int64_t row = 0; call.keys && row < call.rows; ++row)
        truncates |= SamplingSettings(call, row).truncates(call.vocab);
    const int64_t kept = truncates ? MAX_CANDIDATES : 0;
    const bool reordered = call.edit_indptr || call.allowed;  // shaped logits in another order than the model's
    raw_keep = std::max(call.top_k, reordered ? 0 : kept);
    shaped_keep = reordered ? kept : 0;
    vocab_tiles = ceil_div(call.vocab, VOCAB_TILE);
    const int64_t block = kernel.lane_block;
    rows = std::min(call.rows, MAX_ROWS);
    for (;;) {
        const int64_t lanes = ceil_div(rows, block) * block;
        packed = aligned(kernel.packed_bytes(call, lanes));
        sums = aligned(VOCAB_TILE_SUMS * vocab_tiles * lanes * 4);
        scratch = aligned(kernel.scratch_bytes(call, lanes));
        lists = aligned(rows * int64_t(sizeof(Candidate)) * (capacity(raw_keep) + capacity(shaped_keep)));
        bins = truncates ? rows * BINS * int64_t(sizeof(uint64_t)) : 0;
        if (bytes() <= MAX_SCRATCH_BYTES || (rows == 1 && threads == 1)) break;
        if (rows > 1) rows = rows > block ? (rows - 1) / block * block : rows / 2;
        else --threads;
    }
}

// ------------------------------------------------------------------ a block of rows

RowBlock::RowBlock(const ScoreTokensParams& call, const ScoringKernel& kernel, const ScratchLayout& layout,
                   char* memory, std::vector<int32_t> rows)
    : call(call), kernel(kernel), layout(layout), memory(memory), rows(std::move(rows)), n(int64_t(this->rows.size())) {
    pass.call = &call;
    pass.rows = n;
    pass.lanes = ceil_div(n, kernel.lane_block) * kernel.lane_block;
    pass.row = this->rows.data();
    pass.packed = memory;
    argmaxes.assign(layout.threads, std::vector<GumbelArgmax>(pass.lanes, GumbelArgmax{-INF, -1, 0, 0}));
    if (!call.keys) return;
    inverse.assign(pass.lanes, 1.0f);
    greedy.assign(pass.lanes, 0);
    waits.assign(pass.lanes, 0);
    for (int64_t i = 0; i < n; ++i) {
        const SamplingSettings settings(call, this->rows[i]);
        greedy[i] = settings.temperature == 0;
        if (!greedy[i]) inverse[i] = float(1 / settings.temperature);
    }
    pass.inverse = inverse.data();
    pass.greedy = greedy.data();
    pass.waits = waits.data();
}

void RowBlock::score(std::vector<int32_t>& unsettled, std::vector<Truncation>& truncations) {
    if (call.keys)
        for (int64_t i = 0; i < n; ++i) waits[i] = SamplingSettings(call, rows[i]).truncates(call.vocab);
    pass.purpose = Purpose::score;
    make_lists();
    kernel.pack(pass);
    run();
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
            write_sample(i, after.lse());
        } else {
            if (layout.shaped_keep) gather(shaped, i, best);
            Truncation truncation;
            if (!sample_candidates(i, best, after, truncation)) {
                unsettled.push_back(rows[i]);
                truncations.push_back(truncation);
            }
        }
    }
}

char* RowBlock::memory_of(int worker) const {
    const bool counts = pass.purpose == Purpose::count, lists = pass.purpose == Purpose::score;
    return memory + layout.packed + (counts ? layout.bins : layout.sums) +
           worker * (layout.scratch + (lists ? layout.lists : 0));
}

void RowBlock::make_lists() {
    for (int worker = 0; worker < layout.threads; ++worker) {
        Candidate* at = reinterpret_cast<Candidate*>(memory_of(worker) + layout.scratch);
        const auto make = [&](std::vector<std::vector<CandidateList>>& lists, int64_t keep) {
            if (!keep) return;
            lists.emplace_back();
            for (int64_t i = 0; i < n; ++i, at += ScratchLayout::capacity(keep))
                lists.back().push_back({at, 0, keep, ScratchLayout::capacity(keep), NOT_A_NUMBER});
        };
        make(raw, layout.raw_keep);
        make(shaped, layout.shaped_keep);
    }
}

void RowBlock::run() {
    parallel_workers(layout.vocab_tiles, layout.threads, [&](int64_t vocab_tile, int worker) {
        ScoringWorker own{memory_of(worker), raw.empty() ? nullptr : raw[worker].data(),
                          shaped.empty() ? nullptr : shaped[worker].data(), argmaxes[worker].data()};
        const VocabTileSums to{sums(vocab_tile, 0), sums(vocab_tile, 1), sums(vocab_tile, 2), sums(vocab_tile, 3),
                               sums(vocab_tile, 4)};
        kernel.run(pass, vocab_tile * VOCAB_TILE, std::min((vocab_tile + 1) * VOCAB_TILE, call.vocab), to, own);
    });
}

Total RowBlock::total(int64_t lane, int64_t first) const {
    Total all;
    for (int64_t vocab_tile = 0; vocab_tile < layout.vocab_tiles; ++vocab_tile)
        all.max = std::max(all.max, double(sums(vocab_tile, first)[lane]));
    for (int64_t vocab_tile = 0; vocab_tile < layout.vocab_tiles; ++vocab_tile) {
        const double sum = sums(vocab_tile, first + 1)[lane], distance = sums(vocab_tile, first)[lane] - all.max;
        if (sum == 0) continue;
        const double down = std::exp(distance);
        all.sum += sum * down;
        if (first == 0 && down > 0) all.weighted += (sums(vocab_tile, 2)[lane] + sum * distance) * down;
    }
    return all;
}

void RowBlock::write_top(int64_t row, const std::vector<Candidate>& best) const {
    for (int64_t k = 0; k < call.top_k; ++k) {
        const bool found = k < int64_t(best.size());  // not where logits are NaN
        call.top_ids[row * call.top_k + k] = found ? best[k].id : 0;
        call.top_logits[row * call.top_k + k] = found ? best[k].value : NOT_A_NUMBER;
    }
}

// ------------------------------------------------------------------ lists and the call

void shrink(CandidateList& list) {
    std::nth_element(list.items, list.items + list.keep - 1, list.items + list.size, better);
    list.size = list.keep;
    list.floor = list.items[list.keep - 1].value;
}

int64_t score_tokens(const ScoreTokensParams& call, int threads) {
    if (call.vocab > std::numeric_limits<int32_t>::max())
        throw std::invalid_argument("lm_head must have fewer than 2^31 rows, got " + std::to_string(call.vocab));
    const ScoringKernel own = kernel(call.dtype);
    const ScratchLayout layout(call, own, threads_for(call, own, threads));
    static thread_local Memory memory;
    char* const scratch = memory.get(layout.bytes());
    std::vector<int32_t> unsettled;
    std::vector<Truncation> truncations;
    for (int64_t first = 0; first < call.rows; first += layout.rows) {
        std::vector<int32_t> rows;
        for (int64_t row = first; row < std::min(first + layout.rows, call.rows); ++row) rows.push_back(int32_t(row));
        RowBlock(call, own, layout, scratch, rows).score(unsettled, truncations);
    }
    for (size_t first = 0; first < unsettled.size(); first += size_t(layout.rows)) {
        const size_t last = std::min(first + size_t(layout.rows), unsettled.size());
        RowBlock(call, own, layout, scratch, {unsettled.begin() + first, unsettled.begin() + last})
            .sample({truncations.begin() + first, truncations.begin() + last});
    }
    return layout.bytes();
}

}  // namespace forktree
