// resize_add and its transpose, row by row: first along the rows, which are mixed as a whole, then
// along the columns.
#include "common/parallel.h"
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

// to[x] = the weighted sum of one or two pixels, plus other[x] where there is one.
template <typename L, bool kTwo, typename A, typename T>
MAFNET_INLINE void mix_pixel(const Term<A>* terms, int channels, const A* mixed, const T* other,
                             T* to) {
  const A first = terms[0].weight, second = kTwo ? terms[1].weight : A{0};
  const A* low = mixed + int64_t{terms[0].at} * channels;
  const A* high = kTwo ? mixed + int64_t{terms[1].at} * channels : low;
  for_channels<L, A>(channels, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V sum = first * load<V>(low + c);
    if constexpr (kTwo) sum += second * load<V>(high + c);
    store_stored<V>(to + c, other == nullptr ? sum : sum + load_stored<V>(other + c));
  });
}

// Pixel x of `to` = the sum of the terms of x over the pixels of mixed, plus pixel x of other where
// there is one: one pass over the row, whose sums go where they belong.
template <typename A, typename T>
void mix_columns(const TermLists<A>& columns, int width, int channels, const A* mixed,
                 const Row<T>& other, std::vector<Part<A>>& parts, T* to, int64_t to_stride) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    for (int x = 0; x < width; ++x) {
      const T* added = other.data == nullptr ? nullptr : other.data + x * other.stride;
      T* at = to + x * to_stride;
      const Term<A>* terms = columns.begin(x);
      const int count = columns.count(x);
      if (count == 2) {
        mix_pixel<L, true>(terms, channels, mixed, added, at);
      } else if (count == 1) {
        mix_pixel<L, false>(terms, channels, mixed, added, at);
      } else if constexpr (std::is_same_v<T, A>) {  // backward: no other
        parts.clear();
        for (int i = 0; i < count; ++i) {
          parts.push_back({mixed + int64_t{terms[i].at} * channels, terms[i].weight});
        }
        combine<L>(parts.data(), count, channels, at);
      }
    }
  });
}

// to = matrix of rows * from * matrix of columns (+ other): one image of `height` x `width`.
template <typename A>
void apply(const ResizeAddParams& p, const Source& from, int from_width, const TermLists<A>& rows,
           const TermLists<A>& columns, int height, int width, const Source* other,
           const Target& to) {
  prepare(to, p.batch, int64_t{p.channels} * height * width);
  const bool in_place = lies_as<A>(to);
  // Outputs without terms, or of more than two, are sums of floats.
  const bool in_bf16 = other != nullptr && lies_as<BFloat16>(*other) && lies_as<BFloat16>(to);
  parallel_for(0, p.batch * height, 4, [&](int64_t begin, int64_t end) {
    Buffer<A> read(0), mixed(static_cast<size_t>(from_width) * p.channels, false);
    const size_t size = static_cast<size_t>(width) * p.channels;
    Buffer<A> pixels(in_place ? 0 : size, false), others(other ? size : 0, false);
    std::vector<Part<A>> parts;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / height;
      const int y = static_cast<int>(r % height);
      mix_rows(from, n, rows, y, from_width, p.channels, parts, read, mixed.data());
      if constexpr (sizeof(A) == 4) {
        if (in_bf16) {
          const Row<BFloat16> added{pixel_at<BFloat16>(*other, n, y, 0), other->stride[3]};
          mix_columns(columns, width, p.channels, mixed.data(), added, parts,
                      pixel_at<BFloat16>(to, n, y, 0), to.stride[3]);
          continue;
        }
      }
      Row<A> added{nullptr, 0};
      if (other != nullptr) {
        added = read_row(*other, n, y, 0, width, p.channels, others.data(), p.channels);
      }
      if (in_place) {
        mix_columns(columns, width, p.channels, mixed.data(), added, parts,
                    pixel_at<A>(to, n, y, 0), to.stride[3]);
        continue;
      }
      mix_columns(columns, width, p.channels, mixed.data(), added, parts, pixels.data(),
                  p.channels);
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
