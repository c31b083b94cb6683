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
// The parts of the input that share offsets, twins, go through a task together: positions are
// worked out once for all. Of raw offsets the gradients are multiplied by the activations' slopes;
// those of the base flows are kept per offset group until all groups of a slice of the image are
// there.
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
// Of the base flows' gradients by offset group: an image that needs more goes in slices of bands.
constexpr int64_t kFlowBytes = 4 << 20;
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

  // Rows of the image whose pieces a band owns, as its pixels.
  int64_t first_pixel(const ModulatedDeformConv2dParams& p, int band) const {
    return p.out_height * int64_t{band} * (slots / bands) / slots * p.out_width;
  }

  int taps, slots, bands;
  int slice;                    // bands between sums of the flows' gradients
  int out;                      // out channels of a group, padded
  int max_columns, max_stored;  // of a segment
  int twins;
  std::vector<Segment> segments;            // of all twins, those of the first first
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

bool wants_flow(const ModulatedDeformConv2dParams& p) {
  return p.raw.grad_flow[0] != nullptr || p.raw.grad_flow[1] != nullptr;
}

int slice_of(int bands, int64_t bytes) {
  int slice = bands;
  while (slice > 1 && bytes / bands * slice > kFlowBytes) slice /= 2;
  return slice;
}

template <typename A>
Backward<A>::Backward(const ModulatedDeformConv2dParams& p)
    : taps(p.taps()),
      out(round_up(p.group_outputs(), kColumnPad)),
      max_columns(0),
      max_stored(0),
      twins(twins_of(p)),
      segments(make_segments(p, kMaxChannels / std::min(twins, kMaxChannels))),
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
  bands = p.grad_input == nullptr ? slots : bands_of<A>(p, slots, max_stored * twins);
  const int64_t flow_bytes = 2 * sizeof(A) * p.offset_groups * p.pixels();
  slice = wants_flow(p) ? slice_of(bands, flow_bytes) : bands;
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
      : columns(static_cast<size_t>(f.twins) * kMaxBlock * round_up(f.max_columns, kRowPad)),
        grad_columns(static_cast<size_t>(f.twins) * kMaxBlock *
                     round_up(f.max_columns, kColumnPad)),
        grad_output(static_cast<size_t>(f.twins) * kMaxBlock * f.out),
        grad_weight(static_cast<size_t>(f.twins) * round_up(f.max_columns, kRowPad) * f.out),
        grad_bias(f.out),
        zeros(f.max_stored),
        nowhere(f.max_stored),
        window(0),
        grad_window(0),
        grad_planes(0),
        plan(1) {}
  Buffer<A> columns, grad_columns, grad_output, grad_weight;  // of each twin
  Buffer<double> grad_bias;                                   // of a block
  Buffer<A> zeros, nowhere;       // what is read, and written, in place of pixels outside
  Buffer<A> window, grad_window;  // rows of input and of grad_input, of each twin
  Buffer<A> grad_planes;          // of grad_offset and grad_mask, summed over several segments
  Buffer<Plan<A>> plan;
  alignas(64) A dots[kMaxBlock][4];  // of the four corners with grad_sample
  alignas(64) A twin_dots[kMaxBlock][4];
  alignas(64) A grad[3][kMaxBlock];  // dy, dx, mask
};

// One task, with what its parts share.
template <typename A>
struct Task {
  const ModulatedDeformConv2dParams& p;
  Backward<A>& f;
  Scratch<A>& scratch;
  const RowRange* ranges;           // by piece; null where there is one band
  A* grad_flow;                     // of the task's offset group: y, then x, as planes; or null
  int64_t flow_first, flow_pixels;  // of such a plane
  int64_t n;
  int offset_group, band;

