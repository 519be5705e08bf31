// What a draw must be, by Philox in scalars, sorting, and sums in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "common/philox.h"
#include "fuzz/fuzz.h"

namespace pmc::fuzz {

// Sums of exponentials that were taken in float are this close, relative.
constexpr double kSumError = 3e-5;

inline float noise(uint64_t seed, int64_t sequence, int64_t position, int64_t token) {
    uint32_t c[4] = {static_cast<uint32_t>(token / 4), static_cast<uint32_t>(position), static_cast<uint32_t>(sequence),
                     0};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) {
        const uint64_t a = uint64_t{kPhiloxM0} * c[0], b = uint64_t{kPhiloxM1} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
        std::copy_n(next, 4, c);
    }
    return gumbel_from_word(c[token % 4]);
}

struct Options {
    float temperature;
    int64_t top_k;
    double top_p;
    float log_min_p;
    uint64_t seed;
    int64_t first_token = 0;  // the noise's token for token 0

    static Options random(Random& random, int64_t vocab) {
        Options o{random_temperature(random), 0, 1, -INFINITY, random.bits()};
        if (random.one_in(8)) o.temperature = 0;
        if (random.one_in(4)) return o;
        // Together as often as alone, and half the time with values that both keep and leave out a good part of a row.
        if (random.one_in(2))
            o.top_k =
                random.one_in(2)
                    ? random.between(1, std::min<int64_t>(vocab, 60))
                    : random.pick<int64_t>({1, 2, vocab - 1, vocab, vocab + 1, 1000000, random.between(1, vocab)});
        if (random.one_in(2))
            o.top_p = random.one_in(2)
                          ? random.uniform()
                          : random.pick({5e-324, 1e-9, 1e-3, 0.3, 0.9, 0.95, 1 - 1e-7, std::nextafter(1.0, 0.0)});
        if (random.one_in(2))
            o.log_min_p =
                std::log(random.one_in(2) ? random.uniform() : random.pick({5e-324, 1e-30, 1e-3, 0.1, 0.7, 1.0}));
        return o;
    }
};

// What a draw from one row must be. Tokens are ranked by probability, then by lower id. The first `surely` of them are
// kept and those from `perhaps` on are not; in between, rounding decides.
class ExpectedDraw {
  public:
    ExpectedDraw(const Logits& logits, int64_t row, const Options& options, int64_t sequence, int64_t position)
        : y_(logits.transformed(row)),
          error_(logits.error()),
          scaled_error_(error_ > 0 ? error_ / options.temperature + 3e-6 : 0),
          options_(options),
          usable_(fuzz::usable(y_, error_, options.temperature)) {
        if (usable_ == Usable::kNo) return;
        top_ = *std::max_element(y_.begin(), y_.end());
        if (options_.temperature == 0) return;
        const auto vocab = static_cast<int64_t>(y_.size());
        scaled_.resize(y_.size());
        score_.resize(y_.size());
        for (int64_t i = 0; i < vocab; ++i) {
            const float g = noise(options.seed, sequence, position, options.first_token + i);
            if (error_ > 0) {
                scaled_[i] = y_[i] / options.temperature;
                score_[i] = scaled_[i] + g;
            } else {  // as the kernels round
                const float scaled = static_cast<float>(y_[i]) / options.temperature;
                scaled_[i] = scaled;
                score_[i] = scaled + g;
            }
        }
        truncate();
    }

    Usable usable() const { return usable_; }

    void check(const Case& c, int64_t row, int64_t token, double logprob, double sampling_logprob,
               double kept_mass) const {
        if (token < 0 || token >= static_cast<int64_t>(y_.size()))
            c.fail("row %lld: token %lld is no token", static_cast<long long>(row), static_cast<long long>(token));
        check_log(c, "logprob", row, logprob, y_[token] - top_ - std::log(mass_of(y_, top_)), 2 * error_);
        if (options_.temperature == 0) {
            for (size_t i = 0; i < y_.size(); ++i)
                if (y_[i] > y_[token] + 2 * error_ || (error_ == 0 && y_[i] == y_[token] && int64_t(i) < token))
                    c.fail("row %lld: greedy token %lld, but %zu is better", static_cast<long long>(row),
                           static_cast<long long>(token), i);
            c.check_near("sampling_logprob", row, 0, sampling_logprob, 0, 0);
            c.check_near("kept_mass", row, 0, kept_mass, 1, 0);
            return;
        }
        if (rank_[token] >= perhaps_)
            c.fail("row %lld: token %lld of rank %lld is drawn, but at most %lld are kept", static_cast<long long>(row),
                   static_cast<long long>(token), static_cast<long long>(rank_[token]),
                   static_cast<long long>(perhaps_));
        for (int64_t i = 0; i < static_cast<int64_t>(y_.size()); ++i)
            if (rank_[i] < surely_ && (score_[i] > score_[token] + 2 * scaled_error_ ||
                                       (error_ == 0 && score_[i] == score_[token] && i < token)))
                c.fail("row %lld: token %lld is drawn, but %lld wins", static_cast<long long>(row),
                       static_cast<long long>(token), static_cast<long long>(i));
        // The masses in between leave a range; check_log takes its middle and half its width.
        const double low = std::log(std::max(surely_mass_, 1e-300)), high = std::log(perhaps_mass_);
        const double middle = (low + high) / 2, slack = (high - low) / 2 + 2 * scaled_error_;
        check_log(c, "sampling_logprob", row, sampling_logprob, scaled_[token] - scaled_top_ - middle, slack);
        check_log(c, "log kept_mass", row, std::log(kept_mass), middle - std::log(whole_mass_), slack);
        if (!(kept_mass <= 1)) c.fail("row %lld: kept_mass is %g", static_cast<long long>(row), kept_mass);
    }

