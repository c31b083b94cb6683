// modulated_deform_conv2d on the CPU, backward.
//
// A task is one offset group and one band of rows of grad_input, which only this task writes. It
// visits the blocks of output pixels that it owns, and those that reach into its band, in raster
// order. Of a block it makes the gradients of the samples by one matrix product with the weight,
//   grad_sample[pixel][tap][channel] = sum_o grad_output[pixel][o] * weight[o][tap][channel];
// the four corners of a sample then give their products with it to grad_offset and grad_mask, take
// their shares of it into grad_input, and give the sample itself for grad_weight, which is a second
// matrix product over the pixels. Input and grad_input are held as [row][column][channel] of the
// task's channels, a few rows beyond the band at most unless offsets are wild.
//
// No atomics. Pixels of grad_input sum up in the order of the blocks; grad_weight and grad_bias by
// slots, fixed parts of the image, that are added in their order at the end. So the result has the
// same bits whatever the number of threads and of bands.
#include <torch/csrc/stable/ops.h>

#include "modulated_deform_conv2d/backward_taps.h"
#include "modulated_deform_conv2d/cut.h"
#include "modulated_deform_conv2d/pixels.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {
namespace {

// Channels that a task handles at a time: bounds its memory.
constexpr int kMaxChannels = 64;
// Parts of an image with sums of grad_weight of their own, at most; bounded by the memory of these.
constexpr int kMaxSlots = 32;
constexpr int64_t kSlotBytes = 20 << 20;
constexpr int64_t kSlotPixels = 768;  // at least: blocks are cut at the ends of slots
// Of a band of grad_input in a task, at most where slots allow: in or near the second cache.
constexpr int64_t kBandBytes = 4 << 20;

// Output pixels of one slot.
struct Piece {
  int64_t first;
  int count, slot;
};

template <typename A>
struct Backward {
  explicit Backward(const ModulatedDeformConv2dParams& p);

  int columns_of(int segment) const { return segments[segment].stored * taps; }

  int taps, slots, bands;
  int out;                      // out channels of a group, padded
  int max_columns, max_stored;  // of a segment
  std::vector<Segment> segments;
  std::vector<int64_t> weight_at, grad_at;  // where a segment begins in weight, in a slot
  std::vector<Piece> pieces;                // of an image, in order
  int64_t slot_size;
  Buffer<A> weight;       // [segment][out channel][tap][channel], rows padded
  Buffer<A> grad_weight;  // [slot][segment][tap][channel][out channel]
  Buffer<A> grad_bias;    // [slot][out channel]
};

int slots_of(const ModulatedDeformConv2dParams& p, int64_t weight_bytes) {
  int slots = 1;
  while (2 * slots <= kMaxSlots && 2 * slots <= std::min(p.out_height, p.height) &&
         2 * slots * kSlotPixels <= p.pixels() && 2 * slots * weight_bytes <= kSlotBytes) {
    slots *= 2;
  }
  return slots;
}

// The number of threads may decide it, as it has no bearing on any sum.
template <typename A>
int bands_of(const ModulatedDeformConv2dParams& p, int slots, int stored) {
  const int64_t bytes = int64_t{p.height} * p.width * stored * sizeof(A);
  const int64_t tasks = torch::stable::get_num_threads();
  int bands = 1;
  while (bands < slots && (bytes > kBandBytes * bands ||
                           (p.offset_groups * bands < tasks && p.height >= 64 * bands))) {
    bands *= 2;
  }
  return bands;
}

template <typename A>
Backward<A>::Backward(const ModulatedDeformConv2dParams& p)
    : taps(p.taps()),
      out(round_up(p.group_outputs(), kColumnPad)),
      max_columns(0),
      max_stored(0),
      segments(make_segments(p, kMaxChannels)),
      slot_size(0),
      weight(0),
      grad_weight(0),
      grad_bias(0) {
  int64_t weight_size = 0;
  for (size_t s = 0; s < segments.size(); ++s) {
    const int columns = columns_of(static_cast<int>(s));
    weight_at.push_back(weight_size);
    grad_at.push_back(slot_size);
    weight_size += int64_t{p.group_outputs()} * round_up(columns, kColumnPad);
    slot_size += int64_t{columns} * out;
    max_columns = std::max(max_columns, columns);
    max_stored = std::max(max_stored, segments[s].stored);
  }
  slots = slots_of(p, slot_size * sizeof(A));
  bands = p.grad_input == nullptr ? slots : bands_of<A>(p, slots, max_stored);
  for (int slot = 0; slot < slots; ++slot) {
    const int64_t end = p.out_height * (slot + int64_t{1}) / slots * p.out_width;
    for (int64_t first = p.out_height * int64_t{slot} / slots * p.out_width; first < end;
         first += kMaxBlock) {
      pieces.push_back({first, static_cast<int>(std::min<int64_t>(kMaxBlock, end - first)), slot});
    }
  }
  weight.resize(weight_size);
  if (p.grad_weight != nullptr) grad_weight.resize(slots * slot_size);
  if (p.grad_bias != nullptr) grad_bias.resize(int64_t{slots} * p.out_channels);
  with_dtype<A>(p.dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(p.weight);
    for_weights(p, segments, [&](int s, int column, int o, int64_t at) {
      weight.data()[weight_at[s] + int64_t{o} * round_up(columns_of(s), kColumnPad) + column] =
          static_cast<A>(from[at]);
    });
  });
}