  int band_begin() const { return static_cast<int>(int64_t{p.height} * band / f.bands); }
  int band_end() const { return static_cast<int>(int64_t{p.height} * (band + 1) / f.bands); }
  bool owns(const Piece& piece) const { return piece.slot / (f.slots / f.bands) == band; }
  bool needs_samples() const {
    return p.grad_offset != nullptr || p.grad_mask != nullptr || p.grad_weight != nullptr ||
           grad_flow != nullptr;
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
  const int64_t in_image = int64_t{t.offset_group} * p.taps() + tap;
  if (kind == 2) {
    const int64_t plane = t.n * p.grad_mask_planes() + in_image;
    return {p.grad_mask, p.mask_dtype, plane * p.pixels() + pixel, 0, 1};
  }
  const int64_t plane = t.n * p.grad_offset_planes() + 2 * in_image + kind;
  return {p.grad_offset, p.offset_dtype, plane * p.pixels() + pixel, 0, 1};
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

// Gradients of dy, dx and mask of a tap, from the dots, to where they belong.
template <typename A>
void store_grad_planes(const Task<A>& t, const Block& b, int tap, const Owned<A>& owned) {
  const ModulatedDeformConv2dParams& p = t.p;
  Scratch<A>& scratch = t.scratch;
  const Plan<A>& plan = *scratch.plan.data();
  combine_dots(b.count, plan, scratch.dots, scratch.grad);
  if (t.grad_flow != nullptr) {
    for (int kind = 0; kind < 2; ++kind) {
      A* sum = t.grad_flow + kind * t.flow_pixels + b.first - t.flow_first;
      for (int i = 0; i < b.count; ++i) sum[i] += scratch.grad[kind][i];
    }
  }
  for (int kind = 0; kind < 3; ++kind) {
    const Elements<void*> to = grad_plane(t, tap, kind, b.first);
    if (to.data == nullptr) continue;
    A* grad = scratch.grad[kind];
    if (p.raw.used) {
      for (int i = 0; i < b.count; ++i) grad[i] *= plan.slope[kind][i];
    }
    if (owned.summed) {
      A* sum = summed_plane(t, tap, kind, b.first - owned.first, owned.pixels);
      for (int i = 0; i < b.count; ++i) sum[i] += grad[i];
    } else {
      scatter_pixels(grad, 0, 1, b.count, to);
    }
  }
}

// Adds a block's grad_output, as rows, to the slot's grad_bias of a group.
template <typename A>
void add_grad_bias(const Task<A>& t, const Piece& piece, int group, const A* grad_output) {
  const ModulatedDeformConv2dParams& p = t.p;
  A* bias = t.f.grad_bias.data() + int64_t{piece.slot} * p.out_channels + group * p.group_outputs();
  // The block by itself, in double: a long sum of floats one by one loses digits.
  double* sum = t.scratch.grad_bias.data();
  std::fill_n(sum, t.f.out, 0.0);
  for (int i = 0; i < piece.count; ++i) {
    for (int o = 0; o < t.f.out; ++o) sum[o] += grad_output[i * t.f.out + o];
  }
  for (int o = 0; o < p.group_outputs(); ++o) bias[o] += static_cast<A>(sum[o]);
}

// What a twin of a segment works on in a block.
template <typename A>
struct Twin {
  int index;  // of its segment
  Source<A> source;
  A* grad_input;  // null: not wanted
  A *columns, *grad_columns, *grad_output, *grad_weight;
};

template <typename A>
void backward_block(const Task<A>& t, const Piece& piece, const Owned<A>& owned,
                    const std::vector<Twin<A>>& twins) {
  const ModulatedDeformConv2dParams& p = t.p;
  const Segment& s = t.f.segments[twins[0].index];
  Scratch<A>& scratch = t.scratch;
  Plan<A>& plan = *scratch.plan.data();
  const Block b{t.n, piece.first, piece.count};
  const int columns = t.f.columns_of(twins[0].index);
  const int row = round_up(columns, kRowPad), grad_row = round_up(columns, kColumnPad);
  const bool mine = t.owns(piece);
  for (const Twin<A>& twin : twins) {
    const int group = t.f.segments[twin.index].group;
    read_grad_output(p, b, group, twin.grad_output, t.f.out);
    multiply(Matrix<A>{twin.grad_output, t.f.out, 1}, t.f.weight.data() + t.f.weight_at[twin.index],
             grad_row, b.count, p.group_outputs(), grad_row, twin.grad_columns, grad_row, false);
  }
  plan_block(p, b, plan);
  for (int k = 0; k < p.taps(); ++k) {
    const int at = k * s.stored;
    plan_tap(p, b, twins[0].source, s.slab % p.offset_groups * p.taps() + k, plan);
    if (mine && t.needs_samples()) {
      for (const Twin<A>& twin : twins) {
        const bool first = &twin == twins.data();
        gather_tap(p, b, twin.source, plan, s.stored, scratch.zeros.data(), twin.grad_columns + at,
                   grad_row, twin.columns + at, row, first ? scratch.dots : scratch.twin_dots);
        if (!first) add_dots(b.count, scratch.twin_dots, scratch.dots);
      }
      store_grad_planes(t, b, k, owned);
    }
    if (p.grad_input == nullptr) continue;
    for (const Twin<A>& twin : twins) {
      scatter_tap(p, {t.band_begin(), t.band_end()}, b, twin.grad_input, scratch.nowhere.data(),
                  twin.source.row_stride, twin.source.column_stride, plan, s.stored,
                  twin.grad_columns + at, grad_row);
    }
  }
  for (const Twin<A>& twin : twins) {
    if (mine && p.grad_weight != nullptr) {
      multiply(Matrix<A>{twin.columns, 1, row}, twin.grad_output, t.f.out, columns, b.count,
               t.f.out, twin.grad_weight, t.f.out, true);
    }
    const Segment& of_twin = t.f.segments[twin.index];
    if (mine && p.grad_bias != nullptr && of_twin.group_low == 0) {
      add_grad_bias(t, piece, of_twin.group, twin.grad_output);
    }
  }
}

// ---- one task

// First channel of a segment in the image.
template <typename A>
int64_t channel_of(const Task<A>& t, const Segment& s) {
  return int64_t{s.slab} * t.p.offset_group_channels() + s.low;
}

// Rows range of the channels of a segment, rewritten as [row][column][channel].
template <typename A>
void read_window(const Task<A>& t, const Segment& s, const RowRange& rows, A* window) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t row_stride = int64_t{p.width} * s.stored;
  for (int64_t y = rows.low; y < rows.high; ++y) {
    const int64_t first =
        t.n * p.input_stride[0] + channel_of(t, s) * p.input_stride[1] + y * p.input_stride[2];
    gather_pixels({p.input, p.dtype, first, p.input_stride[3], p.input_stride[1]}, p.width,
                  s.channels, window + (y - rows.low) * row_stride, int64_t{s.stored});
  }
}

template <typename A>
void write_grad_input(const Task<A>& t, const Segment& s, const A* grad_window) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t row_stride = int64_t{p.width} * s.stored;
  for (int64_t y = t.band_begin(); y < t.band_end(); ++y) {
    const int64_t first = t.n * p.grad_input_stride[0] + channel_of(t, s) * p.grad_input_stride[1] +
                          y * p.width * p.grad_input_stride[2];
    scatter_pixels(grad_window + (y - t.band_begin()) * row_stride, int64_t{s.stored}, p.width,
                   s.channels,
                   {p.grad_input, p.dtype, first, p.grad_input_stride[2], p.grad_input_stride[1]});
  }
}

