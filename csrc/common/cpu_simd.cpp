// Which instructions this process uses.
#include <cstdlib>
#include <cstring>

#include "common/simd.h"
#include "common/tiles.h"

#if defined(MAFNET_HAS_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mafnet {
namespace {

#if defined(MAFNET_HAS_TILES)
bool has_tiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx >> 22 & 1) == 0 || (edx >> 24 & 1) == 0) return false;  // AMX-BF16, AMX-TILE
  // Linux gives a process the tile registers when it asks for them.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The highest level not above `most` that this CPU has.
SimdLevel detect_simd_level([[maybe_unused]] SimdLevel most) {
  SimdLevel level = SimdLevel::kBaseline;
#if defined(__x86_64__)
  const auto rise = [&](SimdLevel next, bool has) {
    if (has && next <= most && static_cast<int>(next) == static_cast<int>(level) + 1) level = next;
  };
  rise(SimdLevel::kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"));
  rise(SimdLevel::kAvx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
#if defined(MAFNET_HAS_BF16)
  rise(SimdLevel::kAvx512Bf16, __builtin_cpu_supports("avx512bf16"));
#endif
#if defined(MAFNET_HAS_TILES)
  if (most >= SimdLevel::kAmx) rise(SimdLevel::kAmx, has_tiles());
#endif
#endif
  return level;
}

SimdLevel wished_level() {
  const char* wish = std::getenv("MAFNET_SIMD");
  const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
  for (int level = 0; wish != nullptr && level < 4; ++level) {
    if (std::strcmp(wish, names[level]) == 0) return static_cast<SimdLevel>(level);
  }
  return SimdLevel::kAmx;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = detect_simd_level(wished_level());
  return level;
}

}  // namespace mafnet