// Buffers of one thread.
template <typename A>
struct Scratch {
  explicit Scratch(const Backward<A>& f)
      : columns(static_cast<size_t>(kMaxBlock) * round_up(f.max_columns, kRowPad)),
        grad_columns(static_cast<size_t>(kMaxBlock) * round_up(f.max_columns, kColumnPad)),
        grad_output(static_cast<size_t>(kMaxBlock) * f.out),
        grad_weight(static_cast<size_t>(round_up(f.max_columns, kRowPad)) * f.out),
        grad_bias(f.out),
        zeros(f.max_stored),
        nowhere(f.max_stored),
        window(0),
        grad_window(0),
        grad_planes(0),
        plan(1) {}
  Buffer<A> columns, grad_columns, grad_output, grad_weight;
  Buffer<double> grad_bias;       // of a block
  Buffer<A> zeros, nowhere;       // what is read, and written, in place of pixels outside
  Buffer<A> window, grad_window;  // rows of input and of grad_input
  Buffer<A> grad_planes;          // of grad_offset and grad_mask, summed over several segments
  Buffer<Plan<A>> plan;
  alignas(64) A dots[kMaxBlock][4];  // of the four corners with grad_sample
  alignas(64) A grad[3][kMaxBlock];  // dy, dx, mask
};

// One task, with what its parts share.
template <typename A>
struct Task {
  const ModulatedDeformConv2dParams& p;
  Backward<A>& f;
  Scratch<A>& scratch;
  const RowRange* ranges;  // by piece; null where there is one band
  int64_t n;
  int offset_group, band;

  int band_begin() const { return static_cast<int>(int64_t{p.height} * band / f.bands); }
  int band_end() const { return static_cast<int>(int64_t{p.height} * (band + 1) / f.bands); }
  bool owns(const Piece& piece) const { return piece.slot / (f.slots / f.bands) == band; }
  bool needs_samples() const {
    return p.grad_offset != nullptr || p.grad_mask != nullptr || p.grad_weight != nullptr;
  }
};

// Rows of grad_output of a block, padded with zeros.
template <typename A>
void read_grad_output(const ModulatedDeformConv2dParams& p, const Block& b, int group, A* grad,
                      int64_t row) {
  const int64_t first = b.n * p.grad_output_stride[0] + b.first * p.grad_output_stride[2] +
                        int64_t{group} * p.group_outputs() * p.grad_output_stride[1];
  gather_pixels({p.grad_output, p.dtype, first, p.grad_output_stride[2], p.grad_output_stride[1]},
                b.count, p.group_outputs(), grad, row);
}

// ---- one block

