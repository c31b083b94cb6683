// resize_add and its transpose, a row of the result at a time, in one pass: the rows that it is
// made of are mixed pixel by pixel, and a mixed pixel stays in registers while neighbours share it.
#include "common/parallel.h"
#include "pyramid_spatial_attention/resize.h"

namespace mafnet {
namespace {

// Vectors of a pixel in hand at once: those of two mixed pixels and of a third fit the registers.
constexpr int kVectors = 4;

// Rows of an image and their weights, in pixels of type T.
template <typename A, typename T>
struct Mix {
  std::vector<Part<A, T>> rows;
  int64_t stride = 0;  // of pixels

  // sums = the weighted sum of the rows, for N vectors of pixel x from channel c on.
  template <typename V, int N>
  MAFNET_INLINE void pixel(int x, int c, V (&sums)[N]) const {
    const int64_t at = x * stride + c;
    const Part<A, T>*row = rows.data(), *end = row + rows.size();
    V read[N];
    load_vectors(row->from + at, read);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[v] = row->weight * read[v];
    while (++row != end) {
      load_vectors(row->from + at, read);
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sums[v] += row->weight * read[v];
    }
  }
};

// to = the pixels of mix resized to the `width` of columns, plus other.
template <typename V, int N, typename A, typename T>
MAFNET_INLINE void resize_row(const Mix<A, T>& mix, const TermLists<A>& columns, int width, int c,
                              const Row<T>& other, T* to, int64_t to_stride) {
  V low[N]{}, high[N]{};    // of pixels at and at + 1
  int at = -1, known = at;  // pixels up to the latter are there
  for (int x = 0; x < width; ++x) {
    const Term<A>* terms = columns.begin(x);
    const bool two = columns.count(x) == 2;
    if (terms[0].at != at) {
      at = terms[0].at;
      if (known == at) {
        std::copy_n(high, N, low);
      } else {
        mix.pixel(at, c, low);
      }
      known = at;
    }
    if (two && known == at) mix.pixel(known = at + 1, c, high);
    V sums[N], added[N];
    load_vectors(other.data + x * other.stride + c, added);
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      sums[v] = terms[0].weight * low[v];
      if (two) sums[v] += terms[1].weight * high[v];
      sums[v] += added[v];
    }
    store_vectors(to + x * to_stride + c, sums);
  }
}

// to = the transpose: pixel x of mix, `width` of them, goes to the pixels that columns name.
template <typename V, int N, typename A, typename T>
MAFNET_INLINE void gather_row(const Mix<A, T>& mix, const TermLists<A>& columns, int width, int c,
                              int to_width, T* to, int64_t to_stride) {
  const bool none = mix.rows.empty();  // larger than what it was made from
  V low[N]{}, high[N]{};               // of pixels at and at + 1
  int at = 0;
  const auto next = [&]() MAFNET_INLINE_LAMBDA {
    store_vectors(to + at++ * to_stride + c, low);
    std::copy_n(high, N, low);
    std::fill_n(high, N, V{});
  };
  for (int x = 0; x < width && !none; ++x) {
    const Term<A>* terms = columns.begin(x);
    const bool two = columns.count(x) == 2;
    V sums[N];
    mix.pixel(x, c, sums);
    while (at < terms[0].at) next();
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) {
      low[v] += terms[0].weight * sums[v];
      if (two) high[v] += terms[1].weight * sums[v];
    }
  }
  while (at < to_width) next();
}

// Calls body(Type<V>{}, a number of vectors V, c) for channels in the order of c.
template <typename A, typename Body>
void for_vectors(int channels, const Body& body) {
  with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
    using L = decltype(level);
    constexpr int kLanes = L::kBytes / sizeof(A);
    int c = 0;
    for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes) {
      body(Type<VectorOf<A, kLanes>>{}, std::integral_constant<int, kVectors>{}, c);
    }
    for_channels<L, A>(channels - c, [&](auto type, int rest) MAFNET_INLINE_LAMBDA {
      body(type, std::integral_constant<int, 1>{}, c + rest);
    });
  });
}

