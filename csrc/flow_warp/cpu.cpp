// flow_warp on the CPU: output(n, c, p) = image(n, c, p + flow(n, p)). Splits the work into tasks.
//
// Bilinear float and half precision goes to kernels for the vector instructions at hand
// (cpu_bilinear.h), everything else to cpu_generic.h.
//
// Forward and grad_flow: one task per block of output pixels, or span of them in cpu_generic.h.
// grad_input: one task per band of its rows, which only that task writes; it visits the source rows
// that reach the band in raster order. No atomics, and the same sums in the same order whatever the
// number of threads.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "common/fresh_memory.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "common/simd.h"
#include "common/vectors.h"
#include "flow_warp/cpu_bilinear.h"
#include "flow_warp/cpu_generic.h"

namespace mafnet {
namespace {

// Elements of output per task, about: small enough to feed many cores.
constexpr int64_t kTaskElements = 1 << 17;
// Rows of grad_input per task: small enough to feed many cores, large enough that a source row,
// which reaches one or two bands under a smooth flow, is seldom planned twice. Bands of planes take
// more rows as long as their buffer stays in an L2 cache and there are tasks for all threads: under
// noise each is reached from many rows beyond it. The sums have the same order whatever the bands.
constexpr int kBandRows = 8;
constexpr int kMostBandRows = 32;
constexpr int64_t kBandFloats = 10 << 14;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

const BilinearKernels& bilinear_kernels() {
#if defined(__x86_64__)
  if (simd_level() >= SimdLevel::kAvx512) return kBilinearAvx512;
  if (simd_level() == SimdLevel::kAvx2) return kBilinearAvx2;
#endif
  return kBilinearPortable;
}

// Whether the bilinear kernels can take it: cells of 2 x 2, neighbours side by side, and offsets
// within a plane that an int holds.
bool is_fast(const FlowWarpParams& p) {
  if (p.interpolation != Interpolation::kBilinear || p.dtype == Dtype::kFloat64) return false;
  if (p.height < 2 || p.width < 2) return false;
  if (p.channels_last) return true;
  const int64_t last = (p.height - 1) * p.input_stride[2] + p.width;
  return p.input_stride[3] == 1 && last <= std::numeric_limits<int>::max() / 8;
}

// Calls body(span) for all output pixels.
template <typename Body>
void for_each_span(const FlowWarpParams& p, const Body& body) {
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int64_t wanted = kTaskElements / std::max<int64_t>(p.channels, 1);
  const int64_t length = std::clamp<int64_t>(wanted, 64, kSpan);
  const int64_t per_image = divide_up(pixels, length);
  parallel_for(0, p.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % per_image * length;
      body(PixelSpan{task / per_image, first, static_cast<int>(std::min(length, pixels - first))});
    }
  });
}

// Calls body(block, scratch) for blocks that make up the output, of about the same size; of planes
// they have that many rows.
template <typename Body>
void for_each_block(const FlowWarpParams& p, int rows, const Body& body) {
  if (p.out_width == 0) return;
  int columns = kBlockColumns;
  if (p.channels_last) {
    const int64_t channels = std::max<int64_t>(p.channels, 1);
    const int64_t fitting = kBlockRowBytes / (channels * element_bytes(p.dtype));
    columns = static_cast<int>(
        std::clamp<int64_t>(fitting / kTilePixels * kTilePixels, kTilePixels, kBlockColumns));
    rows = static_cast<int>(
        std::clamp<int64_t>(kTaskElements / (channels * columns), 1, kSpan / columns));
  }
  const int64_t least = divide_up(p.out_width, columns);
  columns = static_cast<int>(divide_up(divide_up(p.out_width, least), kTilePixels) * kTilePixels);
  const int64_t across = divide_up(p.out_width, columns);
  const int64_t per_image = across * divide_up(p.out_height, rows);
  parallel_for(0, p.batch * per_image, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> scratch(p.channels_last ? 0 : kScratch, false);
    for (int64_t task = begin; task < end; ++task) {
      const int y = static_cast<int>(task % per_image / across) * rows;
      const int x = static_cast<int>(task % across) * columns;
      body(PixelBlock{task / per_image, y, x, std::min(rows, p.out_height - y),
                      std::min(columns, p.out_width - x)},
           scratch.data());
    }
  });
}

// Every line of an output can be stored whole and around the caches.
bool is_aligned(const FlowWarpParams& p, const void* output, const int64_t (&stride)[4]) {
  const int64_t bytes = element_bytes(p.dtype), line = 64;
  return reinterpret_cast<int64_t>(output) % line == 0 && stride[0] * bytes % line == 0 &&
         (p.channels_last ? stride[3] : stride[1]) * bytes % line == 0;
}