// A plane of grad_offset (dy, dx) or grad_mask of a tap of the task's offset group, from a pixel
// on, as one pixel whose channels lie side by side; null where it is not wanted.
template <typename A>
Elements<void*> grad_plane(const Task<A>& t, int tap, int kind, int64_t pixel) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t plane = (t.n * p.offset_groups + t.offset_group) * p.taps() + tap;
  if (kind == 2) return {p.grad_mask, p.mask_dtype, plane * p.pixels() + pixel, 0, 1};
  return {p.grad_offset, p.offset_dtype, (2 * plane + kind) * p.pixels() + pixel, 0, 1};
}

// Where the sums of a plane over several segments begin; the owned pixels of a task follow each
// other.
template <typename A>
A* summed_plane(const Task<A>& t, int tap, int kind, int64_t first, int64_t pixels) {
  return t.scratch.grad_planes.data() + (tap * 3 + kind) * pixels + first;
}

template <typename A>
struct Owned {
  int64_t first, pixels;
  bool summed;  // over several segments, before they are written
};

template <typename A>
void backward_block(const Task<A>& t, int index, const Piece& piece, const Owned<A>& owned,
                    const Source<A>& source, A* grad_input) {
  const ModulatedDeformConv2dParams& p = t.p;
  const Segment& s = t.f.segments[index];
  Scratch<A>& scratch = t.scratch;
  Plan<A>& plan = *scratch.plan.data();
  const Block b{t.n, piece.first, piece.count};
  const int columns = t.f.columns_of(index);
  const int row = round_up(columns, kRowPad), grad_row = round_up(columns, kColumnPad);
  const bool mine = t.owns(piece);
  read_grad_output(p, b, s.group, scratch.grad_output.data(), t.f.out);
  multiply(Matrix<A>{scratch.grad_output.data(), t.f.out, 1},
           t.f.weight.data() + t.f.weight_at[index], grad_row, b.count, p.group_outputs(), grad_row,
           scratch.grad_columns.data(), grad_row, false);
  plan_block(p, b, plan);
  for (int k = 0; k < p.taps(); ++k) {
    const A* grad = scratch.grad_columns.data() + k * s.stored;
    plan_tap(p, b, source, s.offset_group * p.taps() + k, plan);
    if (mine && t.needs_samples()) {
      gather_tap(p, b, source, plan, s.stored, scratch.zeros.data(), grad, grad_row,
                 scratch.columns.data() + k * s.stored, row, scratch.dots);
      combine_dots(b.count, plan, scratch.dots, scratch.grad);
      for (int kind = 0; kind < 3; ++kind) {
        const Elements<void*> to = grad_plane(t, k, kind, b.first);
        if (to.data == nullptr) continue;
        if (owned.summed) {
          A* sum = summed_plane(t, k, kind, b.first - owned.first, owned.pixels);
          for (int i = 0; i < b.count; ++i) sum[i] += scratch.grad[kind][i];
        } else {
          scatter_pixels(scratch.grad[kind], 0, 1, b.count, to);
        }
      }
    }
    if (p.grad_input != nullptr) {
      scatter_tap(p, {t.band_begin(), t.band_end()}, b, grad_input, scratch.nowhere.data(),
                  source.row_stride, source.column_stride, plan, s.stored, grad, grad_row);
    }
  }
  if (mine && p.grad_weight != nullptr) {
    multiply(Matrix<A>{scratch.columns.data(), 1, row}, scratch.grad_output.data(), t.f.out,
             columns, b.count, t.f.out, scratch.grad_weight.data(), t.f.out, true);
  }
  if (mine && p.grad_bias != nullptr && s.group_low == 0) {
    A* bias =
        t.f.grad_bias.data() + int64_t{piece.slot} * p.out_channels + s.group * p.group_outputs();
    // The block by itself, in double: a long sum of floats one by one loses digits.
    double* sum = scratch.grad_bias.data();
    std::fill_n(sum, t.f.out, 0.0);
    for (int i = 0; i < b.count; ++i) {
      for (int o = 0; o < t.f.out; ++o) sum[o] += scratch.grad_output.data()[i * t.f.out + o];
    }
    for (int o = 0; o < p.group_outputs(); ++o) bias[o] += static_cast<A>(sum[o]);
  }
}

// ---- one task

