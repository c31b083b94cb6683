// modulated_deform_conv2d on the CPU, forward:
// y(p) = bias + sum_k W_k * (mask_k(p) * x(p * stride - padding + k * dilation + offset_k(p))),
// sampled bilinearly, zero outside.
//
// Output pixels go in blocks of one image. Of a block the samples of some 64 to 96 channels and
// taps are written side by side, columns[pixel][offset group][tap][channel]; a matrix product with
// the packed weight follows and adds to the block's sums. While it runs, the samples of the next
// block are taken (forward_products.h). No column buffer of the image ever exists. All taps of an
// offset group come together, as they read the same few rows: with taps outside and offset groups
// inside nearly every sample missed the first cache.
//
// For the same reason the input is first rewritten as [offset group][row][column][channel]
// (forward_window.h): small images whole, large ones in bands of output rows, each with the rows of
// input that its samples touch, so that the memory is bounded.
#include "common/fresh_memory.h"
#include "common/gemm_bf16.h"
#include "common/parallel.h"
#include "common/pixels.h"
#include "modulated_deform_conv2d/cut.h"
#include "modulated_deform_conv2d/forward_products.h"
#include "modulated_deform_conv2d/forward_window.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {
namespace {

// Blocks that a task takes together: 16 x 96 pixels are a few rows.
constexpr int kRun = 16;

// Of rewritten input; more only where offsets are wild in a large image.
constexpr int64_t kWindowBytes = 32 << 20;

// Out channels that lie side by side in the weight: as many as the widest tile of sums has, so that
// a product reads the weight as it lies.
constexpr int kPanel = 64;

// Out channels that are written together.
constexpr int kPlanes = 16;

// How a forward pass is cut up, and its weight: panels of out channels, in each a row for each
// column. S is what samples and what they are made of are kept in: A, or uint16_t for the bits of
// bfloat16 where there are products in it. Then samples are rounded to bfloat16, as PyTorch's own
// convolution of them would be.
template <typename A, typename S>
struct Forward {
  static constexpr bool kInBf16 = !std::is_same_v<A, S>;

  explicit Forward(const ModulatedDeformConv2dParams& p);

  // The weight of row `row` in the panel that begins at out channel `output`, and how many follow.
  int width(int output) const { return std::min(panel, out - output); }
  int64_t at(int64_t row, int output) const { return rows * output + row * width(output); }

  // Of the channels of a chunk, its segments and weight in the next twin.
  int next_segment() const { return static_cast<int>(segments.size()) / twins; }
  int64_t next_row() const { return rows / twins; }

  // Of a block of samples.
  int64_t columns_size() const {
    return kInBf16 ? bf16_elements(block, row) : int64_t{block} * row;
  }

  int twins;
  std::vector<Segment> segments;
  std::vector<Chunk> chunks;  // of the first twin
  int64_t rows;               // of the weight
  int block;                  // pixels
  int row;                    // of columns
  int max_taps;               // of a chunk
  int out;                    // out channels of a group, padded
  int panel;                  // out channels at most
  Buffer<A> weight, bias;     // bias: [group][out]
  Buffer<uint16_t> packed;    // in bfloat16: the weight of each chunk and twin, from packed_at on
  std::vector<int64_t> packed_at;
};

template <typename A, typename S>
Forward<A, S>::Forward(const ModulatedDeformConv2dParams& p)
    : twins(twins_of(p)),
      segments(make_segments(p, p.channels)),
      chunks(make_chunks(segments, next_segment(), p.taps(), kInBf16 ? kBf16Depth : kDepth)),
      rows(segments.back().row + int64_t{segments.back().stored} * p.taps()),
      block(p.out_channels <= 128 ? kMaxBlock : kMaxBlock / 2),
      row(kColumnPad),
      max_taps(0),
      out(round_up(p.group_outputs(), kColumnPad)),
      panel(out),
      weight(static_cast<size_t>(rows) * out),
      bias(static_cast<size_t>(p.groups) * out),
      packed(0) {
  for (const Chunk& chunk : chunks) {
    row = std::max(row, round_up(chunk.depth, kColumnPad));
    max_taps = std::max(max_taps, chunk.all_taps());
  }
  // Five vectors are one tile too; bfloat16 is packed from whole rows below.
  if (out > 5 * kColumnPad && !kInBf16) panel = kPanel;
  with_dtype<A>(p.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* from = static_cast<const T*>(p.weight);
    for_weight_blocks(p, segments, [&](const WeightBlock& b) {
      A rows_of[WeightBlock::kElements][WeightBlock::kOutputs] = {};
      for (int o = 0; o < b.outputs; ++o) {
        for (int e = 0; e < b.elements; ++e) {
          rows_of[e][o] = static_cast<A>(from[b.from + o * b.row + e]);
        }
      }
      const int begin = b.output / panel * panel;
      for (int e = 0; e < b.elements; ++e) {
        A* to = weight.data() + at(segments[b.segment].row + b.column(e), begin);
        std::copy_n(rows_of[e], WeightBlock::kOutputs, to + (b.output - begin));
      }
    });
    if (p.bias == nullptr) return;
    for (int o = 0; o < p.out_channels; ++o) {
      bias.data()[o / p.group_outputs() * out + o % p.group_outputs()] =
          static_cast<A>(static_cast<const T*>(p.bias)[o]);
    }
  });
  if constexpr (kInBf16) {
    int64_t size = 0;
    for (const Chunk& chunk : chunks) {
      for (int twin = 0; twin < twins; ++twin) {
        packed_at.push_back(size);
        size += bf16_elements(out, chunk.depth);
      }
    }
    packed.resize(size);
    for (size_t i = 0; i < packed_at.size(); ++i) {
      const Chunk& chunk = chunks[i / twins];
      const int64_t first = chunk.row + static_cast<int64_t>(i % twins) * next_row();
      pack_bf16_columns(weight.data() + first * out, out, chunk.depth, out,
                        packed.data() + packed_at[i]);
    }
  }
}