// Adds the task's grad_weight of the twins to the slot and begins anew.
template <typename A>
void flush_grad_weight(const Task<A>& t, const std::vector<Twin<A>>& twins, int slot) {
  if (t.p.grad_weight == nullptr) return;
  for (const Twin<A>& twin : twins) {
    const int64_t size = int64_t{t.f.columns_of(twin.index)} * t.f.out;
    A* to = t.f.grad_weight.data() + slot * t.f.slot_size + t.f.grad_at[twin.index];
    for (int64_t i = 0; i < size; ++i) to[i] += twin.grad_weight[i];
  }
  std::fill_n(t.scratch.grad_weight.data(), t.scratch.grad_weight.size(), A(0));
}

// The rows of input that the pieces of a task touch.
template <typename A>
RowRange rows_of(const Task<A>& t) {
  if (t.ranges == nullptr) return {0, t.p.height};
  RowRange rows{t.p.height, 0};
  for (size_t i = 0; i < t.f.pieces.size(); ++i) {
    if (!t.owns(t.f.pieces[i])) continue;
    rows = {std::min(rows.low, t.ranges[i].low), std::max(rows.high, t.ranges[i].high)};
  }
  return {rows.low, std::max(rows.low, rows.high)};
}

// A segment of the first twin, and those of the others at its side.
template <typename A>
void backward_segment(const Task<A>& t, int index, const Owned<A>& owned) {
  const ModulatedDeformConv2dParams& p = t.p;
  const Segment& s = t.f.segments[index];
  Scratch<A>& scratch = t.scratch;
  const int64_t row_stride = int64_t{p.width} * s.stored;
  const RowRange rows = rows_of(t);
  const int64_t window_size = (rows.high - rows.low) * row_stride;
  const int64_t grad_size = (t.band_end() - t.band_begin()) * row_stride;
  if (t.needs_samples()) scratch.window.resize(t.f.twins * window_size, s.stored != s.channels);
  if (p.grad_input != nullptr) scratch.grad_window.resize(t.f.twins * grad_size);
  std::vector<Twin<A>> twins;
  for (int64_t i = 0; i < t.f.twins; ++i) {
    const int of_twin = index + static_cast<int>(i * (t.f.segments.size() / t.f.twins));
    const auto part = [&](Buffer<A>& buffer) {
      return buffer.data() + i * (buffer.size() / t.f.twins);
    };
    A* window = scratch.window.data() + i * window_size;
    if (t.needs_samples()) read_window(t, t.f.segments[of_twin], rows, window);
    // As if source and grad_input began at row 0, of which they hold some rows only.
    const Source<A> source{window - rows.low * row_stride, row_stride, s.stored};
    A* grad_input = scratch.grad_window.data() + i * grad_size - t.band_begin() * row_stride;
    twins.push_back({of_twin, source, p.grad_input == nullptr ? nullptr : grad_input,
                     part(scratch.columns), part(scratch.grad_columns), part(scratch.grad_output),
                     part(scratch.grad_weight)});
  }
  int slot = -1;
  for (size_t i = 0; i < t.f.pieces.size(); ++i) {
    const Piece& piece = t.f.pieces[i];
    const bool reaches = p.grad_input != nullptr && t.ranges != nullptr &&
                         t.ranges[i].low < t.band_end() && t.ranges[i].high > t.band_begin();
    if (!t.owns(piece) && !reaches) continue;
    if (t.owns(piece) && piece.slot != slot) {
      if (slot >= 0) flush_grad_weight(t, twins, slot);
      slot = piece.slot;
    }
    backward_block(t, piece, owned, twins);
  }
  if (slot >= 0) flush_grad_weight(t, twins, slot);
  for (int i = 0; i < t.f.twins && p.grad_input != nullptr; ++i) {
    write_grad_input(t, t.f.segments[twins[i].index], scratch.grad_window.data() + i * grad_size);
  }
}

