// Runs a loop nest with the widest vector instructions of the CPU it finds itself on.
//
// One binary must run on any x86-64, yet the hot loops want AVX2 or AVX-512. with_simd(body)
// inlines body into one function per level and calls the best one; T is the element type, and
// double, which serves accuracy and not speed, has the baseline alone. Everything hot that body
// calls must be MAFNET_INLINE too, or it stays at the baseline.
//
// MAFNET_SIMD=baseline|avx2|avx512|avx512bf16|amx lowers the level. The last two are AVX-512 with
// products in bfloat16, by vectors or by tile registers.
#pragma once

#include <type_traits>

#define MAFNET_INLINE inline __attribute__((always_inline))
// For what is called once per block: one copy, however many callers.
#define MAFNET_NOINLINE __attribute__((noinline))
#define MAFNET_INLINE_LAMBDA __attribute__((always_inline))

// For functions written for one level, with its intrinsics. Call them only where simd_level()
// allows.
#define MAFNET_TARGET_AVX2 __attribute__((target("avx2,fma,f16c,bmi,bmi2")))
#define MAFNET_TARGET_AVX512 \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))

namespace mafnet {

enum class SimdLevel : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// The level of this process.
SimdLevel simd_level();

#if defined(__x86_64__)

template <typename Body>
MAFNET_TARGET_AVX2 void run_avx2(const Body& body) {
  body();
}

template <typename Body>
MAFNET_TARGET_AVX512 void run_avx512(const Body& body) {
  body();
}

template <typename T = float, typename Body>
void with_simd(const Body& body) {
  if constexpr (std::is_same_v<T, double>) return body();
  const SimdLevel level = simd_level();
  if (level >= SimdLevel::kAvx512) {
    run_avx512(body);
  } else if (level == SimdLevel::kAvx2) {
    run_avx2(body);
  } else {
    body();
  }
}

#else

template <typename T = float, typename Body>
void with_simd(const Body& body) {
  body();
}

#endif

}  // namespace mafnet
