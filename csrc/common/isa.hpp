// Which instruction sets the kernels were compiled for, and which one is used.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace forktree {

enum class Isa { portable, avx2, avx512, avx512bf16, amx };

// All instruction sets, weakest first, each with "" if this build has it and this machine runs it, else the reason.
std::vector<std::pair<std::string, std::string>> isas();

// The instruction set in use: the best available one, unless FORKTREE_ISA in the environment or `use_isa` named
// another.
Isa isa();
std::string isa_name();

// Throws std::invalid_argument if there is no such instruction set, or it is not available.
void use_isa(const std::string& name);

}  // namespace forktree