// Buffers of one task.
template <typename A, typename S>
struct Scratch {
  Scratch(const ModulatedDeformConv2dParams& p, const Forward<A, S>& f)
      : columns{Buffer<S>(f.columns_size()), Buffer<S>(f.columns_size())},
        sums(static_cast<size_t>(kRun) * p.groups * f.block * f.out),
        samples(f.max_taps + 1),
        plan(1) {}
  Buffer<S> columns[2];  // of the product under way, and of the next one
  Buffer<A> sums;
  Buffer<Samples<A>> samples;  // of a chunk, and one more to look ahead into
  Buffer<Plan<A>> plan;
};

// The output pixels first .. end of image n, kRun blocks at most, chunk by chunk: what a chunk
// reads of the image, of the offsets and of the weight stays in the caches from one block to the
// next.
template <typename A, typename S>
void forward_blocks(const ModulatedDeformConv2dParams& p, const Forward<A, S>& f, int64_t n,
                    int64_t first, int64_t end, const Window<S>& window, Scratch<A, S>& scratch) {
  Plan<A>& plan = *scratch.plan.data();
  const int64_t sums_size = int64_t{f.block} * f.out;
  const auto sums_of = [&](int64_t block, int group) {
    return scratch.sums.data() + (block * p.groups + group) * sums_size;
  };
  const int64_t blocks = (end - first + f.block - 1) / f.block;
  const auto block_of = [&](int64_t block) {
    const int64_t begin = first + block * f.block;
    return Block{n, begin, static_cast<int>(std::min<int64_t>(f.block, end - begin))};
  };
  for (int64_t block = 0; block < blocks; ++block) {
    for (int group = 0; group < p.groups; ++group) {
      A* sums = sums_of(block, group);
      for (int i = 0; i < f.block; ++i)
        std::copy_n(f.bias.data() + group * f.out, f.out, sums + i * f.out);
    }
  }
  struct Pending {
    const S* columns;
    size_t chunk;
    int twin, pixels;
    A* sums;
  } pending{};
  const auto multiply_pending = [&](const Sampling<A, S>& sampling) {
    const Chunk& chunk = f.chunks[pending.chunk];
    if constexpr (f.kInBf16) {
      const uint16_t* weight =
          f.packed.data() + f.packed_at[pending.chunk * f.twins + pending.twin];
      multiply_and_sample({pending.columns, chunk.depth, weight, pending.pixels, chunk.depth, f.out,
                           pending.sums, f.out},
                          sampling);
    } else {
      const int64_t row = chunk.row + pending.twin * f.next_row();
      for (int o = 0; o < f.out; o += f.panel) {
        multiply_and_sample({pending.columns, f.row, f.weight.data() + f.at(row, o), pending.pixels,
                             chunk.depth, f.width(o), pending.sums + o, f.out},
                            o == 0 ? sampling : Sampling<A, S>{});
      }
    }
  };
  int buffer = 0;
  const int64_t next_slabs = f.twins == 1 ? 0 : f.segments[f.next_segment()].slab;
  const int64_t count = static_cast<int64_t>(f.chunks.size()) * blocks;
  const auto plane_of = [&](const Chunk& chunk, int segment) {
    const int slab = f.segments[chunk.segment + segment].slab;
    return slab % p.offset_groups * p.taps() + chunk.tap;
  };
  for (int64_t i = 0; i < count; ++i) {
    const Chunk& chunk = f.chunks[i / blocks];
    const Block b = block_of(i % blocks);
    plan_block(p, b, plan);
    for (int of_chunk = 0; of_chunk < chunk.segments; ++of_chunk) {
      const Segment& s = f.segments[chunk.segment + of_chunk];
      plan_samples(p, b, window.place_of(s.slab, s.low), plane_of(chunk, of_chunk), chunk.taps,
                   plan, scratch.samples.data() + of_chunk * chunk.taps);
    }
    PlaneLines next;
    if (i + 1 < count) {
      next = plane_lines(p, block_of((i + 1) % blocks), plane_of(f.chunks[(i + 1) / blocks], 0));
    }
    for (int twin = 0; twin < f.twins; ++twin) {
      S* columns = scratch.columns[buffer].data();
      buffer = 1 - buffer;
      const S* source = window.data.data() + twin * next_slabs * window.slab_size();
      multiply_pending({scratch.samples.data(), chunk.all_taps(), b.count, chunk.stored, source,
                        window.row_stride, window.column_stride, columns,
                        f.kInBf16 ? chunk.depth : f.row, next});
      if constexpr (f.kInBf16) pad_bf16_rows(b.count, chunk.depth, columns);
      pending = {columns, static_cast<size_t>(i / blocks), twin, b.count,
                 sums_of(i % blocks, chunk.group + twin * (p.groups / f.twins))};
    }
  }
  multiply_pending({});
  for (int group = 0; group < p.groups; ++group) {
    // A few planes of all blocks at a time: each is a page of its own for the TLB.
    for (int o = 0; o < p.group_outputs(); o += kPlanes) {
      for (int64_t block = 0; block < blocks; ++block) {
        const Block b = block_of(block);
        const int64_t at = n * p.output_stride[0] + b.first * p.output_stride[2] +
                           (int64_t{group} * p.group_outputs() + o) * p.output_stride[1];
        scatter_pixels(sums_of(block, group) + o, f.out, b.count,
                       std::min(kPlanes, p.group_outputs() - o),
                       {p.output, p.dtype, at, p.output_stride[2], p.output_stride[1]});
      }
    }
  }
}

