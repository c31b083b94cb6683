// How a backward pass on the CPU is cut up: bands of rows, slots, blocks; and its packed weight.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "common/pixels.h"
#include "modulated_deform_conv2d/cut.h"
#include "modulated_deform_conv2d/plan.h"

namespace mafnet {

// Channels that a task handles at a time: bounds its memory.
constexpr int kMaxChannels = 64;
// Parts of an image with sums of grad_weight of their own, at most; bounded by the memory of these.
constexpr int kMaxSlots = 32;
constexpr int64_t kSlotBytes = 20 << 20;
constexpr int64_t kSlotPixels = 768;  // at least: blocks are cut at the ends of slots
// Of the base flows' gradients by offset group: an image that needs more goes in slices of bands.
constexpr int64_t kFlowBytes = 4 << 20;
// Of grad_output as rows: a small image's are made once, a large one's anew in every task.
constexpr int64_t kRowsBytes = 16 << 20;
// Of a band of grad_input in a task, at most where slots allow: in or near the second cache.
constexpr int64_t kBandBytes = 4 << 20;

// Columns of the offset groups whose gradients of the samples are one matrix product, at most.
constexpr int kJoinedColumns = 160;

// Output pixels of one slot.
struct Piece {
  int64_t first;
  int count, slot;
};

template <typename A>
struct Backward {
  explicit Backward(const ModulatedDeformConv2dParams& p);

  int columns_of(int segment) const { return segments[segment].stored * taps; }
  // Of the gradients of the samples of the segments that are joined.
  int grad_row_of(int segment) const { return round_up(joined * columns_of(segment), kColumnPad); }

  // Rows of the image whose pieces a band owns, as its pixels.
  int64_t first_pixel(const ModulatedDeformConv2dParams& p, int band) const {
    return p.out_height * int64_t{band} * (slots / bands) / slots * p.out_width;
  }

  int taps, slots, bands;
  int slice;                    // bands between sums of the flows' gradients
  int out;                      // out channels of a group, padded
  int max_columns, max_stored;  // of a segment
  int twins;
  int joined;                               // offset groups of a task
  std::vector<Segment> segments;            // of all twins, those of the first first
  std::vector<int64_t> weight_at, grad_at;  // where a segment begins in weight, in a slot
  std::vector<Piece> pieces;                // of an image, in order
  int64_t slot_size;
  Buffer<A> grad_rows;    // grad_output of an image, [group][pixel][out channel], or nothing
  Buffer<A> weight;       // [joined segments][out channel][segment][tap][channel], rows padded
  Buffer<A> grad_weight;  // [slot][segment][tap][channel][out channel]
  Buffer<A> grad_bias;    // [slot][out channel]
};

inline int slots_of(const ModulatedDeformConv2dParams& p, int64_t weight_bytes) {
  int slots = 1;
  while (2 * slots <= kMaxSlots && 2 * slots <= std::min(p.out_height, p.height) &&
         2 * slots * kSlotPixels <= p.pixels() && 2 * slots * weight_bytes <= kSlotBytes) {
    slots *= 2;
  }
  return slots;
}

// Offset groups to be joined where that saves a fifth of their columns, which is padding, and tasks
// remain for all threads: at 4 channels and 9 taps a quarter. Not where one has several segments,
// nor across groups of the convolution. As with the bands, the number of threads may decide it, as
// it has no bearing on any sum.
inline int joined_of(const ModulatedDeformConv2dParams& p, int twins,
                     const std::vector<Segment>& segments) {
  if (segments.size() != static_cast<size_t>(twins) * p.offset_groups) return 1;
  const int columns = segments[0].stored * p.taps();
  const int of_group = std::max(1, p.parts * p.offset_groups / p.groups);
  for (const int joined : {4, 2}) {
    if (of_group % joined == 0 && joined * columns <= kJoinedColumns &&
        p.offset_groups / joined >= num_threads() &&
        5 * round_up(joined * columns, kColumnPad) <= 4 * joined * round_up(columns, kColumnPad)) {
      return joined;
    }
  }
  return 1;
}

// groups: of offsets, as the tasks of a band.
template <typename A>
int bands_of(const ModulatedDeformConv2dParams& p, int slots, int stored, int groups,
             int64_t flow_bytes) {
  const int64_t bytes = int64_t{p.height} * p.width * stored * sizeof(A);
  const int64_t tasks = num_threads();
  int bands = 1;
  while (bands < slots && (bytes > kBandBytes * bands || flow_bytes > kFlowBytes * bands ||
                           (groups * bands < tasks && p.height >= 64 * bands))) {
    bands *= 2;
  }
  return bands;
}

inline bool wants_flow(const ModulatedDeformConv2dParams& p) {
  return p.raw.grad_flow[0] != nullptr || p.raw.grad_flow[1] != nullptr;
}

inline int slice_of(int bands, int64_t bytes) {
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
      joined(1),
      segments(make_segments(p, kMaxChannels / std::min(twins, kMaxChannels))),
      slot_size(0),
      grad_rows(0),
      weight(0),
      grad_weight(0),
      grad_bias(0) {
  joined = joined_of(p, twins, segments);
  int64_t weight_size = 0;
  for (int s = 0; s < static_cast<int>(segments.size()); ++s) {
    const int columns = columns_of(s), before = s % joined;
    weight_at.push_back(before == 0 ? weight_size : weight_at[s - before] + before * columns);
    grad_at.push_back(slot_size);
    if (before == 0) weight_size += int64_t{p.group_outputs()} * grad_row_of(s);
    slot_size += int64_t{columns} * out;
    max_columns = std::max(max_columns, columns);
    max_stored = std::max(max_stored, segments[s].stored);
  }
  slots = slots_of(p, slot_size * sizeof(A));
  const int64_t flow_bytes =
      wants_flow(p) ? 2 * static_cast<int64_t>(sizeof(A)) * p.offset_groups * p.pixels() : 0;
  bands = p.grad_input == nullptr ? slots
                                  : bands_of<A>(p, slots, max_stored * twins * joined,
                                                p.offset_groups / joined, flow_bytes);
  slice = slice_of(bands, flow_bytes);
  for (int slot = 0; slot < slots; ++slot) {
    const int64_t end = p.out_height * (slot + int64_t{1}) / slots * p.out_width;
    for (int64_t first = p.out_height * int64_t{slot} / slots * p.out_width; first < end;
         first += kMaxBlock) {
      pieces.push_back({first, static_cast<int>(std::min<int64_t>(kMaxBlock, end - first)), slot});
    }
  }
  const int64_t rows_size = p.groups * p.pixels() * out;
  if (rows_size * static_cast<int64_t>(sizeof(A)) <= kRowsBytes) {
    grad_rows.resize(rows_size + int64_t{kMaxBlock} * out);  // products read whole tiles of rows
  }
  weight.resize(weight_size);
  if (p.grad_weight != nullptr) grad_weight.resize(slots * slot_size);
  if (p.grad_bias != nullptr) grad_bias.resize(int64_t{slots} * p.out_channels);
  with_dtype<A>(p.dtype, [&](auto type) {
    const auto* from = static_cast<const typename decltype(type)::type*>(p.weight);
    for_weight_blocks(p, segments, [&](const WeightBlock& b) {
      const int64_t row = grad_row_of(b.segment);
      for (int o = 0; o < b.outputs; ++o) {
        A* to = weight.data() + weight_at[b.segment] + (b.output + o) * row;
        for (int e = 0; e < b.elements; ++e) {
          to[b.column(e)] = static_cast<A>(from[b.from + o * b.row + e]);
        }
      }
    });
  });
}

}  // namespace mafnet