// Rows range of the channels of a segment, rewritten as [row][column][channel].
template <typename A>
void read_window(const Task<A>& t, const Segment& s, const RowRange& rows) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t row_stride = int64_t{p.width} * s.stored;
  t.scratch.window.resize((rows.high - rows.low) * row_stride, s.stored != s.channels);
  const int64_t channel = int64_t{s.offset_group} * p.offset_group_channels() + s.low;
  for (int64_t y = rows.low; y < rows.high; ++y) {
    const int64_t first =
        t.n * p.input_stride[0] + channel * p.input_stride[1] + y * p.input_stride[2];
    gather_pixels({p.input, p.dtype, first, p.input_stride[3], p.input_stride[1]}, p.width,
                  s.channels, t.scratch.window.data() + (y - rows.low) * row_stride,
                  int64_t{s.stored});
  }
}

template <typename A>
void write_grad_input(const Task<A>& t, const Segment& s) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t row_stride = int64_t{p.width} * s.stored;
  const int64_t channel = int64_t{s.offset_group} * p.offset_group_channels() + s.low;
  for (int64_t y = t.band_begin(); y < t.band_end(); ++y) {
    const int64_t first = t.n * p.grad_input_stride[0] + channel * p.grad_input_stride[1] +
                          y * p.width * p.grad_input_stride[2];
    scatter_pixels(t.scratch.grad_window.data() + (y - t.band_begin()) * row_stride,
                   int64_t{s.stored}, p.width, s.channels,
                   {p.grad_input, p.dtype, first, p.grad_input_stride[2], p.grad_input_stride[1]});
  }
}

// Adds the task's grad_weight of a segment to its slot and begins anew.
template <typename A>
void flush_grad_weight(const Task<A>& t, int index, int slot) {
  if (t.p.grad_weight == nullptr) return;
  const int64_t size = int64_t{t.f.columns_of(index)} * t.f.out;
  A* to = t.f.grad_weight.data() + slot * t.f.slot_size + t.f.grad_at[index];
  A* from = t.scratch.grad_weight.data();
  for (int64_t i = 0; i < size; ++i) to[i] += from[i];
  std::fill_n(from, t.scratch.grad_weight.size(), A(0));
}

template <typename A>
void backward_segment(const Task<A>& t, int index, const Owned<A>& owned) {
  const ModulatedDeformConv2dParams& p = t.p;
  const Segment& s = t.f.segments[index];
  const int64_t row_stride = int64_t{p.width} * s.stored;
  RowRange rows{0, p.height};
  if (t.ranges != nullptr) {
    rows = {p.height, 0};
    for (size_t i = 0; i < t.f.pieces.size(); ++i) {
      if (!t.owns(t.f.pieces[i])) continue;
      rows = {std::min(rows.low, t.ranges[i].low), std::max(rows.high, t.ranges[i].high)};
    }
    rows.high = std::max(rows.low, rows.high);
  }
  if (t.needs_samples()) read_window(t, s, rows);
  // Both begin at row 0, of which they hold some rows only.
  const Source<A> source{t.scratch.window.data() - rows.low * row_stride, row_stride, s.stored};
  A* grad_input = nullptr;
  if (p.grad_input != nullptr) {
    t.scratch.grad_window.resize((t.band_end() - t.band_begin()) * row_stride);
    grad_input = t.scratch.grad_window.data() - t.band_begin() * row_stride;
  }
  int slot = -1;
  for (size_t i = 0; i < t.f.pieces.size(); ++i) {
    const Piece& piece = t.f.pieces[i];
    const bool reaches = p.grad_input != nullptr && t.ranges != nullptr &&
                         t.ranges[i].low < t.band_end() && t.ranges[i].high > t.band_begin();
    if (!t.owns(piece) && !reaches) continue;
    if (t.owns(piece) && piece.slot != slot) {
      if (slot >= 0) flush_grad_weight(t, index, slot);
      slot = piece.slot;
    }
    backward_block(t, index, piece, owned, source, grad_input);
  }
  if (slot >= 0) flush_grad_weight(t, index, slot);
  if (p.grad_input != nullptr) write_grad_input(t, s);
}