// Calls make_row(n, y, mix, to, stride) for every row of `to`, pixels that are made of the rows of
// `from` that `rows` lists. T is A, or BFloat16 where all images lie so.
template <typename A, typename T, typename MakeRow>
void for_mixed_rows(const ResizeAddParams& p, const Source& from, int from_width,
                    const TermLists<A>& rows, const Target& to, int height, int width,
                    const MakeRow& make_row) {
  prepare(to, p.batch, int64_t{p.channels} * height * width);
  const bool copies = !lies_as<T>(from), in_place = lies_as<T>(to);
  const int64_t size = int64_t{from_width} * p.channels;
  parallel_for(0, p.batch * height, 4, [&](int64_t begin, int64_t end) {
    Mix<A, T> mix;
    Buffer<A> read(0), made(in_place ? 0 : static_cast<size_t>(width) * p.channels, false);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t n = r / height;
      const int y = static_cast<int>(r % height);
      if (copies) read.resize(static_cast<size_t>(rows.count(y) * size), false);
      mix.rows.clear();
      for (const Term<A>* t = rows.begin(y); t != rows.end(y); ++t) {
        A* buffer = read.data() + (t - rows.begin(y)) * size;
        const auto row = row_as<T>(from, n, t->at, 0, from_width, p.channels, buffer, p.channels);
        mix.rows.push_back({row.data, t->weight});
        mix.stride = row.stride;
      }
      if (in_place) {
        make_row(n, y, mix, pixel_at<T>(to, n, y, 0), to.stride[3]);
      } else if constexpr (std::is_same_v<T, A>) {
        make_row(n, y, mix, made.data(), p.channels);
        write_row(made.data(), p.channels, width, p.channels, to, n, y, 0);
      }
    }
  });
}

template <typename A, typename T>
void forward(const ResizeAddParams& p) {
  const auto rows = resize_terms<A>(p.height, p.out_height);
  const auto columns = resize_terms<A>(p.width, p.out_width);
  const int width = p.out_width, channels = p.channels;
  for_mixed_rows<A, T>(
      p, p.input, p.width, rows, p.output, p.out_height, width,
      [&](int64_t n, int y, const Mix<A, T>& mix, T* to, int64_t stride) {
        const bool copies = !lies_as<T>(p.other);
        Buffer<A> others(copies ? static_cast<size_t>(width) * channels : 0, false);
        const Row<T> other = row_as<T>(p.other, n, y, 0, width, channels, others.data(), channels);
        for_vectors<A>(channels, [&](auto type, auto number, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          resize_row<V, number>(mix, columns, width, c, other, to, stride);
        });
      });
}

template <typename A, typename T>
void backward(const ResizeAddParams& p) {
  const auto rows = transposed(resize_terms<A>(p.height, p.out_height), p.height, p.out_height);
  const auto columns = resize_terms<A>(p.width, p.out_width);
  const int width = p.width;
  for_mixed_rows<A, T>(
      p, p.grad_output, p.out_width, rows, p.grad_input, p.height, width,
      [&](int64_t, int, const Mix<A, T>& mix, T* to, int64_t stride) {
        for_vectors<A>(p.channels, [&](auto type, auto number, int c) MAFNET_INLINE_LAMBDA {
          using V = typename decltype(type)::type;
          gather_row<V, number>(mix, columns, p.out_width, c, width, to, stride);
        });
      });
}

}  // namespace

int launch_resize_add_forward(const ResizeAddParams& p, void*) {
  const auto in_bf16 = [](const auto& image) { return lies_as<BFloat16>(image); };
  if (in_bf16(p.input) && in_bf16(p.other) && in_bf16(p.output)) {
    return forward<float, BFloat16>(p), 0;
  }
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a), decltype(a)>(p); });
}

int launch_resize_add_backward(const ResizeAddParams& p, void*) {
  if (lies_as<BFloat16>(p.grad_output) && lies_as<BFloat16>(p.grad_input)) {
    return backward<float, BFloat16>(p), 0;
  }
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a), decltype(a)>(p); });
}

}  // namespace mafnet
