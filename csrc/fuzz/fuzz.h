// What the fuzzers of the kernels share: a case with its random numbers, arrays that end where the kernels are told
// that they end, and how a check fails.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace pmc::fuzz {

class Random {
  public:
    explicit Random(uint64_t seed) : state_(seed) {}

    uint64_t bits();
    int64_t between(int64_t low, int64_t high);  // both included
    bool one_in(int64_t n) { return between(1, n) == 1; }
    double uniform();  // in (0, 1)
    float normal();
    float nan();      // of any sign and payload
    int64_t size();   // at least 1; mostly around multiples of the vectors' lanes
    float extreme();  // finite: 0, a denormal, a huge number, ...

    template <class T>
    T pick(std::initializer_list<T> values) {
        return values.begin()[between(0, static_cast<int64_t>(values.size()) - 1)];
    }

  private:
    uint64_t state_;
};

struct Case {
    const char* kernel;
    uint64_t seed;
    int64_t number;
    Random random;
    std::string isa = "any";  // the instruction set in use

    // Prints what went wrong and how to run this case again, and ends the program.
    [[noreturn]] __attribute__((format(printf, 2, 3))) void fail(const char* format, ...) const;

    // |got - want| <= tolerance, or the same infinity, or both NaN.
    void check_near(const char* what, int64_t row, int64_t column, double got, double want, double tolerance) const;

    // Calls body once with every usable instruction set.
    template <class Body>
    void for_each_isa(const Body& body) {
        for (const std::string& name : usable_instruction_sets()) {
            use_instruction_set(isa = name);
            body();
        }
    }
};

// An array of either dtype. It takes up exactly its size on the heap, so that AddressSanitizer sees what reaches past
// it.
class Numbers {
  public:
    Numbers(Dtype dtype, int64_t size, float value);

    Dtype dtype() const { return dtype_; }
    int64_t size() const { return static_cast<int64_t>(dtype_ == Dtype::kFloat32 ? wide_.size() : narrow_.size()); }
    float get(int64_t i) const {
        if (dtype_ == Dtype::kFloat32) return wide_[i];
        const uint32_t word = static_cast<uint32_t>(narrow_[i]) << 16;
        float value;
        std::memcpy(&value, &word, sizeof value);
        return value;
    }
    void set(int64_t i, float value);  // bfloat16: towards 0
    void* data();
    bool same_bits(const Numbers& other, int64_t i) const;
    bool same_bits(const Numbers& other) const;  // all of them

  private:
    Dtype dtype_;
    std::vector<float> wide_;
    std::vector<uint16_t> narrow_;
};

// Half the spacing of bfloat16's numbers, relative; 0 for float32, whose own rounding the tolerances allow for.
double rounding(Dtype dtype);

// Rows of logits and the head that they go through.
struct Logits {
    int64_t rows, vocab, stride;
    HeadTransform head;
    Numbers z;
    std::vector<float> bias = {};  // [vocab], added to z first, or empty

    // At least one row in ten is longer than `long_row`.
    static Logits random(Random& random, int64_t long_row = 0);

    // The logits of a row after the head's transform: to the bit without a softcap, else within error().
    std::vector<double> transformed(int64_t row) const;
    double error() const { return head.softcap * 1e-6; }
};

enum class Usable { kYes, kNo, kUnsure };

// Whether a kernel must take a row of transformed logits at this temperature (0: greedy).
Usable usable(const std::vector<double>& y, double error, float temperature);

// Checks which row a kernel has called unusable; rows it was unsure of may be.
void check_first_bad(const Case& c, const std::vector<Usable>& rows, int64_t first_bad);

float random_temperature(Random& random);

void fuzz_sample(Case& c);
void fuzz_gumbel(Case& c);
void fuzz_cross_entropy(Case& c);
void fuzz_linear_logprob(Case& c);
void fuzz_decode_attention(Case& c);
void fuzz_decoder(Case& c);
void fuzz_packed_attention(Case& c);
void fuzz_packed_linear(Case& c);
void fuzz_elementwise(Case& c);
void fuzz_rouge_l_recall(Case& c);
void fuzz_cuda_sample(Case& c);

}  // namespace pmc::fuzz
