// Which instruction sets this build has, which this machine runs, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace pmc {

// Names of the usable instruction sets, fastest first; "baseline" is always the last.
std::vector<std::string> usable_instruction_sets();

// Uses the named set from now on. Throws std::invalid_argument if it is not usable here.
void use_instruction_set(const std::string& name);

// The kernels in use: the environment variable PMC_FAST_ISA's choice, else the fastest.
const Kernels& kernels();

}  // namespace pmc
