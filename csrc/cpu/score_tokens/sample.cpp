// Sampling the next token of a block of rows, and its truncation by top-k, top-p and min-p.
#include <cstring>

#include "cpu/score_tokens/block.hpp"

namespace forktree {

void RowBlock::write(int64_t row, const GumbelArgmax& sampled, double log_prob) const {
    call.token[row] = sampled.token;
    call.token_logit[row] = sampled.logit;
    call.shaped_log_prob[row] = float(log_prob);
}

void RowBlock::write_sample(int64_t lane, double lse) const {
    GumbelArgmax best{-INF, -1, 0, 0};
    for (const auto& own : argmaxes) {
        const GumbelArgmax& argmax = own[lane];
        const bool first = argmax.score == best.score && argmax.token >= 0 && argmax.token < best.token;
        if (argmax.token >= 0 && (best.token < 0 || argmax.score > best.score || first)) best = argmax;
    }
    if (best.token < 0) return write_none(rows[lane]);
    write(rows[lane], best, greedy[lane] ? 0.0 : double(best.shaped) - lse);
}

bool RowBlock::sample_candidates(int64_t lane, const std::vector<Candidate>& best, const Total& after,
                                 Truncation& truncation) {
    const SamplingSettings settings(call, rows[lane]);
    const int64_t count = int64_t(best.size());
    const float factor = layout.shaped_keep ? 1.0f : inverse[lane];
    std::vector<float> s;
    for (const Candidate& candidate : best) s.push_back(candidate.value * factor);
    const bool all = count == call.vocab;
    const float last = s.back();
    truncation.max_logit = s[0];
    truncation.top_p = settings.top_p;
    if (settings.min_p > 0) truncation.min_logit = s[0] + float(std::log(settings.min_p));
    if (settings.has_top_k(call.vocab)) truncation.top_k = settings.top_k;

    float threshold = -INF;
    bool known = true;  // whether the threshold is that of the whole vocabulary
    double mass = after.sum * std::exp(after.max - s[0]);
    if (truncation.top_k > 0) {
        known = truncation.top_k <= double(count);
        if (known) threshold = s[size_t(truncation.top_k) - 1];
        known = known && (all || threshold > last);
        mass = 0;
        for (const float x : s) mass += x >= threshold ? std::exp(double(x) - s[0]) : 0;
    }
    if (settings.top_p < 1) {
        double sum = 0;
        int64_t j = 0;
        while (j < count && sum < settings.top_p * mass) sum += std::exp(double(s[j++]) - s[0]);
        const bool reached = all || sum >= settings.top_p * mass;
        if (reached) threshold = std::max(threshold, s[std::max<int64_t>(j, 1) - 1]);
        known = known && reached;
    }
    if (truncation.top_k == 0 || settings.top_p == 1)
        known = known || truncation.min_logit > last;  // min-p's is the highest threshold
    threshold = std::max(threshold, truncation.min_logit);
    if (!known || !(all || threshold > last)) return false;

    std::vector<std::pair<int32_t, int64_t>> left;  // id, place among the best
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) {
        if (!(s[j] >= threshold) || s[j] == -INF) continue;
        left.emplace_back(best[j].id, j);
        sum += std::exp(double(s[j]) - s[0]);
    }
    std::sort(left.begin(), left.end());
    GumbelArgmax argmax{-INF, -1, 0, 0};
    for (size_t begin = 0, end; begin < left.size(); begin = end) {
        const int64_t tile = left[begin].first / NOISE_TILE;
        float top = -INF, total = 0;
        for (end = begin; end < left.size() && left[end].first / NOISE_TILE == tile; ++end)
            top = std::max(top, s[left[end].second]);
        for (size_t i = begin; i < end; ++i) total += std::exp(s[left[i].second] - top);
        const uint64_t bits = mix64(call.keys[rows[lane]] ^ uint64_t(tile));
        const double exponential = -std::log1p(-(double(bits >> 32) + 0.5) * 0x1p-32);
        const float score = float(top + std::log(double(total)) - std::log(exponential));
        if (!(score > argmax.score)) continue;
        const float aim = float(uint32_t(bits)) * 0x1p-32f * total;
        float below = 0;
        for (size_t i = begin; i < end; ++i) {
            const int64_t j = left[i].second;
            argmax = {score, left[i].first, s[j], best[j].value};
            below += std::exp(s[j] - top);
            if (below > aim) break;
        }
    }
    // Edited logits are not the model's own: those are computed again.
    if (layout.shaped_keep) argmax.logit = logit(lane, argmax.token);
    write(rows[lane], argmax, double(argmax.shaped) - s[0] - std::log(sum));
    return true;
}

// ------------------------------------------------------------------ rows that the best tokens do not settle

void RowBlock::sample(const std::vector<Truncation>& truncations) {
    kernel.pack(pass);
    threshold.assign(pass.lanes, INF);
    highest.assign(pass.lanes, 0.0f);
    lowest.assign(pass.lanes, 0);
    for (int64_t i = 0; i < n; ++i) {
        threshold[i] = -INF;
        highest[i] = truncations[i].max_logit;
    }
    std::vector<double> targets(n, 0);
    for (int64_t i = 0; i < n; ++i) targets[i] = truncations[i].top_k;
    raise_thresholds(true, targets);
    for (int64_t i = 0; i < n; ++i) targets[i] = truncations[i].top_p < 1 ? truncations[i].top_p : 0;
    raise_thresholds(false, targets);
    for (int64_t i = 0; i < n; ++i) threshold[i] = std::max(threshold[i], truncations[i].min_logit);
    pass.threshold = threshold.data();
    pass.purpose = Purpose::sample;
    run();
    for (int64_t i = 0; i < n; ++i) write_sample(i, total(i, 3).lse());
}

void RowBlock::raise_thresholds(bool count, std::vector<double>& targets) {
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
        run();
        const int above = pass.level ? SHIFTS[pass.level - 1] : 32;
        for (int64_t i = 0; i < n; ++i) {
            if (!targets[i]) continue;
            const uint64_t* own = bins() + i * BINS;
            if (pass.level == 0 && !count) {
                double mass = 0;
                for (int64_t b = 0; b < BINS; ++b) mass += double(own[b]);
                targets[i] *= mass;
            }
            int64_t bin = (int64_t(1) << (above - SHIFTS[pass.level])) - 1, first = 0;
            while (first < bin && !own[first]) ++first;  // the result, if rounding leaves the target unreached
            while (bin > first && targets[i] > double(own[bin])) targets[i] -= double(own[bin--]);
            prefix[i] = prefix[i] << (above - SHIFTS[pass.level]) | uint32_t(bin);
        }
    }
    for (int64_t i = 0; i < n; ++i)
        if (targets[i]) threshold[i] = std::max(threshold[i], ordered_float(prefix[i]));
}

float RowBlock::logit(int64_t lane, int64_t token) const {
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

}  // namespace forktree
