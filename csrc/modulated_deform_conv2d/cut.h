// How the channels and taps of modulated_deform_conv2d are cut into the matrix products of a block,
// and the weight packed in that order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/gemm.h"
#include "common/parallel.h"
#include "common/vectors.h"
#include "modulated_deform_conv2d/params.h"

namespace mafnet {

// Channels of an image that is rewritten for sampling go by four, so that vectors have no
// remainder; what is added is zero.
constexpr int kChannelPad = 4;

// Products per element of a matrix product: enough to pay for reading and writing the sums.
constexpr int kDepth = 64;
// In bfloat16, where tile registers take 32 at a time: more, so that little of it is padding.
constexpr int kBf16Depth = 192;

// The channels that an offset group of a part and a group of the convolution share. They take
// `stored` columns per tap: the padding of the offset group too, where the segment is all of it.
struct Segment {
  int slab;       // part * offset groups + offset group
  int group;      // of the convolution
  int low;        // in the slab
  int group_low;  // in the group
  int channels, stored;
  int64_t row;  // of the packed weight, where its columns of all taps begin
};

// The segments in the order of their channels, none of more than max_channels.
inline std::vector<Segment> make_segments(const ModulatedDeformConv2dParams& p, int max_channels) {
  std::vector<Segment> segments;
  const int of_offset = p.offset_group_channels(), of_group = p.group_channels();
  int64_t row = 0;
  for (int low = 0; low < p.channels;) {
    Segment s{low / of_offset, low / of_group, low % of_offset, low % of_group, 0, 0, row};
    s.channels = std::min({of_offset - s.low, of_group - s.group_low, max_channels});
    s.stored = s.channels == of_offset ? round_up(of_offset, kChannelPad) : s.channels;
    low += s.channels;
    row += int64_t{s.stored} * p.taps();
    segments.push_back(s);
  }
  return segments;
}

// Parts whose segments are those of the first, shifted: they can share a plan. Where groups cross
// the parts, as if there were one.
inline int twins_of(const ModulatedDeformConv2dParams& p) {
  return p.groups % p.parts == 0 ? p.parts : 1;
}

// Some taps of some segments, each of `stored` columns: a matrix product of depth `depth`, whose
// weight begins at row `row`.
struct Chunk {
  int all_taps() const { return segments * taps; }

  int group, segment, segments, tap, taps;
  int stored, depth;
  int64_t row;
};

// Cuts the first count segments into chunks of about some depth: several whole ones where they are
// small, else some taps of one.
inline std::vector<Chunk> make_chunks(const std::vector<Segment>& segments, int count, int taps,
                                      int depth) {
  std::vector<Chunk> chunks;
  for (int s = 0; s < count;) {
    const int stored = segments[s].stored, group = segments[s].group;
    if (stored * taps < 2 * depth) {
      Chunk chunk{group, s, 0, 0, taps, stored, 0, segments[s].row};
      do {
        chunk.depth += stored * taps;
        ++chunk.segments;
        ++s;
      } while (s < count && segments[s].group == group && segments[s].stored == stored &&
               chunk.depth + stored * taps <= 3 * depth / 2);
      chunks.push_back(chunk);
      continue;
    }
    const int parts = std::max(1, stored * taps / depth), step = (taps + parts - 1) / parts;
    for (int k = 0; k < taps; k += step) {
      const int some = std::min(step, taps - k);
      const int64_t row = segments[s].row + k * stored;
      chunks.push_back({group, s, 1, k, some, stored, some * stored, row});
    }
    ++s;
  }
  return chunks;
}

// Some elements of the weight: element e of out channel o, both counted from the block's first,
// lies at from + o * row + e, and belongs in column column(e) of the segment, in the order
// [tap][stored channel].
struct WeightBlock {
  static constexpr int kOutputs = 16;  // a line of the cache of them
  static constexpr int kElements = 64;
  int column(int e) const { return (first + e) % taps * stored + (first + e) / taps; }

  int segment;
  int output, outputs;  // of the group, the first a multiple of kOutputs
  int elements;
  int64_t from, row;
  int first, taps, stored;
};

// Calls body(block) until all of the weight has come; threads share it by out channels.
template <typename Body>
void for_weight_blocks(const ModulatedDeformConv2dParams& p, const std::vector<Segment>& segments,
                       const Body& body) {
  constexpr int kOutputs = WeightBlock::kOutputs, kElements = WeightBlock::kElements;
  const int outputs = p.group_outputs(), taps = p.taps();
  const int64_t row = int64_t{p.group_channels()} * taps;
  // A few thousand elements are not worth a thread.
  const int64_t grain = 1 + (1 << 14) / (kOutputs * int64_t{p.channels} * taps);
  const auto of_outputs = [&](int output) {
    const int count = std::min(kOutputs, outputs - output);
    for (int i = 0; i < static_cast<int>(segments.size()); ++i) {
      const Segment& s = segments[i];
      const int64_t from =
          (int64_t{s.group} * outputs + output) * row + int64_t{s.group_low} * taps;
      for (int first = 0; first < s.channels * taps; first += kElements) {
        const int elements = std::min(kElements, s.channels * taps - first);
        body(WeightBlock{i, output, count, elements, from + first, row, first, taps, s.stored});
      }
    }
  };
  parallel_for(0, (outputs + kOutputs - 1) / kOutputs, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) of_outputs(static_cast<int>(i) * kOutputs);
  });
}

}  // namespace mafnet
