// Which instruction sets this machine has, and which one the kernels may use.
#pragma once

#include <string>
#include <vector>

namespace fastvq {

// In order of width. avx512 takes VNNI in where the processor has it; amx means 8-bit tiles.
enum class Isa : int { kGeneric = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

const char* isa_name(Isa isa);

// Instruction sets that the processor has and the operating system lets programs use.
std::vector<Isa> isa_available();

// Whether AVX-512 has whole-number products here: VNNI, an extension within the level avx512.
bool machine_has_vnni();

// Whether AVX-512 has products of pairs of bfloat16 numbers, likewise.
bool machine_has_bf16();

// The widest kernel the machine and FASTVQ_CPU_ISA allow. Reads the variable at every call (hold
// Python's lock: it guards os.environ). Throws std::runtime_error for a word it does not know and
// for an instruction set the machine lacks.
Isa isa_in_use();

}  // namespace fastvq
