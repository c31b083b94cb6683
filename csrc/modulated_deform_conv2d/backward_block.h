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
                     round_up(f.joined * f.max_columns, kColumnPad)),
        grad_output(static_cast<size_t>(f.twins) * kMaxBlock * f.out),
        grad_weight(static_cast<size_t>(f.joined * f.twins) * round_up(f.max_columns, kRowPad) *
                    f.out),
        grad_bias(f.out),
        window(0),
        grad_window(0),
        grad_planes(0),
        plan(1) {}
  // Of each twin; the last of each segment.
  Buffer<A> columns, grad_columns, grad_output, grad_weight;
  Buffer<double> grad_bias;       // of a block
  Buffer<A> window, grad_window;  // rows of input and of grad_input, of each segment
  Buffer<A> grad_planes;          // of grad_offset and grad_mask, summed over several segments
  Buffer<Plan<A>> plan;
  alignas(64) int64_t source_at[kMaxBlock], grad_source_at[kMaxBlock];  // corners of a tap
  alignas(64) A dots[kMaxBlock][4];  // of the four corners with grad_sample
  alignas(64) A twin_dots[kMaxBlock][4];
  alignas(64) A grad[3][kMaxBlock];  // dy, dx, mask
};

// One task, or what it does for one of several offset groups, with what all share.
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