template <typename A>
void backward_task(const Task<A>& t) {
  const ModulatedDeformConv2dParams& p = t.p;
  int segments = 0;
  for (const Segment& s : t.f.segments) segments += s.offset_group == t.offset_group;
  Owned<A> owned{-1, 0, segments > 1};
  for (const Piece& piece : t.f.pieces) {
    if (!t.owns(piece)) continue;
    if (owned.first < 0) owned.first = piece.first;
    owned.pixels += piece.count;
  }
  if (owned.summed) t.scratch.grad_planes.resize(3 * p.taps() * owned.pixels);
  for (size_t s = 0; s < t.f.segments.size(); ++s) {
    if (t.f.segments[s].offset_group == t.offset_group) {
      backward_segment(t, static_cast<int>(s), owned);
    }
  }
  for (int k = 0; k < p.taps() && owned.summed; ++k) {
    for (int kind = 0; kind < 3; ++kind) {
      const Elements<void*> to = grad_plane(t, k, kind, owned.first);
      const A* sum = summed_plane(t, k, kind, 0, owned.pixels);
      if (to.data != nullptr) scatter_pixels(sum, 0, 1, static_cast<int>(owned.pixels), to);
    }
  }
}

// ---- all

// The rows of input that each piece of an offset group touches.
template <typename A>
void find_ranges(const ModulatedDeformConv2dParams& p, const Backward<A>& f, int64_t n,
                 RowRange* ranges) {
  const int64_t count = static_cast<int64_t>(f.pieces.size());
  torch::stable::parallel_for(0, p.offset_groups * count, 16, [&](int64_t begin, int64_t end) {
    Buffer<Plan<A>> plan(1);
    for (int64_t task = begin; task < end; ++task) {
      const Piece& piece = f.pieces[task % count];
      const Block b{n, piece.first, piece.count};
      ranges[task] = touched_rows(p, b, static_cast<int>(task / count), *plan.data());
    }
  });
}

// The slots of grad_weight and grad_bias, added in their order.
template <typename A>
void sum_slots(const ModulatedDeformConv2dParams& p, const Backward<A>& f) {
  with_dtype<A>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (p.grad_weight != nullptr) {
      for_weights(p, f.segments, [&](int s, int column, int o, int64_t at) {
        A sum = 0;
        for (int slot = 0; slot < f.slots; ++slot) {
          sum +=
              f.grad_weight.data()[slot * f.slot_size + f.grad_at[s] + int64_t{column} * f.out + o];
        }
        static_cast<T*>(p.grad_weight)[at] = static_cast<T>(sum);
      });
    }
    for (int o = 0; o < p.out_channels && p.grad_bias != nullptr; ++o) {
      A sum = 0;
      for (int slot = 0; slot < f.slots; ++slot) {
        sum += f.grad_bias.data()[int64_t{slot} * p.out_channels + o];
      }
      static_cast<T*>(p.grad_bias)[o] = static_cast<T>(sum);
    }
  });
}

template <typename A>
void backward(const ModulatedDeformConv2dParams& p) {
  Backward<A> f(p);
  const bool banded = f.bands > 1;
  std::vector<RowRange> ranges(banded ? p.offset_groups * f.pieces.size() : 0);
  for (int64_t n = 0; n < p.batch; ++n) {
    if (banded) find_ranges(p, f, n, ranges.data());
    torch::stable::parallel_for(
        0, int64_t{p.offset_groups} * f.bands, 1, [&](int64_t begin, int64_t end) {
          Scratch<A> scratch(f);
          for (int64_t i = begin; i < end; ++i) {
            const int g = static_cast<int>(i / f.bands), band = static_cast<int>(i % f.bands);
            const RowRange* mine = banded ? ranges.data() + g * f.pieces.size() : nullptr;
            backward_task(Task<A>{p, f, scratch, mine, n, g, band});
          }
        });
  }
  sum_slots(p, f);
}

}  // namespace

int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& p, void*) {
  if (p.dtype == Dtype::kFloat64) {
    backward<double>(p);
  } else {
    backward<float>(p);
  }
  return 0;
}

}  // namespace mafnet