  private:
    static double mass_of(const std::vector<double>& logits, double top) {
        double sum = 0;
        for (double logit : logits) sum += std::exp(logit - top);
        return sum;
    }

    static void check_log(const Case& c, const char* what, int64_t row, double got, double want, double slack) {
        c.check_near(what, row, 0, got, static_cast<float>(want), 2 * kSumError + 1e-6 * std::abs(want) + slack);
    }

    void truncate() {
        const auto vocab = static_cast<int64_t>(y_.size());
        std::vector<int64_t> order(y_.size());
        std::iota(order.begin(), order.end(), 0);
        const bool truncates =
            (options_.top_k > 0 && options_.top_k < vocab) || options_.top_p < 1 || options_.log_min_p > -INFINITY;
        if (truncates)
            std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
                return scaled_[a] > scaled_[b] || (scaled_[a] == scaled_[b] && a < b);
            });
        rank_.resize(y_.size());
        for (int64_t i = 0; i < vocab; ++i) rank_[order[i]] = i;
        const auto at = [&](int64_t rank) { return scaled_[order[rank]]; };
        scaled_top_ = *std::max_element(scaled_.begin(), scaled_.end());
        std::vector<double> mass(y_.size() + 1);  // of the first so many
        for (int64_t i = 0; i < vocab; ++i) mass[i + 1] = mass[i] + std::exp(at(i) - scaled_top_);

        int64_t count = options_.top_k > 0 ? std::min(options_.top_k, vocab) : vocab;
        surely_ = perhaps_ = count;
        if (options_.top_p < 1) {
            const double unsure = std::min(1.0, kSumError + std::expm1(2 * scaled_error_));
            const auto reaching = [&](double target) {
                int64_t n = 1;
                while (n < count && mass[n] < target) ++n;
                return n;
            };
            surely_ = reaching(options_.top_p * mass[count] * (1 - unsure));
            perhaps_ = reaching(options_.top_p * mass[count] * (1 + unsure));
        }
        if (options_.log_min_p > -INFINITY) {
            const double floor =
                error_ > 0 ? scaled_top_ + options_.log_min_p : static_cast<float>(scaled_top_) + options_.log_min_p;
            while (surely_ > 0 && at(surely_ - 1) < floor + 2 * scaled_error_) --surely_;
            while (perhaps_ > 0 && at(perhaps_ - 1) < floor - 2 * scaled_error_) --perhaps_;
        }
        if (error_ > 0 && surely_ < vocab) {  // ranks that rounding may exchange
            const double cut = at(surely_ > 0 ? surely_ - 1 : 0), last = at(perhaps_ - 1);
            while (surely_ > 0 && at(surely_ - 1) <= cut + 2 * scaled_error_) --surely_;
            while (perhaps_ < vocab && at(perhaps_) >= last - 2 * scaled_error_) ++perhaps_;
        }
        surely_mass_ = mass[surely_];
        perhaps_mass_ = mass[perhaps_];
        whole_mass_ = mass[vocab];
    }

    std::vector<double> y_;
    double error_, scaled_error_;
    Options options_;
    Usable usable_;
    double top_ = 0, scaled_top_ = 0;
    std::vector<double> scaled_, score_;
    std::vector<int64_t> rank_;
    int64_t surely_ = 0, perhaps_ = 0;
    double surely_mass_ = 0, perhaps_mass_ = 0, whole_mass_ = 0;
};

// A sequence or position.
inline int64_t counter(Random& random) {
    return random.pick<int64_t>({0, 1, UINT32_MAX, random.between(0, UINT32_MAX), random.between(0, UINT32_MAX)});
}

}  // namespace pmc::fuzz
