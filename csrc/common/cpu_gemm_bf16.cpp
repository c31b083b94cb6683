// Matrix products in bfloat16 by tile registers: 16 times the products per clock of float vectors.
#include "common/gemm_bf16.h"
#include "common/simd.h"
#include "common/tiles.h"

#if defined(MAFNET_HAS_TILES)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mafnet {

#if defined(MAFNET_HAS_TILES)

namespace {

bool detect_bf16_tiles() {
  if (detect_simd_level() != SimdLevel::kAvx512) return false;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  const bool tiles = (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return false;
  const bool rounding = (eax >> 5 & 1) != 0;  // AVX512-BF16
  // Linux gives a process the tile registers when it asks for them.
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return tiles && rounding && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Tiles 0..3 are sums, 4 is A, 5 and 6 in turn are B.
template <int kTiles>  // 1 or 4
MAFNET_TARGET_TILES void multiply_tiles(const uint16_t* a, int64_t a_row, const uint16_t* b,
                                        int64_t b_row, int depth, float* c, int64_t c_row) {
  const int64_t c_bytes = c_row * 4;
  _tile_loadd(0, c, c_bytes);
  if constexpr (kTiles == 4) {
    _tile_loadd(1, c + 16, c_bytes);
    _tile_loadd(2, c + 32, c_bytes);
    _tile_loadd(3, c + 48, c_bytes);
  }
  for (int k = 0; k < depth; k += kBf16Depth) {
    const uint16_t* right = b + k / 2 * b_row;
    _tile_loadd(4, a + k, a_row * 2);
    _tile_loadd(5, right, b_row * 2);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (kTiles == 4) {
      _tile_loadd(6, right + 32, b_row * 2);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, right + 64, b_row * 2);
      _tile_dpbf16ps(2, 4, 5);
      _tile_loadd(6, right + 96, b_row * 2);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTiles == 4) {
    _tile_stored(1, c + 16, c_bytes);
    _tile_stored(2, c + 32, c_bytes);
    _tile_stored(3, c + 48, c_bytes);
  }
}

int padded_depth(int depth) { return (depth + kBf16Depth - 1) / kBf16Depth * kBf16Depth; }

}  // namespace

bool has_bf16_tiles() {
  static const bool has = detect_bf16_tiles();
  return has;
}

MAFNET_TARGET_TILES void round_to_bf16(const float* from, int64_t from_row, int rows, int depth,
                                       uint16_t* to) {
  const int padded = padded_depth(depth);
  for (int r = 0; r < rows; ++r) {
    for (int k = 0; k < padded; k += 16) {
      const int left = depth - k;
      const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1;
      const __m512 row = _mm512_maskz_loadu_ps(mask, from + r * from_row + k);
      const __m256bh rounded = _mm512_cvtneps_pbh(row);
      __builtin_memcpy(to + int64_t{r} * padded + k, &rounded, sizeof(rounded));
    }
  }
}

MAFNET_TARGET_TILES void pack_bf16(const float* b, int64_t b_row, int depth, int columns,
                                   uint16_t* packed) {
  for (int k = 0; k < padded_depth(depth); ++k) {
    for (int n = 0; n < columns; ++n) {
      uint32_t bits = 0;  // the weights were bfloat16: their upper halves are they
      if (k < depth) __builtin_memcpy(&bits, b + k * b_row + n, sizeof(bits));
      packed[(int64_t{k} / 2 * columns + n) * 2 + k % 2] = static_cast<uint16_t>(bits >> 16);
    }
  }
}

MAFNET_TARGET_TILES void multiply_bf16(const uint16_t* a, const uint16_t* b, int rows, int depth,
                                       int columns, float* c, int64_t c_row) {
  open_tiles();
  const int64_t a_row = padded_depth(depth), b_row = int64_t{columns} * 2;
  for (int m = 0; m < rows; m += kBf16Rows) {
    const uint16_t* left = a + m * a_row;
    float* out = c + m * c_row;
    int n = 0;
    for (; n + 64 <= columns; n += 64) {
      multiply_tiles<4>(left, a_row, b + 2 * n, b_row, depth, out + n, c_row);
    }
    for (; n < columns; n += 16) {
      multiply_tiles<1>(left, a_row, b + 2 * n, b_row, depth, out + n, c_row);
    }
  }
  close_tiles();
}

#else

bool has_bf16_tiles() { return false; }
void round_to_bf16(const float*, int64_t, int, int, uint16_t*) {}
void pack_bf16(const float*, int64_t, int, int, uint16_t*) {}
void multiply_bf16(const uint16_t*, const uint16_t*, int, int, int, float*, int64_t) {}

#endif

}  // namespace mafnet
