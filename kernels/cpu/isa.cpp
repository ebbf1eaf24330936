// See isa.h.
#include "isa.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastvq {
namespace {

constexpr Isa kAll[] = {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512, Isa::kAmx};

#if defined(__x86_64__)
// Bits of XCR0: the register state the operating system saves (Intel SDM vol. 1, 13.3).
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Tile registers are switched on per process, by asking the kernel (arch_prctl(2)).
bool tiles_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool machine_has_amx() {
#if defined(FASTVQ_WITHOUT_AMX)  // the compiler could not make the kernel
  return false;
#else
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
  constexpr uint64_t kTileState = (1u << 17) | (1u << 18);
  if ((saved_state() & kTileState) != kTileState) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kTile = 1u << 24, kInt8 = 1u << 25;
  return (d & (kTile | kInt8)) == (kTile | kInt8) && tiles_permitted();
#endif
}

bool machine_has(Isa isa) {
  __builtin_cpu_init();  // asks XCR0 too: what the operating system does not save counts as absent
  switch (isa) {
    case Isa::kGeneric:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kAvx512:
      return machine_has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAmx:
      return machine_has_vnni() && machine_has_amx();
  }
  return false;
}
#else
bool machine_has(Isa isa) { return isa == Isa::kGeneric; }
#endif

std::string names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(isa_name(isa));
  return text;
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"generic", "avx2", "avx512", "amx"};
  return kNames[static_cast<int>(isa)];
}

std::vector<Isa> isa_available() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas;
    for (Isa isa : kAll) {
      if (machine_has(isa)) isas.push_back(isa);
    }
    return isas;
  }();
  return found;
}

bool machine_has_vnni() {
#if defined(__x86_64__)
  return machine_has(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool machine_has_bf16() {
#if defined(__x86_64__)
  constexpr uint32_t kBf16 = 1u << 5;
  uint32_t a, b, c, d;
  return machine_has(Isa::kAvx512) && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & kBf16) != 0;
#else
  return false;
#endif
}

Isa isa_in_use() {
  const std::vector<Isa> available = isa_available();
  Isa widest = available.back();
  const char* word = std::getenv("FASTVQ_CPU_ISA");
  if (word != nullptr && word[0] != '\0') {
    const std::string asked = word;
    const auto known = std::find_if(std::begin(kAll), std::end(kAll),
                                    [&](Isa isa) { return asked == isa_name(isa); });
    if (known == std::end(kAll)) {
      throw std::runtime_error("FASTVQ_CPU_ISA must be generic, avx2, avx512 or amx; got \"" +
                               asked + "\". Unset it to use the widest this machine has.");
    }
    if (std::find(available.begin(), available.end(), *known) == available.end()) {
      throw std::runtime_error("FASTVQ_CPU_ISA=" + asked + " cannot run: this machine has " +
                               names(available) + ". Set one of these, or unset it.");
    }
    widest = *known;
  }
  return widest;
}

}  // namespace fastvq
