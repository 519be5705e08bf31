// Runs the kernels on random and adversarial inputs, under the sanitizers it is built with (CMake: -DPMC_FAST_FUZZ=ON),
// and holds their results against plain computations in double precision.
#include "fuzz/fuzz.h"

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Defaults for ASAN_OPTIONS and UBSAN_OPTIONS: a finding aborts, and report_case says where that was. Leaks are not
// looked for: the kernels allocate nothing, and the search fails in a container that forbids ptrace, and in a debugger.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
    return "abort_on_error=1:handle_abort=0:detect_leaks=0";
}
extern "C" __attribute__((visibility("default"))) const char* __ubsan_default_options() {
    return "abort_on_error=1:handle_abort=0:print_stacktrace=1";
}

namespace {

using pmc::fuzz::Case;

struct Fuzzer {
    const char* kernel;
    void (*run)(Case&);
    int64_t cases = 0;
};

Fuzzer fuzzers[] = {
    {"sample", pmc::fuzz::fuzz_sample},
    {"cross_entropy", pmc::fuzz::fuzz_cross_entropy},
    {"linear_logprob", pmc::fuzz::fuzz_linear_logprob},
    {"decode_attention", pmc::fuzz::fuzz_decode_attention},
    {"decoder", pmc::fuzz::fuzz_decoder},
    {"packed_attention", pmc::fuzz::fuzz_packed_attention},
    {"packed_linear", pmc::fuzz::fuzz_packed_linear},
    {"elementwise", pmc::fuzz::fuzz_elementwise},
    {"gumbel", pmc::fuzz::fuzz_gumbel},
    {"rouge_l_recall", pmc::fuzz::fuzz_rouge_l_recall},
    {"cuda_sample", pmc::fuzz::fuzz_cuda_sample},
};
constexpr int64_t kFuzzers = sizeof fuzzers / sizeof *fuzzers;

bool is_kernel(const char* name) {
    for (const Fuzzer& fuzzer : fuzzers)
        if (!std::strcmp(name, fuzzer.kernel)) return true;
    return false;
}

const Case* running = nullptr;

void report_case(int signal) {
    char line[200];
    const int size = std::snprintf(
        line, sizeof line, "fuzz: died in %s on %s; again: --seed %llu --case %lld\n", running->kernel,
        running->isa.c_str(), static_cast<unsigned long long>(running->seed), static_cast<long long>(running->number));
    if (write(STDERR_FILENO, line, static_cast<size_t>(size)) < 0) _exit(2);
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

void run(uint64_t seed, int64_t number, const char* kernel) {
    Fuzzer& fuzzer = fuzzers[number % kFuzzers];
    if (kernel && std::strcmp(kernel, fuzzer.kernel)) return;
    Case c{fuzzer.kernel, seed, number, pmc::fuzz::Random(seed * 0x9E3779B97F4A7C15 + static_cast<uint64_t>(number))};
    running = &c;
    fuzzer.run(c);
    ++fuzzer.cases;
}

}  // namespace

int main(int argc, char** argv) {
    uint64_t seed = 1;
    const char* kernel = nullptr;
    int64_t only = -1, cases = INT64_MAX;
    double seconds = 10;
    for (int i = 1; i < argc; i += 2) {
        const char* const value = i + 1 < argc ? argv[i + 1] : nullptr;
        if (value && !std::strcmp(argv[i], "--seed")) {
            seed = std::strtoull(value, nullptr, 10);
        } else if (value && !std::strcmp(argv[i], "--seconds")) {
            seconds = std::strtod(value, nullptr);
        } else if (value && !std::strcmp(argv[i], "--cases")) {
            cases = std::strtoll(value, nullptr, 10);
            seconds = 1e9;
        } else if (value && !std::strcmp(argv[i], "--case")) {
            only = std::strtoll(value, nullptr, 10);
        } else if (value && !std::strcmp(argv[i], "--kernel") && is_kernel(value)) {
            kernel = value;
        } else {
            std::fprintf(stderr, "usage: fuzz [--seed N] [--kernel NAME] [--seconds S | --cases N | --case NUMBER]\n");
            return 2;
        }
    }
    std::signal(SIGABRT, report_case);

    const auto start = std::chrono::steady_clock::now();
    const auto elapsed = [&] {
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    };
    if (only >= 0)
        run(seed, only, nullptr);
    else
        for (int64_t number = 0; number < cases && elapsed() < seconds; ++number) run(seed, number, kernel);

    std::printf("fuzz: no findings with --seed %llu on", static_cast<unsigned long long>(seed));
    for (const std::string& name : pmc::usable_instruction_sets()) std::printf(" %s", name.c_str());
    std::printf("; cases:");
    for (const Fuzzer& fuzzer : fuzzers) std::printf(" %s %lld", fuzzer.kernel, static_cast<long long>(fuzzer.cases));
    std::printf("\n");
    return 0;
}
