// The fast path of flow_warp on the CPU: bilinear, float or half precision, image of at least 2
// x 2.
//
// The kernels (cpu_bilinear_kernels.h) are compiled three times, by cpu_avx512.cpp, cpu_avx2.cpp
// and cpu_portable.cpp, and one set of pointers is chosen when the program runs. No torch here.
#pragma once

#include <cstdint>
#include <vector>

#include "flow_warp/params.h"

namespace mafnet {

// Pixels of one call; with many more, the plan of a call leaves the L2 cache.
constexpr int kSpan = 4096;
// Pixels and channels that planes are transposed by on their way into grad_input. With 32 channels
// a band of 1280 columns leaves the L2 cache (307 ms against 231 for 64 x 720 x 1280).
constexpr int kTilePixels = 16;
constexpr int kTileChannels = 16;
// Planes are warped in blocks of the output: wide, since every row of every plane is a page of its
// own, and high, since neighbours read the same tiles of the image. The gradient of the flow has a
// larger plan and a row of grad_output beside it in the caches.
constexpr int kBlockColumns = 128;
constexpr int kBlockRows = kSpan / kBlockColumns;
constexpr int kGradBlockRows = kBlockRows / 2;
// Bytes of a row of a block of channels_last, about: what noise of some pixels reads again from row
// to row then stays in the L2 cache.
constexpr int kBlockRowBytes = 1 << 13;
// What one block may read, in tiles of kTilePixels x kTileChannels floats: 640 kB, of an L2 cache.
constexpr int kScratchTiles = 640;
constexpr int kScratch = kScratchTiles * kTilePixels * kTileChannels;

// Pixels first .. first + count of the output of image n, in raster order; count <= kSpan.
struct PixelSpan {
  int64_t n, first;
  int count;
};

// A rectangle of the output of image n, of at most kBlockColumns; with its width rounded up to
// kTilePixels, of at most kSpan pixels.
struct PixelBlock {
  int64_t n;
  int y, x, rows, columns;
};

struct RowRange {
  int first, last;  // rows of the image that an output row reads; empty where first > last
};

// Part of grad_input of image n: rows first_row .. last_row of channels first_channel and
// following.
struct Band {
  int64_t n;
  int first_row, last_row;
  int64_t first_channel, channels;

  int64_t pixels(const FlowWarpParams& p) const {
    return static_cast<int64_t>(last_row - first_row + 1) * p.width;
  }
};

// count pixels of row y of grad_output, from column x on, of which one at least reaches a band.
struct Tile {
  int y, x, count;
  bool full;  // all taps do
  // The first pixel of the cell as an index into the band, negative in the row above; the weights
  // of the cell, 0 for what contributes nothing.
  int cell[kTilePixels];
  float weight[4][kTilePixels];
};

struct BilinearKernels {
  // scratch: kScratch floats for planes, aligned to a line of the caches. stream: store around the
  // caches, for outputs larger than those.
  void (*forward)(const FlowWarpParams& p, const PixelBlock& block, float* scratch, bool stream);
  void (*grad_flow)(const FlowWarpParams& p, const PixelBlock& block, float* scratch);
  RowRange (*row_range)(const FlowWarpParams& p, int64_t n, int y);
  // ranges: of every output row of image band.n. The tiles are those of any channels.
  void (*find_tiles)(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                     std::vector<Tile>& tiles);
  // channels_last. buffer: floats as many as the band has elements; unused for float.
  void (*grad_input_pixels)(const FlowWarpParams& p, const RowRange* ranges, const Band& band,
                            float* buffer);
  // Planes, at most kTileChannels. buffer: kTileChannels floats per pixel of the band and of one
  // more tile.
  void (*grad_input_tiles)(const FlowWarpParams& p, const std::vector<Tile>& tiles,
                           const Band& band, float* buffer, bool stream);
};

extern const BilinearKernels kBilinearPortable;
#if defined(__x86_64__)
extern const BilinearKernels kBilinearAvx2;
extern const BilinearKernels kBilinearAvx512;
#endif

}  // namespace mafnet
