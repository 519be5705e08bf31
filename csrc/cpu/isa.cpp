#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace pmc {

namespace baseline {
extern const Kernels kernels;
}
#ifdef PMC_HAS_avx2
namespace avx2 {
extern const Kernels kernels;
}
#endif
#ifdef PMC_HAS_avx512
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> sets;
#ifdef PMC_HAS_avx512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        sets.push_back(&avx512::kernels);
#endif
#ifdef PMC_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        sets.push_back(&avx2::kernels);
#endif
    sets.push_back(&baseline::kernels);
    return sets;
}

const Kernels* find(const std::string& name, const std::string& source) {
    std::string names;
    for (const Kernels* set : usable()) {
        if (set->name == name) return set;
        names += names.empty() ? set->name : std::string(", ") + set->name;
    }
    throw std::invalid_argument(source + " names the instruction set '" + name +
                                "'; this machine and build have: " + names);
}

std::atomic<const Kernels*> in_use{nullptr};

}  // namespace

std::vector<std::string> usable_instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* set : usable()) names.emplace_back(set->name);
    return names;
}

void use_instruction_set(const std::string& name) { in_use = find(name, "use_instruction_set"); }

const Kernels& kernels() {
    const Kernels* set = in_use;
    if (!set) {
        const char* forced = std::getenv("PMC_FAST_ISA");
        set = forced && *forced ? find(forced, "PMC_FAST_ISA") : usable().front();
        in_use = set;
    }
    return *set;
}

}  // namespace pmc