// Where the gradients of a tap go.
template <typename A>
PlaneLines grad_lines(const Task<A>& t, int tap, int64_t pixel) {
  if (t.p.grad_offset == nullptr || t.p.grad_mask == nullptr) return {};
  const auto begin = [&](int kind) {
    const Elements<void*> plane = grad_plane(t, tap, kind, pixel);
    return static_cast<const char*>(plane.data) + plane.first * element_bytes(plane.dtype);
  };
  const int bytes = static_cast<int>(element_bytes(t.p.offset_dtype));
  return {begin(0), begin(2), begin(1) - begin(0), 0, bytes};
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
  // Where nothing is between, the gradients go straight to the tensors.
  Elements<void*> to[3];
  A* grad[3];
  for (int kind = 0; kind < 3; ++kind) {
    to[kind] = grad_plane(t, tap, kind, b.first);
    const bool direct = to[kind].data != nullptr && !owned.summed && is_of<A>(to[kind].dtype);
    grad[kind] = direct ? static_cast<A*>(to[kind].data) + to[kind].first : scratch.grad[kind];
  }
  combine_dots(b.count, plan, scratch.dots, grad);
  if (t.grad_flow != nullptr) {
    for (int kind = 0; kind < 2; ++kind) {
      A* sum = t.grad_flow + kind * t.flow_pixels + b.first - t.flow_first;
      for (int i = 0; i < b.count; ++i) sum[i] += grad[kind][i];
    }
  }
  for (int kind = 0; kind < 3; ++kind) {
    if (to[kind].data == nullptr) continue;
    if (p.raw.used) {
      for (int i = 0; i < b.count; ++i) grad[kind][i] *= plan.slope[kind][i];
    }
    if (owned.summed) {
      A* sum = summed_plane(t, tap, kind, b.first - owned.first, owned.pixels);
      for (int i = 0; i < b.count; ++i) sum[i] += grad[kind][i];
    } else if (grad[kind] == scratch.grad[kind]) {
      scatter_pixels(grad[kind], 0, 1, b.count, to[kind]);
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

// Where the windows of a segment hold rows of the input and of its gradient, at the same strides.
struct Windows {
  Place source, grad_source;
};

// What a twin of a segment works on in a block.
template <typename A>
struct Twin {
  int index;                // of its segment
  A *source, *grad_source;  // windows; the latter null: not wanted
  A *columns, *grad_columns, *buffer, *grad_weight;
  const A* grad_output = nullptr;  // rows of the block, perhaps in buffer
};

// What a task works on in a block for one offset group.
template <typename A>
struct Member {
  const Task<A>& t;
  Windows windows;
  std::vector<Twin<A>> twins;
};

// Samples a tap of the block for all twins and adds to their grad_input.
template <typename A>
void backward_tap(const Member<A>& m, const Block& b, int tap, bool sampled,
                  const PlaneLines& grads) {
  const Task<A>& t = m.t;
  const int taps = t.p.taps(), index = m.twins[0].index, stored = t.f.segments[index].stored;
  Scratch<A>& scratch = t.scratch;
  Plan<A>& plan = *scratch.plan.data();
  plan_tap(t.p, b, t.offset_group * taps + tap, plan);
  if (sampled) find_corners(plan, b.count, t.p.width, m.windows.source, scratch.source_at);
  if (t.p.grad_input != nullptr) {
    find_corners(plan, b.count, t.p.width, m.windows.grad_source, scratch.grad_source_at);
  }
  const bool last = tap + 1 == taps;
  const Block next{b.n, last ? b.first + b.count : b.first, 0};
  const PlaneLines next_lines =
      plane_lines(t.p, next, t.offset_group * taps + (last ? 0 : tap + 1));
  const int at = tap * stored, row = round_up(t.f.columns_of(index), kRowPad);
  for (const Twin<A>& twin : m.twins) {
    const bool first = &twin == m.twins.data();
    run_tap(
        Tap<A>{b.count, stored, m.windows.source.row_stride, m.windows.source.column_stride,
               sampled ? twin.source : nullptr, scratch.source_at, twin.grad_source,
               scratch.grad_source_at, twin.grad_columns + at, t.f.grad_row_of(index),
               twin.columns + at, row, first ? scratch.dots : scratch.twin_dots, next_lines, grads},
        plan);
    if (sampled && !first) add_dots(b.count, scratch.twin_dots, scratch.dots);
  }
}

// What follows from the gradients of a block's samples.
template <typename A>
void backward_samples(const Member<A>& m, const Piece& piece, const Block& b,
                      const Owned<A>& owned) {
  const Task<A>& t = m.t;
  const ModulatedDeformConv2dParams& p = t.p;
  const bool mine = t.owns(piece), sampled = mine && t.needs_samples();
  for (int k = 0; k < p.taps() && (sampled || p.grad_input != nullptr); ++k) {
    const bool planes_follow = sampled && !owned.summed;
    backward_tap(m, b, k, sampled, planes_follow ? grad_lines(t, k, b.first) : PlaneLines{});
    if (sampled) store_grad_planes(t, b, k, owned);
  }
  if (!mine) return;
  for (const Twin<A>& twin : m.twins) {
    const Segment& s = t.f.segments[twin.index];
    const int columns = t.f.columns_of(twin.index);
    if (p.grad_weight != nullptr) {
      multiply(Matrix<A>{twin.columns, 1, round_up(columns, kRowPad)}, twin.grad_output, t.f.out,
               columns, b.count, t.f.out, twin.grad_weight, t.f.out, true);
    }
    if (p.grad_bias != nullptr && s.group_low == 0) {
      add_grad_bias(t, piece, s.group, twin.grad_output);
    }
  }
}

// All members share the gradients of the output, and one product makes those of their samples.
template <typename A>
void backward_block(std::vector<Member<A>>& members, const Piece& piece, const Owned<A>& owned) {
  const Task<A>& t = members[0].t;
  const Block b{t.n, piece.first, piece.count};
  for (size_t i = 0; i < members[0].twins.size(); ++i) {
    const Twin<A>& twin = members[0].twins[i];
    const A* grad_output = grad_rows_of(t, b, t.f.segments[twin.index].group, twin.buffer);
    for (Member<A>& m : members) m.twins[i].grad_output = grad_output;
    const int row = t.f.grad_row_of(twin.index);
    multiply(Matrix<A>{grad_output, t.f.out, 1}, t.f.weight.data() + t.f.weight_at[twin.index], row,
             b.count, t.p.group_outputs(), row, twin.grad_columns, row, false);
  }
  plan_block(t.p, b, *t.scratch.plan.data());
  for (const Member<A>& m : members) backward_samples(m, piece, b, owned);
}

}  // namespace mafnet
