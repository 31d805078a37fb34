// Scores of the next token for a block of rows: what is kept between its passes over lm_head.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/score_tokens/score_tokens.hpp"

namespace forktree {

constexpr int64_t VOCAB_TILE = 8 * NOISE_TILE;  // tokens of a task
constexpr float INF = std::numeric_limits<float>::infinity(), NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sampling of a row; temperature 0 is greedy.
struct SamplingSettings {
    double temperature, top_k, top_p, min_p;

    SamplingSettings(const ScoreTokensParams& call, int64_t row)
        : temperature(call.settings[row]),
          top_k(call.settings[call.rows + row]),
          top_p(call.settings[2 * call.rows + row]),
          min_p(call.settings[3 * call.rows + row]) {}

    bool has_top_k(int64_t vocab) const { return top_k > 0 && top_k < double(vocab); }
    bool truncates(int64_t vocab) const { return temperature > 0 && (has_top_k(vocab) || top_p < 1 || min_p > 0); }
};

// Sizes of the scratch memory, for passes over blocks of at most `rows` rows. It holds the packed rows; then either the
// sums of vocab tiles and each thread's memory with its lists, or the bins and each thread's memory without lists.
struct ScratchLayout {
    int64_t rows, vocab_tiles, raw_keep, shaped_keep;
    int threads;
    int64_t packed, sums, scratch, lists, bins;  // bytes; scratch and lists of each thread

    ScratchLayout(const ScoreTokensParams& call, const ScoringKernel& kernel, int max_threads);

    // Capacity of a list that keeps `keep`.
    static int64_t capacity(int64_t keep) { return keep ? keep + std::max<int64_t>(keep / 2, NOISE_TILE) : 0; }

    int64_t bytes() const { return packed + std::max(sums + threads * (scratch + lists), bins + threads * scratch); }
};

// Sums over the whole vocabulary, relative to the maximum, as VocabTileSums are.
struct Total {
    double max = -INF, sum = 0, weighted = 0;

    double lse() const { return max == -INF && sum == 0 ? -INF : max + std::log(sum); }
};

// How a row's tokens are truncated before one is sampled.
struct Truncation {
    float max_logit = 0;     // of shaped logits, as all here
    double top_k = 0;        // tokens that top-k leaves; 0: all
    double top_p = 1;        // share of the mass of those
    float min_logit = -INF;  // threshold of min-p
};

class RowBlock {
public:
    RowBlock(const ScoreTokensParams& call, const ScoringKernel& kernel, const ScratchLayout& layout, char* memory,
             std::vector<int32_t> rows);

    // The whole request for these rows. Adds rows that need more passes to be sampled to `unsettled`, and how they are
    // truncated to `truncations`.
    void score(std::vector<int32_t>& unsettled, std::vector<Truncation>& truncations);

    // Samples rows that `score` left unsettled: searches their thresholds, then makes one more pass.
    void sample(const std::vector<Truncation>& truncations);

private:
    const ScoreTokensParams& call;
    const ScoringKernel kernel;
    const ScratchLayout& layout;
    char* const memory;
    const std::vector<int32_t> rows;
    const int64_t n;
    ScoringPass pass{};
    std::vector<float> inverse, threshold, highest;
    std::vector<uint8_t> greedy, waits, by_count;
    std::vector<uint32_t> prefix, lowest;
    std::vector<std::vector<CandidateList>> raw, shaped;  // by thread and lane
    std::vector<std::vector<GumbelArgmax>> argmaxes;      // by thread and lane

    float* sums(int64_t vocab_tile, int64_t which) const {
        return reinterpret_cast<float*>(memory + layout.packed) + (vocab_tile * VOCAB_TILE_SUMS + which) * pass.lanes;
    }
    uint64_t* bins() const { return reinterpret_cast<uint64_t*>(memory + layout.packed); }
    char* memory_of(int worker) const;

    void make_lists();
    // Runs the pass over the whole vocabulary.
    void run();
    // Sums of a lane over all vocab tiles, in their order. first: 0 for logits as they are, 3 for shaped ones.
    Total total(int64_t lane, int64_t first) const;

    void write_top(int64_t row, const std::vector<Candidate>& best) const;
    void write(int64_t row, const GumbelArgmax& sampled, double log_prob) const;
    void write_none(int64_t row) const { write(row, {0, 0, 0, NOT_A_NUMBER}, NOT_A_NUMBER); }
    void write_sample(int64_t lane, double lse) const;

    // Samples from the best tokens alone; false if tokens below these may reach the threshold.
    bool sample_candidates(int64_t lane, const std::vector<Candidate>& best, const Total& after,
                           Truncation& truncation);
    // Raises each lane's threshold to the highest value that leaves `targets` tokens (by count), or that share of the
    // mass above the threshold so far. Lanes with target 0 are skipped.
    void raise_thresholds(bool count, std::vector<double>& targets);
    float logit(int64_t lane, int64_t token) const;
};

}  // namespace forktree
