// pack_weight and packed_linear, also of a weight as it is, against the product in double.
#include <cmath>
#include <limits>
#include <utility>

#include "common/host_device.h"
#include "fuzz/fuzz.h"

namespace pmc::fuzz {

void fuzz_packed_linear(Case& c) {
    constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
    Random& random = c.random;
    const int64_t rows = random.between(0, 30), outputs = random.one_in(2) ? random.between(1, 70) : random.size();
    const int64_t inputs = random.one_in(20) ? random.between(2040, 4200) : random.between(1, 40);
    const auto stride = [&](int64_t size) { return size + (random.one_in(2) ? 0 : random.between(1, 9)); };
    const int64_t x_stride = stride(inputs), w_stride = stride(inputs), y_stride = stride(outputs);
    const auto elements = [](int64_t count, int64_t stride, int64_t size) {
        return count ? (count - 1) * stride + size : 0;
    };
    const int threads = static_cast<int>(random.between(1, 2));

    Numbers x(Dtype::kFloat32, elements(rows, x_stride, inputs), kNaN);
    Numbers weight(random.one_in(2) ? Dtype::kFloat32 : Dtype::kBFloat16, elements(outputs, w_stride, inputs), kNaN);
    std::vector<float> bias(outputs);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < inputs; ++k) x.set(r * x_stride + k, random.normal());
    for (int64_t o = 0; o < outputs; ++o)
        for (int64_t k = 0; k < inputs; ++k) weight.set(o * w_stride + k, random.normal());
    for (float& b : bias) b = random.normal();
    const bool biased = random.one_in(2), accumulate = random.one_in(3);
    Numbers before(Dtype::kFloat32, elements(rows, y_stride, outputs), kNaN);
    if (accumulate)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t o = 0; o < outputs; ++o) before.set(r * y_stride + o, random.normal());
    if (rows && random.one_in(4))
        x.set(random.between(0, rows - 1) * x_stride + random.between(0, inputs - 1),
              random.pick({INFINITY, -INFINITY, random.nan()}));

    const bool rounded = weight.dtype() == Dtype::kBFloat16 && random.one_in(2);
    const auto input = [&](int64_t r, int64_t k) -> double {
        const float value = x.get(r * x_stride + k);
        return rounded && value == value ? widen(narrow(value)) : value;
    };

    std::vector<double> expected(rows * outputs), tolerance(rows * outputs);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t o = 0; o < outputs; ++o) {
            double sum = (biased ? bias[o] : 0.0) + (accumulate ? before.get(r * y_stride + o) : 0.0);
            double magnitude = std::abs(sum);
            for (int64_t k = 0; k < inputs; ++k) {
                const double product = input(r, k) * weight.get(o * w_stride + k);
                sum += product;
                magnitude += std::abs(product);
            }
            expected[r * outputs + o] = sum;
            tolerance[r * outputs + o] = 0x1p-23 * static_cast<double>(inputs + 2) * magnitude;
        }
    c.for_each_isa([&] {
        Numbers packed(weight.dtype(), kernels().packed_weight_elements(outputs, inputs, rounded), kNaN);
        kernels().pack_weight(
            {weight.data(), weight.dtype(), outputs, inputs, w_stride, packed.data(), rounded, threads});
        for (const auto& [of, row_stride] : {std::pair{packed.data(), kPacked}, {weight.data(), w_stride}}) {
            Numbers y = before;
            kernels().packed_linear({static_cast<const float*>(x.data()), rows, x_stride, of, weight.dtype(),
                                     row_stride, biased ? bias.data() : nullptr, outputs, inputs,
                                     static_cast<float*>(y.data()), y_stride, accumulate, rounded, threads});
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t o = 0; o < outputs; ++o)
                    c.check_near("y", r, o, y.get(r * y_stride + o), expected[r * outputs + o],
                                 tolerance[r * outputs + o]);
                for (int64_t at = r * y_stride + outputs; at < (r + 1) * y_stride && r + 1 < rows; ++at)
                    if (!y.same_bits(before, at)) c.fail("wrote past row %lld", static_cast<long long>(r));
            }
        }
    });
}

}  // namespace pmc::fuzz
