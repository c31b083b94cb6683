// The backward pass of one block of output pixels on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "modulated_deform_conv2d/backward_cut.h"
#include "modulated_deform_conv2d/backward_taps.h"

namespace mafnet {

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
void make_grad_rows(const ModulatedDeformConv2dParams& p, const Block& b, int group, A* grad,
                    int64_t row) {
  const int64_t first = b.n * p.grad_output_stride[0] + b.first * p.grad_output_stride[2] +
                        int64_t{group} * p.group_outputs() * p.grad_output_stride[1];
  gather_pixels({p.grad_output, p.dtype, first, p.grad_output_stride[2], p.grad_output_stride[1]},
                b.count, p.group_outputs(), grad, row);
}

// The same where they are made already, else in buffer.
template <typename A>
const A* grad_rows_of(const Task<A>& t, const Block& b, int group, A* buffer) {
  if (t.f.grad_rows.size() > 0) {
    return t.f.grad_rows.data() + (group * t.p.pixels() + b.first) * t.f.out;
  }
  make_grad_rows(t.p, b, group, buffer, t.f.out);
  return buffer;
}

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
  A *columns, *grad_columns, *buffer, *grad_weight;
  const A* grad_output = nullptr;  // rows of the block, perhaps in buffer
};

template <typename A>
void backward_block(const Task<A>& t, const Piece& piece, const Owned<A>& owned,
                    std::vector<Twin<A>>& twins) {
  const ModulatedDeformConv2dParams& p = t.p;
  const Segment& s = t.f.segments[twins[0].index];
  Scratch<A>& scratch = t.scratch;
  Plan<A>& plan = *scratch.plan.data();
  const Block b{t.n, piece.first, piece.count};
  const int columns = t.f.columns_of(twins[0].index);
  const int row = round_up(columns, kRowPad), grad_row = round_up(columns, kColumnPad);
  const bool mine = t.owns(piece);
  for (Twin<A>& twin : twins) {
    twin.grad_output = grad_rows_of(t, b, t.f.segments[twin.index].group, twin.buffer);
    multiply(Matrix<A>{twin.grad_output, t.f.out, 1}, t.f.weight.data() + t.f.weight_at[twin.index],
             grad_row, b.count, p.group_outputs(), grad_row, twin.grad_columns, grad_row, false);
  }
  plan_block(p, b, plan);
  for (int k = 0; k < p.taps(); ++k) {
    const int at = k * s.stored;
    const Source<A>& source = twins[0].source;
    plan_tap(p, b, source.row_stride, source.column_stride, s.slab % p.offset_groups * p.taps() + k,
             plan);
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

}  // namespace mafnet
