// Scores of the next token, from one reading of lm_head; no row of logits is kept. What a call and its passes are.
#pragma once

#include <cstdint>

#include "common/numeric.hpp"
#include "isa_dispatch.hpp"
#include "params.h"

namespace forktree {

constexpr int64_t NOISE_TILE = 64;  // tokens whose mass shares one Gumbel number: TILE in forktree.ops.sampling

struct Candidate {
    float value;
    int32_t id;
};

// The `keep` largest values that were pushed; among equal ones the lower ids, if ids are pushed in ascending order.
struct CandidateList {
    Candidate* items;
    int64_t size, keep, capacity;  // capacity: of items, at least keep + 1
    float floor;                   // only larger values are wanted; NaN: all
};

// Keeps only the `keep` largest and raises the floor.
void shrink(CandidateList& list);

// The best tile of a row so far, by the Gumbel trick, and the token sampled from it.
struct GumbelArgmax {
    float score;    // log-mass of the tile plus Gumbel noise; greedy: the highest logit
    int32_t token;  // -1: none
    float shaped, logit;
};

// Radix search of a threshold: bins count the tokens, or the mass, by the value of one digit of their shaped logits.
constexpr int LEVELS = 3;  // digits of the 32 bits of an ordered float, highest first
constexpr int SHIFTS[LEVELS] = {21, 10, 0};
constexpr int64_t BINS = 2048;

enum class Purpose {
    score,   // everything
    sample,  // sampling alone, among tokens that reach their row's threshold
    count,   // bins of one digit, among tokens that share the digits above
};

// One pass over lm_head for a few rows. Arrays are by lane: row `row[lane]` of the call.
struct ScoringPass {
    const ScoreTokensParams* call;
    Purpose purpose;
    int64_t rows, lanes;     // lanes: rows, rounded up to whole vectors
    const int32_t* row;      // [rows]
    void* packed;            // the rows of hidden, transposed
    const float* inverse;    // [lanes] 1 / temperature; 1 where greedy. Null: nothing is sampled
    const uint8_t* greedy;   // [lanes]
    const uint8_t* waits;    // [lanes] whether sampling is left to a later pass
    const float* threshold;  // [lanes], for Purpose::sample
    // For Purpose::count:
    int level;
    const float* highest;     // [lanes] s
    const uint8_t* by_count;  // [lanes] 1: counts tokens; 0: adds up their mass e^(s - highest), in units of 2^-40
    const uint32_t* prefix;   // [lanes] digits above
    const uint32_t* lowest;   // [lanes] ordered bits; lower tokens are skipped
    uint64_t* bins;           // [rows, BINS], filled by all threads
};

// Sums of a vocab tile, by lane.
struct VocabTileSums {
    float *max, *sum, *weighted;     // logits as they are: sum of e^(z - max), of that times (z - max)
    float *shaped_max, *shaped_sum;  // after edits, mask and temperature
};
constexpr int64_t VOCAB_TILE_SUMS = 5;

// Memory of one thread.
struct ScoringWorker {
    char* scratch;
    CandidateList* raw;     // [rows] or null
    CandidateList* shaped;  // [rows] or null
    GumbelArgmax* argmax;   // [lanes]
};

// The part that is compiled once for each instruction set.
struct ScoringKernel {
    int64_t lane_block;  // lanes are a multiple of this
    int64_t (*packed_bytes)(const ScoreTokensParams&, int64_t lanes);
    int64_t (*scratch_bytes)(const ScoreTokensParams&, int64_t lanes);  // of a worker
    void (*pack)(const ScoringPass&);
    // Tokens [begin, end), begin a multiple of NOISE_TILE.
    void (*run)(const ScoringPass&, int64_t begin, int64_t end, const VocabTileSums&, ScoringWorker&);
};

FORKTREE_FOR_EACH_ISA(ScoringKernel scoring_kernel(Dtype dtype);)

// The whole operation. Returns the bytes of scratch that it took. Throws std::invalid_argument or std::bad_alloc before
// anything is written.
int64_t score_tokens(const ScoreTokensParams& call, int threads);

// Random bits of a row and tile: see `noise` in forktree.ops.sampling.
FORKTREE_INLINE uint64_t mix64(uint64_t z) {
    z += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

// Bits that are ordered as the floats are; -0 counts as 0.
FORKTREE_INLINE uint32_t ordered_bits(float x) {
    const uint32_t bits = float_bits(x + 0.0f);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

FORKTREE_INLINE float ordered_float(uint32_t bits) {
    return bits_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}

}  // namespace forktree
