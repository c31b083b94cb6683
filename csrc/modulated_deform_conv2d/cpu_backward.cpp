// modulated_deform_conv2d on the CPU, backward.
//
// A task is one band of rows of grad_input of one offset group, or of a few where their columns
// fill vectors better together; only this task writes it. It visits the blocks of output pixels
// that it owns, and those that reach into its band, in raster order. Of a block it makes the
// gradients of the samples by one matrix product with the weight,
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
#include "common/fresh_memory.h"
#include "common/parallel.h"
#include "modulated_deform_conv2d/backward_block.h"

namespace mafnet {
namespace {

// ---- one task

// First channel of a segment in the image.
template <typename A>
int64_t channel_of(const Task<A>& t, const Segment& s) {
  return int64_t{s.slab} * t.p.offset_group_channels() + s.low;
}

// Rows of the channels of a segment, rewritten as [row][column][channel], with a border of zeros.
template <typename A>
void read_window(const Task<A>& t, const Segment& s, const Place& place, A* window) {
  const ModulatedDeformConv2dParams& p = t.p;
  const int64_t border = kBorder * place.column_stride;
  A* row = window + place.first + place.rows.low * place.row_stride;
  std::fill(window, row, A(0));
  for (int64_t y = place.rows.low; y < place.rows.high; ++y, row += place.row_stride) {
    const int64_t first =
        t.n * p.input_stride[0] + channel_of(t, s) * p.input_stride[1] + y * p.input_stride[2];
    gather_pixels({p.input, p.dtype, first, p.input_stride[3], p.input_stride[1]}, p.width,
                  s.channels, row, place.column_stride);
    std::fill_n(row + place.row_stride - border, border, A(0));
  }
  std::fill(row, window + window_size(place), A(0));
}

template <typename A>
void write_grad_input(const Task<A>& t, const Segment& s, const Place& place, const A* window) {
  const ModulatedDeformConv2dParams& p = t.p;
  for (int64_t y = place.rows.low; y < place.rows.high; ++y) {
    const int64_t first = t.n * p.grad_input_stride[0] + channel_of(t, s) * p.grad_input_stride[1] +
                          y * p.width * p.grad_input_stride[2];
    scatter_pixels(window + place.first + y * place.row_stride, place.column_stride, p.width,
                   s.channels,
                   {p.grad_input, p.dtype, first, p.grad_input_stride[2], p.grad_input_stride[1]});
  }
}

// Adds the task's grad_weight to the slot and begins anew.
template <typename A>
void flush_grad_weight(const std::vector<Member<A>>& members, int slot) {
  const Task<A>& t = members[0].t;
  if (t.p.grad_weight == nullptr) return;
  for (const Member<A>& m : members) {
    for (const Twin<A>& twin : m.twins) {
      const int64_t size = int64_t{t.f.columns_of(twin.index)} * t.f.out;
      A* to = t.f.grad_weight.data() + slot * t.f.slot_size + t.f.grad_at[twin.index];
      for (int64_t i = 0; i < size; ++i) to[i] += twin.grad_weight[i];
    }
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

// The windows and buffers of a segment of the first twin of the first offset group, and of those at
// its side.
template <typename A>
std::vector<Member<A>> make_members(const std::vector<Task<A>>& tasks, int index) {
  const Task<A>& first = tasks[0];
  const Segment& s = first.f.segments[index];
  const int64_t twins = first.f.twins;
  Scratch<A>& scratch = first.scratch;
  std::vector<Member<A>> members;
  int64_t size = 0, grad_size = 0;
  for (const Task<A>& t : tasks) {
    const RowRange band{t.band_begin(), t.band_end()};
    members.push_back(
        {t,
         {make_place(rows_of(t), t.p.width, s.stored), make_place(band, t.p.width, s.stored)},
         {}});
    size += twins * window_size(members.back().windows.source);
    grad_size += twins * window_size(members.back().windows.grad_source);
  }
  if (first.needs_samples()) scratch.window.resize(size, s.stored != s.channels);
  if (first.p.grad_input != nullptr) scratch.grad_window.resize(grad_size);
  A *source = scratch.window.data(), *grad_source = scratch.grad_window.data();
  for (int64_t j = 0; j < static_cast<int64_t>(members.size()); ++j) {
    Member<A>& m = members[j];
    for (int64_t i = 0; i < twins; ++i) {
      const auto part = [&](Buffer<A>& buffer, int64_t part, int64_t parts) {
        return buffer.data() + part * (buffer.size() / parts);
      };
      const int of_twin = static_cast<int>(index + j + i * (first.f.segments.size() / twins));
      if (first.needs_samples()) {
        read_window(first, first.f.segments[of_twin], m.windows.source, source);
      }
      m.twins.push_back({of_twin, source, first.p.grad_input == nullptr ? nullptr : grad_source,
                         part(scratch.columns, i, twins),
                         part(scratch.grad_columns, i, twins) + j * first.f.columns_of(index),
                         part(scratch.grad_output, i, twins),
                         part(scratch.grad_weight, j * twins + i, first.f.joined * twins)});
      source += window_size(m.windows.source);
      grad_source += window_size(m.windows.grad_source);
    }
  }
  return members;
}

template <typename A>
void backward_segments(const std::vector<Task<A>>& tasks, int index, const Owned<A>& owned) {
  const Task<A>& first = tasks[0];
  std::vector<Member<A>> members = make_members(tasks, index);
  int slot = -1;
  for (size_t i = 0; i < first.f.pieces.size(); ++i) {
    const Piece& piece = first.f.pieces[i];
    const auto reaches = [&](const Task<A>& t) {
      return t.p.grad_input != nullptr && t.ranges != nullptr && t.ranges[i].low < t.band_end() &&
             t.ranges[i].high > t.band_begin();
    };
    const bool mine = first.owns(piece);
    if (!mine && std::none_of(tasks.begin(), tasks.end(), reaches)) continue;
    if (mine && piece.slot != slot) {
      if (slot >= 0) flush_grad_weight(members, slot);
      slot = piece.slot;
    }
    backward_block(members, piece, owned);
  }
  if (slot >= 0) flush_grad_weight(members, slot);
  if (first.p.grad_input == nullptr) return;
  for (const Member<A>& m : members) {
    for (const Twin<A>& twin : m.twins) {
      write_grad_input(first, first.f.segments[twin.index], m.windows.grad_source,
                       twin.grad_source);
    }
  }
}

// Offset groups that are joined, as a task of each.
template <typename A>
void backward_tasks(const std::vector<Task<A>>& tasks) {
  const Task<A>& t = tasks[0];
  const ModulatedDeformConv2dParams& p = t.p;
  std::vector<int> mine;
  for (size_t s = 0; s < t.f.segments.size() / t.f.twins; ++s) {
    if (t.f.segments[s].slab % p.offset_groups == t.offset_group)
      mine.push_back(static_cast<int>(s));
  }
  const int64_t first = t.f.first_pixel(p, t.band);
  const Owned<A> owned{first, t.f.first_pixel(p, t.band + 1) - first, mine.size() > 1};
  if (owned.summed) t.scratch.grad_planes.resize(3 * p.taps() * owned.pixels);
  for (const int s : mine) backward_segments(tasks, s, owned);
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
  parallel_for(0, p.offset_groups * count, 16, [&](int64_t begin, int64_t end) {
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
      for_weight_blocks(p, f.segments, [&](const WeightBlock& b) {
        A sums[WeightBlock::kElements][WeightBlock::kOutputs] = {};
        for (int slot = 0; slot < f.slots; ++slot) {
          const A* from = f.grad_weight.data() + slot * f.slot_size + f.grad_at[b.segment];
          for (int e = 0; e < b.elements; ++e) {
            const A* row = from + int64_t{b.column(e)} * f.out + b.output;
            for (int o = 0; o < WeightBlock::kOutputs; ++o) sums[e][o] += row[o];
          }
        }
        for (int o = 0; o < b.outputs; ++o) {
          T* to = static_cast<T*>(p.grad_weight) + b.from + o * b.row;
          for (int e = 0; e < b.elements; ++e) to[e] = static_cast<T>(sums[e][o]);
        }
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
    parallel_for(0, 2, 1, [&](int64_t axis, int64_t stop) {
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
void make_grad_rows(const ModulatedDeformConv2dParams& p, int64_t n, Backward<A>& f) {
  const int64_t blocks = (p.pixels() + kMaxBlock - 1) / kMaxBlock;
  parallel_for(0, p.groups * blocks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / blocks, first = i % blocks * kMaxBlock;
      const Block b{n, first, static_cast<int>(std::min<int64_t>(kMaxBlock, p.pixels() - first))};
      make_grad_rows(p, b, static_cast<int>(group),
                     f.grad_rows.data() + (group * p.pixels() + first) * f.out, f.out);
    }
  });
}

template <typename A>
void backward(const ModulatedDeformConv2dParams& p) {
  Backward<A> f(p);
  const bool banded = f.bands > 1, with_flow = wants_flow(p);
  std::vector<RowRange> ranges(banded ? p.offset_groups * f.pieces.size() : 0);
  Buffer<A> flow_sums(0);
  for (int64_t n = 0; n < p.batch; ++n) {
    if (banded) find_ranges(p, f, n, ranges.data());
    if (f.grad_rows.size() > 0) make_grad_rows(p, n, f);
    for (int low = 0; low < f.bands; low += f.slice) {
      const int64_t first = f.first_pixel(p, low);
      const int64_t pixels = f.first_pixel(p, low + f.slice) - first;
      if (with_flow) flow_sums.resize(2 * p.offset_groups * pixels);
      parallel_for(0, p.offset_groups / f.joined * f.slice, 1, [&](int64_t begin, int64_t end) {
        Scratch<A> scratch(f);
        for (int64_t i = begin; i < end; ++i) {
          const int group = static_cast<int>(i / f.slice) * f.joined;
          const int band = low + static_cast<int>(i % f.slice);
          std::vector<Task<A>> tasks;
          for (int g = group; g < group + f.joined; ++g) {
            const RowRange* mine = banded ? ranges.data() + g * f.pieces.size() : nullptr;
            A* grad_flow = with_flow ? flow_sums.data() + 2 * g * pixels : nullptr;
            tasks.push_back(Task<A>{p, f, scratch, mine, grad_flow, first, pixels, n, g, band});
          }
          backward_tasks(tasks);
        }
      });
      if (with_flow) sum_flows(p, n, first, pixels, flow_sums.data());
    }
  }
  sum_slots(p, f);
}

}  // namespace

int launch_modulated_deform_conv2d_backward(const ModulatedDeformConv2dParams& p, void*) {
  const auto prepare = [&](void* data, Dtype dtype, int64_t elements) {
    if (data != nullptr) prepare_output(data, p.batch * elements * element_bytes(dtype));
  };
  prepare(p.grad_input, p.dtype, int64_t{p.channels} * p.height * p.width);
  // Of raw offsets the masks' are the last part of the same tensor.
  prepare(p.grad_offset, p.offset_dtype, p.grad_offset_planes() * p.pixels());
  if (!p.raw.used) prepare(p.grad_mask, p.mask_dtype, p.grad_mask_planes() * p.pixels());
  if (p.dtype == Dtype::kFloat64) {
    backward<double>(p);
  } else {
    backward<float>(p);
  }
  return 0;
}

}  // namespace mafnet