void forward(const FlowWarpParams& p) {
  const int64_t bytes = p.batch * p.output_stride[0] * element_bytes(p.dtype);
  prepare_output(p.output, bytes);
  if (!is_fast(p)) {
    return for_each_span(p, [&](const PixelSpan& span) { generic_forward(p, span); });
  }
  // New pages too: a block comes to a page of 2 MB long after it was zeroed (in planes 216 ms
  // against 158 for 64 x 720 x 1280). Of planes every row of a block must begin at a line.
  const bool stream = bytes >= kLargeOutput && is_aligned(p, p.output, p.output_stride) &&
                      (p.channels_last || p.output_stride[2] * element_bytes(p.dtype) % 64 == 0);
  const BilinearKernels& kernels = bilinear_kernels();
  for_each_block(p, kBlockRows, [&](const PixelBlock& block, float* scratch) {
    kernels.forward(p, block, scratch, stream);
  });
}

void grad_flow(const FlowWarpParams& p) {
  if (p.interpolation == Interpolation::kNearest) {  // piecewise constant
    const int64_t elements = p.batch * p.out_height * p.out_width * 2;
    std::memset(p.grad_flow, 0, static_cast<size_t>(elements * element_bytes(p.flow_dtype)));
  } else if (is_fast(p)) {
    const BilinearKernels& kernels = bilinear_kernels();
    for_each_block(p, kGradBlockRows, [&](const PixelBlock& block, float* scratch) {
      kernels.grad_flow(p, block, scratch);
    });
  } else {
    for_each_span(p, [&](const PixelSpan& span) { generic_grad_flow(p, span); });
  }
}

int band_rows(const FlowWarpParams& p) {
  if (p.channels_last) return kBandRows;
  const int64_t row = static_cast<int64_t>(p.width) * kTileChannels;
  const int64_t chunks = p.batch * divide_up(p.channels, kTileChannels);
  int rows = kMostBandRows;
  const auto is_good = [&] {
    return rows * row <= kBandFloats && divide_up(p.height, rows) * chunks >= 2 * num_threads();
  };
  while (rows > kBandRows && !is_good()) rows /= 2;
  return rows;
}

std::vector<RowRange> find_ranges(const FlowWarpParams& p) {
  const auto find = is_fast(p) ? bilinear_kernels().row_range : &generic_row_range;
  std::vector<RowRange> ranges(static_cast<size_t>(p.batch * p.out_height));
  const int64_t grain = divide_up(kTaskElements, std::max(p.out_width, 1));
  parallel_for(0, p.batch * p.out_height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      ranges[r] = find(p, r / p.out_height, static_cast<int>(r % p.out_height));
    }
  });
  return ranges;
}

void grad_input(const FlowWarpParams& p) {
  const bool fast = is_fast(p);
  const int rows = band_rows(p);
  const int64_t bytes = p.batch * p.grad_input_stride[0] * element_bytes(p.dtype);
  prepare_output(p.grad_input, bytes);
  // Whole lines only where every band begins at one.
  const bool stream = bytes >= kLargeOutput && !p.channels_last &&
                      is_aligned(p, p.grad_input, p.grad_input_stride) &&
                      rows * p.width * element_bytes(p.dtype) % 64 == 0;
  const std::vector<RowRange> all_ranges = find_ranges(p);

  const int64_t bands = divide_up(p.height, rows);
  const int64_t chunk = p.channels_last ? p.channels : kTileChannels;
  const int64_t chunks = chunk == 0 ? 0 : divide_up(p.channels, chunk);
  const bool in_place = p.channels_last && p.dtype == Dtype::kFloat32;
  parallel_for(0, p.batch * bands * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    if (fast && !in_place) buffer.resize((rows * p.width + kTilePixels) * chunk);
    std::vector<Tile> tiles;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / (bands * chunks), first_channel = task % chunks * chunk;
      const int first_row = static_cast<int>(task / chunks % bands) * rows;
      const Band band{n, first_row, std::min(first_row + rows, p.height) - 1, first_channel,
                      std::min(chunk, p.channels - first_channel)};
      const RowRange* ranges = all_ranges.data() + n * p.out_height;
      if (!fast) {
        generic_grad_input(p, ranges, band);
      } else if (p.channels_last) {
        bilinear_kernels().grad_input_pixels(p, ranges, band, buffer.data());
      } else {
        // A thread has the channels of a band one after another.
        if (task == begin || first_channel == 0) {
          bilinear_kernels().find_tiles(p, ranges, band, tiles);
        }
        bilinear_kernels().grad_input_tiles(p, tiles, band, buffer.data(), stream);
      }
    }
  });
}

}  // namespace

int launch_flow_warp_forward(const FlowWarpParams& p, void*) {
  forward(p);
  return 0;
}

int launch_flow_warp_backward(const FlowWarpParams& p, void*) {
  if (p.grad_flow != nullptr) grad_flow(p);
  if (p.grad_input != nullptr) grad_input(p);
  return 0;
}

}  // namespace mafnet
