#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "fuzz/fuzz.h"

namespace pmc::fuzz {

uint64_t Random::bits() {  // SplitMix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
}

int64_t Random::between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % (static_cast<uint64_t>(high - low) + 1));
}

double Random::uniform() { return (static_cast<double>(bits() >> 12) + 0.5) * 0x1p-52; }

float Random::normal() {
    return static_cast<float>(std::sqrt(-2 * std::log(uniform())) * std::cos(6.283185307179586 * uniform()));
}

float Random::nan() {
    // A payload of the upper bits only is what bfloat16 has too.
    uint32_t word = static_cast<uint32_t>(bits()) | 0x7F800000;
    if (one_in(2)) word &= 0xFFFF0000;
    word |= one_in(2) ? 0x7FFFFFFF : 0x00010000;  // all ones: rounding to bfloat16 would carry out of them
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
}

int64_t Random::size() {
    switch (between(0, 3)) {
        case 0:
            return between(1, 20);
        case 1:
            return between(1, 8) * 16 + between(-1, 1);
        default:
            return between(1, 200);
    }
}

float Random::extreme() {
    const float magnitude = pick({0.0f, FLT_TRUE_MIN, FLT_MIN * 0.3f, FLT_MIN, 1e-20f, 1.0f, 80.0f, 1e4f, 1e19f, 1e30f,
                                  FLT_MAX / 2, FLT_MAX * static_cast<float>(uniform()), FLT_MAX});
    return one_in(2) ? magnitude : -magnitude;
}

void Case::fail(const char* format, ...) const {
    std::fprintf(stderr, "fuzz: %s on %s: ", kernel, isa.c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(stderr, format, arguments);
    va_end(arguments);
    std::fprintf(stderr, "; again: --seed %llu --case %lld\n", static_cast<unsigned long long>(seed),
                 static_cast<long long>(number));
    std::_Exit(1);
}

void Case::check_near(const char* what, int64_t row, int64_t column, double got, double want, double tolerance) const {
    if (std::abs(got - want) <= tolerance || got == want || (std::isnan(got) && std::isnan(want))) return;
    fail("%s [%lld, %lld] is %.9g, expected %.9g within %.3g", what, static_cast<long long>(row),
         static_cast<long long>(column), got, want, tolerance);
}

Numbers::Numbers(Dtype dtype, int64_t size, float value)
    : dtype_(dtype),
      wide_(dtype == Dtype::kFloat32 ? static_cast<size_t>(size) : 0),
      narrow_(dtype == Dtype::kFloat32 ? 0 : static_cast<size_t>(size)) {
    for (int64_t i = 0; i < size; ++i) set(i, value);
}

void Numbers::set(int64_t i, float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    if (dtype_ == Dtype::kFloat32)
        wide_[i] = value;
    else
        narrow_[i] = static_cast<uint16_t>(word >> 16);
}

void* Numbers::data() {
    return dtype_ == Dtype::kFloat32 ? static_cast<void*>(wide_.data()) : static_cast<void*>(narrow_.data());
}

bool Numbers::same_bits(const Numbers& other, int64_t i) const {
    if (dtype_ == Dtype::kFloat32) return !std::memcmp(&wide_[i], &other.wide_[i], sizeof(float));
    return narrow_[i] == other.narrow_[i];
}

bool Numbers::same_bits(const Numbers& other) const {
    if (dtype_ == Dtype::kBFloat16) return narrow_ == other.narrow_;
    return wide_.empty() || !std::memcmp(wide_.data(), other.wide_.data(), wide_.size() * sizeof(float));
}

double rounding(Dtype dtype) { return dtype == Dtype::kFloat32 ? 0 : 0x1p-8; }

}  // namespace pmc::fuzz
