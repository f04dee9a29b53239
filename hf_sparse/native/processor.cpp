// Which instruction sets this processor and operating system run, and which of them is used.
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#define HF_SPARSE_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hf_sparse {
namespace {

#if defined(HF_SPARSE_X86)

struct Registers {
  uint32_t a, b, c, d;
};

Registers identify(uint32_t leaf, uint32_t part) {
#if defined(_MSC_VER)
  int answer[4];
  __cpuidex(answer, static_cast<int>(leaf), static_cast<int>(part));
  return {static_cast<uint32_t>(answer[0]), static_cast<uint32_t>(answer[1]), static_cast<uint32_t>(answer[2]),
          static_cast<uint32_t>(answer[3])};
#else
  Registers answer{};
  __cpuid_count(leaf, part, answer.a, answer.b, answer.c, answer.d);
  return answer;
#endif
}

// The register states that the operating system saves when it switches between threads.
uint64_t saved_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
#endif
}

bool bit(uint32_t word, int place) { return ((word >> place) & 1u) != 0; }

bool saves(uint64_t wanted) {
  const bool can_ask = identify(0, 0).a >= 7 && bit(identify(1, 0).c, 27);
  return can_ask && (saved_states() & wanted) == wanted;
}

bool runs_avx512() {
  if (!saves(0xe6)) return false;  // SSE, AVX, and the three parts of AVX-512
  const Registers basic = identify(1, 0), seven = identify(7, 0), more = identify(7, 1);
  const bool general = bit(basic.c, 12) && bit(basic.c, 23) && bit(seven.b, 5) && bit(seven.b, 8);  // FMA POPCNT AVX2 BMI2
  const bool wide = bit(seven.b, 16) && bit(seven.b, 17) && bit(seven.b, 30) && bit(seven.b, 31);  // F, DQ, BW, VL
  const bool expands = bit(seven.c, 6);                                                            // VBMI2
  return general && wide && expands && seven.a >= 1 && bit(more.a, 5);                             // BF16
}

// Linux lets a process use tiles only after it has asked to; the permission then holds for all of its threads.
bool runs_amx() {
#if defined(HF_SPARSE_EMULATE_TILES)
  return runs_avx512();
#elif defined(__linux__)
  constexpr long ask_permission = 0x1023, tile_data = 18;
  const Registers seven = identify(7, 0);
  return runs_avx512() && saves(0x60000) && bit(seven.d, 22) && bit(seven.d, 24) &&
         syscall(SYS_arch_prctl, ask_permission, tile_data) == 0;
#else
  return false;
#endif
}

#else

bool runs_avx512() { return false; }
bool runs_amx() { return false; }

#endif

}  // namespace

const char* set_name(Set set) {
  return set == Set::amx ? "amx" : set == Set::avx512 ? "avx512" : "portable";
}

bool processor_has(Set set) {
  static const bool avx512 = avx512_kernels(false) != nullptr && runs_avx512();
  static const bool amx = avx512 && amx_kernels() != nullptr && runs_amx();
  return set == Set::amx ? amx : set == Set::avx512 ? avx512 : true;
}

Set chosen_set(const char* wanted) {
  const std::string name = wanted ? wanted : "";
  for (const Set set : {Set::amx, Set::avx512, Set::portable}) {
    if (name == set_name(set) && !processor_has(set)) {
      throw std::invalid_argument("HF_SPARSE_KERNELS is " + name + ", which this build, processor or operating system " +
                                  "does not have; the best that it has is " + set_name(chosen_set(nullptr)) + ". Unset the variable or name a set that is there.");
    }
    if (name == set_name(set) || (name.empty() && processor_has(set))) return set;
  }
  throw std::invalid_argument("HF_SPARSE_KERNELS is " + name + "; allowed are portable, avx512 and amx. Correct or unset it.");
}

const Kernels* kernels_of(Set set, bool single_precision) {
  if (set == Set::amx && !single_precision) return amx_kernels();
  return set == Set::portable ? portable_kernels(single_precision) : avx512_kernels(single_precision);
}

}  // namespace hf_sparse
