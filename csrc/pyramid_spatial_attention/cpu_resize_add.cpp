// resize_add and its transpose, row by row: first along the rows, which are mixed as a whole, then
// along the columns.
#include "pyramid_spatial_attention/resize.h"

namespace mafnet {
namespace {

// Rows of a pass over one axis, which the other pass mixes.
template <typename A>
void mix_rows(const Source& image, int64_t n, const TermLists<A>& rows, int row, int width,
              int channels, std::vector<Part<A>>& parts, Buffer<A>& read, A* mixed) {
  const int64_t size = int64_t{width} * channels;
  read.resize(static_cast<size_t>(rows.count(row)) * size, false);
  parts.clear();
  bool dense = true;
  for (const Term<A>* t = rows.begin(row); t != rows.end(row); ++t) {
    const Row<A> from = read_row(image, n, t->at, 0, width, channels,
                                 read.data() + static_cast<int64_t>(parts.size()) * size, channels);
    dense = dense && from.stride == channels;
    parts.push_back({from.data, t->weight});
  }
  if (!dense && width > 1) {  // pixels with gaps between them
    for (size_t i = 0; i < parts.size(); ++i) {
      A* to = read.data() + static_cast<int64_t>(i) * size;
      copy_row(image, n, rows.begin(row)[i].at, 0, width, channels, to, channels);
      parts[i].from = to;
    }
  }
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    combine<decltype(level)>(parts.data(), static_cast<int>(parts.size()), static_cast<int>(size),
                             mixed);
  });
}

// pixels[x] = the sum of the terms of x over the pixels of mixed.
template <typename A>
void mix_columns(const TermLists<A>& columns, int width, int channels, const A* mixed,
                 std::vector<Part<A>>& parts, A* pixels) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    for (int x = 0; x < width; ++x) {
      parts.clear();
      for (const Term<A>* t = columns.begin(x); t != columns.end(x); ++t) {
        parts.push_back({mixed + int64_t{t->at} * channels, t->weight});
      }
      combine<decltype(level)>(parts.data(), static_cast<int>(parts.size()), channels,
                               pixels + int64_t{x} * channels);
    }
  });
}

// to = matrix of rows * from * matrix of columns (+ other): one image of `height` x `width`.
template <typename A>
void apply(const ResizeAddParams& p, const Source& from, int from_width, const TermLists<A>& rows,
           const TermLists<A>& columns, int height, int width, const Source* other,
           const Target& to) {
  prepare(to, p.batch, int64_t{p.channels} * height * width);
  torch::stable::parallel_for(0, p.batch * height, 4, [&](int64_t begin, int64_t end) {
    Buffer<A> read(0), mixed(static_cast<size_t>(from_width) * p.channels, false);
    Buffer<A> pixels(static_cast<size_t>(width) * p.channels, false);
    Buffer<A> others(other ? static_cast<size_t>(width) * p.channels : 0, false);
    std::vector<Part<A>> parts;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / height;
      const int y = static_cast<int>(r % height);
      mix_rows(from, n, rows, y, from_width, p.channels, parts, read, mixed.data());
      mix_columns(columns, width, p.channels, mixed.data(), parts, pixels.data());
      if (other != nullptr) {
        const Row<A> added =
            read_row(*other, n, y, 0, width, p.channels, others.data(), p.channels);
        A* sums = pixels.data();
        const int channels = p.channels;
        for_rows<A>(width, channels, [&](auto type, int x, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          A* at = sums + int64_t{x} * channels + c;
          store<V>(at, load<V>(at) + load<V>(added.data + x * added.stride + c));
        });
      }
      write_row(pixels.data(), p.channels, width, p.channels, to, n, y, 0);
    }
  });
}

}  // namespace

int launch_resize_add_forward(const ResizeAddParams& p, void*) {
  return with_accumulator(p.dtype, [&](auto a) {
    using A = decltype(a);
    apply<A>(p, p.input, p.width, resize_terms<A>(p.height, p.out_height),
             resize_terms<A>(p.width, p.out_width), p.out_height, p.out_width, &p.other, p.output);
  });
}

int launch_resize_add_backward(const ResizeAddParams& p, void*) {
  return with_accumulator(p.dtype, [&](auto a) {
    using A = decltype(a);
    const auto rows = resize_terms<A>(p.height, p.out_height);
    const auto columns = resize_terms<A>(p.width, p.out_width);
    apply<A>(p, p.grad_output, p.out_width, transposed(rows, p.height, p.out_height),
             transposed(columns, p.width, p.out_width), p.height, p.width, nullptr, p.grad_input);
  });
}

}  // namespace mafnet
