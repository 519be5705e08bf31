// Rows of logits of every kind that a kernel may meet.
#include <algorithm>
#include <cfloat>
#include <cmath>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {
namespace {

void fill_row(Random& random, Numbers* z, int64_t begin, int64_t vocab) {
    const auto fill = [&](const auto& value) {
        for (int64_t i = 0; i < vocab; ++i) z->set(begin + i, value(i));
    };
    const float spread = random.pick({0.01f, 1.0f, 4.0f, 30.0f, 1000.0f}), offset = random.pick({0.0f, -50.0f, 300.0f});
    const int64_t one = begin + random.between(0, vocab - 1);
    switch (random.between(0, 11)) {
        case 0: {  // all equal
            const float value = random.extreme();
            fill([&](int64_t) { return value; });
            break;
        }
        case 1:  // one token allowed, or far ahead
            fill([&, low = random.pick({-INFINITY, -100.0f, -FLT_MAX})](int64_t) { return low; });
            z->set(one, random.extreme());
            break;
        case 2:  // denormals
            fill([&](int64_t) { return random.normal() * FLT_MIN * 0.2f; });
            break;
        case 3:  // ties everywhere
            fill([&, levels = random.between(1, 3)](int64_t) {
                return offset + static_cast<float>(random.between(0, levels));
            });
            break;
        case 4:  // most tokens forbidden
            fill([&](int64_t) { return random.one_in(5) ? random.normal() * spread : -INFINITY; });
            z->set(one, 0);
            break;
        case 5:
        case 6:
            fill([&](int64_t) { return random.extreme(); });
            break;
        case 7:  // rising or falling
            fill([&, step = spread / 100 * random.pick({-1.0f, 1.0f})](int64_t i) {
                return offset + step * static_cast<float>(i);
            });
            break;
        default:
            fill([&](int64_t) { return offset + random.normal() * spread; });
            if (random.one_in(2)) z->set(one, offset + 6 * spread);
    }
    if (random.one_in(12)) z->set(one, random.one_in(3) ? INFINITY : random.nan());
    if (random.one_in(40)) fill([&](int64_t) { return -INFINITY; });
}

}  // namespace

Logits Logits::random(Random& random, int64_t long_row) {
    const int64_t rows = random.one_in(20) ? 0 : random.between(1, 4);
    int64_t vocab = random.size();
    if (random.one_in(10)) vocab = random.between(long_row + 1, long_row + 5000);
    if (random.one_in(300)) vocab = random.between(100000, 300000);
    const int64_t stride = vocab + (random.one_in(2) ? 0 : random.between(1, 70));
    HeadTransform head{1, 0};
    if (random.one_in(4)) head.logit_scale = random.pick({0.25f, -1.0f, 3.0f, 1e-30f, 1e30f});
    if (random.one_in(4)) head.softcap = random.pick({1.0f, 30.0f, 0.01f, 1e20f});
    Logits logits{rows, vocab, stride, head,
                  // The last row ends with the array: nothing may be read past it.
                  Numbers(random.one_in(2) ? Dtype::kFloat32 : Dtype::kBFloat16, rows ? (rows - 1) * stride + vocab : 0,
                          random.nan())};
    for (int64_t r = 0; r < rows; ++r) fill_row(random, &logits.z, r * stride, vocab);
    return logits;
}

std::vector<double> Logits::transformed(int64_t row) const {
    std::vector<double> y(static_cast<size_t>(vocab));
    for (int64_t i = 0; i < vocab; ++i) {
        const float biased = bias.empty() ? z.get(row * stride + i) : z.get(row * stride + i) + bias[i];
        const float scaled = biased * head.logit_scale;
        y[i] = scaled;
        if (head.softcap > 0) y[i] = head.softcap * std::tanh(y[i] / head.softcap);
    }
    return y;
}

Usable usable(const std::vector<double>& y, double error, float temperature) {
    for (double value : y)
        if (std::isnan(value)) return Usable::kNo;
    const double top = *std::max_element(y.begin(), y.end());
    if (!std::isfinite(top)) return Usable::kNo;
    if (temperature == 0) return Usable::kYes;
    if (error > 0 && std::abs(top) + error > 0.99 * FLT_MAX * temperature) return Usable::kUnsure;
    return std::isfinite(static_cast<float>(top) / temperature) ? Usable::kYes : Usable::kNo;
}

void check_first_bad(const Case& c, const std::vector<Usable>& rows, int64_t first_bad) {
    int64_t first_unusable = kAllRowsFinite;  // surely
    for (size_t r = rows.size(); r-- > 0;)
        if (rows[r] == Usable::kNo) first_unusable = static_cast<int64_t>(r);
    if (first_bad == first_unusable) return;
    const bool in_range = first_bad >= 0 && first_bad < static_cast<int64_t>(rows.size());
    const bool earlier = first_unusable == kAllRowsFinite || first_bad < first_unusable;
    if (in_range && earlier && rows[first_bad] == Usable::kUnsure) return;
    c.fail("returned row %lld as the first unusable one, expected %lld", static_cast<long long>(first_bad),
           static_cast<long long>(first_unusable));
}

float random_temperature(Random& random) {
    switch (random.between(0, 3)) {
        case 0:
            return 1;
        case 1:
            return random.pick({FLT_MIN, 1e-30f, 1e-4f, 1e4f, 1e30f, FLT_MAX});
        default:
            return 0.2f + 3 * static_cast<float>(random.uniform());
    }
}

}  // namespace pmc::fuzz