// The rows of input that some output rows touch.
template <typename A>
RowRange touched_rows(const ModulatedDeformConv2dParams& p, int64_t n, int64_t row, int64_t end) {
  std::vector<RowRange> ranges(static_cast<size_t>((end - row) * p.offset_groups));
  parallel_for(0, static_cast<int64_t>(ranges.size()), 4, [&](int64_t begin, int64_t stop) {
    Buffer<Plan<A>> plan(1);
    for (int64_t i = begin; i < stop; ++i) {
      RowRange all{p.height, 0};
      for (int x = 0; x < p.out_width; x += kMaxBlock) {
        const Block b{n, (row + i / p.offset_groups) * p.out_width + x,
                      std::min(kMaxBlock, p.out_width - x)};
        const int g = static_cast<int>(i % p.offset_groups);
        const RowRange range = touched_rows(p, b, g, *plan.data());
        all = {std::min(all.low, range.low), std::max(all.high, range.high)};
      }
      ranges[i] = all;
    }
  });
  RowRange all{p.height, 0};
  for (const RowRange& r : ranges) all = {std::min(all.low, r.low), std::max(all.high, r.high)};
  return {std::min(all.low, all.high), all.high};
}

template <typename A, typename S = A>
void forward(const ModulatedDeformConv2dParams& p) {
  const Forward<A, S> f(p);
  Window<S> window(p);
  const int64_t row_bytes = window.slabs * window.row_stride * sizeof(S);
  const bool whole = p.height * row_bytes <= kWindowBytes;
  // Half of the window for the rows right below a band, half for taps and offsets.
  const int64_t band =
      whole ? p.out_height : std::max<int64_t>(kWindowBytes / 2 / row_bytes / p.stride_h, 1);
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t row = 0; row < p.out_height; row += band) {
      const int64_t end_row = std::min<int64_t>(p.out_height, row + band);
      const RowRange rows = whole ? RowRange{0, p.height} : touched_rows<A>(p, n, row, end_row);
      read_window<A>(p, n, rows, window);
      const int64_t first = row * p.out_width, end = end_row * p.out_width;
      const int64_t blocks = (end - first + f.block - 1) / f.block;
      // Enough tasks for all threads; what they are has no bearing on the sums of a pixel.
      const int64_t run = f.block * std::clamp<int64_t>(blocks / (4 * num_threads()), 1, kRun);
      parallel_for(0, (end - first + run - 1) / run, 1, [&](int64_t begin, int64_t stop) {
        Scratch<A, S> scratch(p, f);
        for (int64_t task = begin; task < stop; ++task) {
          forward_blocks(p, f, n, first + task * run, std::min(end, first + (task + 1) * run),
                         window, scratch);
        }
      });
    }
  }
}

}  // namespace

int launch_modulated_deform_conv2d_forward(const ModulatedDeformConv2dParams& p, void*) {
  if (p.batch * p.pixels() == 0) return 0;
  prepare_output(p.output, p.batch * p.out_channels * p.pixels() * element_bytes(p.dtype));
  if (p.dtype == Dtype::kFloat64) {
    forward<double>(p);
  } else if (p.dtype == Dtype::kBFloat16 && has_bf16_products()) {
    forward<float, uint16_t>(p);
  } else {
    forward<float>(p);
  }
  return 0;
}

}  // namespace mafnet
