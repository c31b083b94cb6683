// What the tests call by ctypes: the products of csrc by themselves, and tiles used wrongly.
#include <vector>

#include "common/gemm_bf16.h"
#include "common/tiles.h"
#include "self_attention/tiles.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace mafnet;

EXPORT int probe_level() { return static_cast<int>(simd_level()); }

// c (+)= a b for rows x depth and depth x columns floats side by side.
EXPORT void probe_multiply_bf16(const float* a, const float* b, int rows, int depth, int columns,
                                float* c, int64_t c_row, bool add) {
  std::vector<uint16_t> left(bf16_elements(rows, depth)), right(bf16_elements(columns, depth));
  pack_bf16_rows(a, depth, rows, depth, left.data());
  pack_bf16_columns(b, columns, depth, columns, right.data());
  multiply_bf16(left.data(), right.data(), rows, depth, columns, c, c_row, add);
}

// Tiles and steps as in self_attention/tiles.h; layout: along and step of a and b, row and column
// of c.
EXPORT void probe_multiply_tiles(const uint16_t* a, const uint16_t* b, const Step* steps, int count,
                                 int rows, int columns, float* c, const int64_t* layout, bool add) {
  const TileRegisters registers;
  multiply_tiles({a, layout[0], layout[1]}, {b, layout[2], layout[3]},
                 {steps, count, count * kTileDepth}, rows, columns, {c, layout[4], layout[5]}, add);
}

// ------------------------------------------------------------------------------------------ misuse

namespace {
alignas(64) float memory[kTileSums];

MAFNET_TARGET_TILES void configure(int rows_of_0, int bytes_of_0, int palette = 1) {
  TileConfig config;
  config.palette = static_cast<uint8_t>(palette);
  for (int i = 0; i < 3; ++i) {
    config.rows[i] = static_cast<uint8_t>(i == 0 ? rows_of_0 : 16);
    config.row_bytes[i] = static_cast<uint16_t>(i == 0 ? bytes_of_0 : 64);
  }
  asm volatile("" : : "r"(&config) : "memory");
  _tile_loadconfig(&config);
}
}  // namespace

EXPORT MAFNET_TARGET_TILES void misuse_unconfigured() { _tile_zero(0); }
EXPORT MAFNET_TARGET_TILES void misuse_after_release() {
  open_tiles();
  close_tiles();
  _tile_loadd(0, memory, 64);
}
EXPORT MAFNET_TARGET_TILES void misuse_tile_not_configured() {
  configure(16, 64);
  _tile_zero(3);
}
EXPORT void misuse_palette() { configure(16, 64, 2); }
EXPORT void misuse_rows() { configure(17, 64); }
EXPORT void misuse_bytes() { configure(16, 68); }
EXPORT void misuse_rows_of_no_bytes() { configure(16, 0); }
EXPORT void misuse_open_twice() {
  open_tiles();
  open_tiles();
}
EXPORT void misuse_close_twice() {
  open_tiles();
  close_tiles();
  close_tiles();
}
EXPORT void misuse_not_closed() { open_tiles(); }
EXPORT MAFNET_TARGET_TILES void misuse_stride() {
  open_tiles();
  _tile_loadd(0, memory, 60);
}
EXPORT MAFNET_TARGET_TILES void misuse_not_zeroed() {
  open_tiles();
  _tile_loadd(1, memory, 64);
  _tile_loadd(2, memory, 64);
  _tile_dpbf16ps(0, 1, 2);
}
EXPORT MAFNET_TARGET_TILES void misuse_stored_before() {
  open_tiles();
  _tile_zero(0);
  _tile_stored(0, memory, 64);
  _tile_stored(0, memory, 64);
}
EXPORT MAFNET_TARGET_TILES void misuse_shapes() {
  configure(15, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_dpbf16ps(0, 1, 2);
}