template <typename A>
void backward_task(const Task<A>& t) {
  const ModulatedDeformConv2dParams& p = t.p;
  std::vector<int> mine;
  for (size_t s = 0; s < t.f.segments.size() / t.f.twins; ++s) {
    if (t.f.segments[s].slab % p.offset_groups == t.offset_group)
      mine.push_back(static_cast<int>(s));
  }
  const int64_t first = t.f.first_pixel(p, t.band);
  const Owned<A> owned{first, t.f.first_pixel(p, t.band + 1) - first, mine.size() > 1};
  if (owned.summed) t.scratch.grad_planes.resize(3 * p.taps() * owned.pixels);
  for (const int s : mine) backward_segment(t, s, owned);
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

// grad_flow of some pixels: the offset groups' sums, planes of y and x, added in their order.
template <typename A>
void sum_flows(const ModulatedDeformConv2dParams& p, int64_t n, int64_t first, int64_t pixels,
               A* sums) {
  for (int which = 0; which < 2; ++which) {
    if (p.raw.grad_flow[which] == nullptr) continue;
    int begin = 0, end = p.offset_groups;
    while (p.raw.flow_of(begin, p.offset_groups) != which) ++begin;
    while (p.raw.flow_of(end - 1, p.offset_groups) != which) --end;
    torch::stable::parallel_for(0, 2, 1, [&](int64_t axis, int64_t stop) {
      for (; axis < stop; ++axis) {
        const auto plane = [&](int group) {
          return sums + (int64_t{2} * group + 1 - axis) * pixels;  // x is channel 0
        };
        for (int group = begin + 1; group < end; ++group) {
          for (int64_t i = 0; i < pixels; ++i) plane(begin)[i] += plane(group)[i];
        }
        scatter_pixels(
            plane(begin), 1, static_cast<int>(pixels), 1,
            {p.raw.grad_flow[which], p.raw.flow_dtype, 2 * (n * p.pixels() + first) + axis, 2, 1});
      }
    });
  }
}

template <typename A>
void backward(const ModulatedDeformConv2dParams& p) {
  Backward<A> f(p);
  const bool banded = f.bands > 1, with_flow = wants_flow(p);
  std::vector<RowRange> ranges(banded ? p.offset_groups * f.pieces.size() : 0);
  Buffer<A> flow_sums(0);
  for (int64_t n = 0; n < p.batch; ++n) {
    if (banded) find_ranges(p, f, n, ranges.data());
    for (int low = 0; low < f.bands; low += f.slice) {
      const int64_t first = f.first_pixel(p, low);
      const int64_t pixels = f.first_pixel(p, low + f.slice) - first;
      if (with_flow) flow_sums.resize(2 * p.offset_groups * pixels);
      torch::stable::parallel_for(
          0, int64_t{p.offset_groups} * f.slice, 1, [&](int64_t begin, int64_t end) {
            Scratch<A> scratch(f);
            for (int64_t i = begin; i < end; ++i) {
              const int g = static_cast<int>(i / f.slice);
              const int band = low + static_cast<int>(i % f.slice);
              const RowRange* mine = banded ? ranges.data() + g * f.pieces.size() : nullptr;
              A* grad_flow = with_flow ? flow_sums.data() + 2 * g * pixels : nullptr;
              backward_task(Task<A>{p, f, scratch, mine, grad_flow, first, pixels, n, g, band});
            }
          });
      if (with_flow) sum_flows(p, n, first, pixels, flow_sums.data());
    }
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
