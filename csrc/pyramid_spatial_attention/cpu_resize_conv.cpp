// The forward of resize_conv.
#include "pyramid_spatial_attention/resize_conv.h"

namespace mafnet {
namespace {

// Columns of output in a strip, at most: P and the rows of Z that are alive stay in the second
// cache.
constexpr int kStrip = 96;

// How output columns (or rows) `i` sum up over the terms of i - 1, i and i + 1.
template <typename A>
struct TapTerm {
  int tap, at;
  A weight;
};

template <typename A>
int tap_terms(const TermLists<A>& lists, int size, int i, TapTerm<A>* terms) {
  int count = 0;
  for (int tap = 0; tap < 3; ++tap) {
    const int from = i + tap - 1;
    if (from < 0 || from >= size) continue;
    for (const Term<A>* t = lists.begin(from); t != lists.end(from); ++t) {
      terms[count++] = {tap, t->at, t->weight};
    }
  }
  return count;
}

// The elements of the small axis that outputs begin ... end - 1 and their neighbours are made of.
template <typename A>
Range touched(const TermLists<A>& lists, int size, int begin, int end) {
  const int first = std::max(begin - 1, 0), last = std::min(end, size - 1);
  return {lists.begin(first)->at, (lists.end(last) - 1)->at + 1};
}

// Elements 2 i and 2 i + 1 of an axis twice as long as the small one, at neither end, where each is
// a quarter of an element and three of its neighbour: tap 0 of element i and tap 2 of i + 1 weigh
// the same in both. A tap of an element lies `tap` behind the one before.
template <typename V, typename A>
MAFNET_INLINE void sum_two(const A* before, const A* at, const A* after, int64_t tap,
                           V (&sums)[2]) {
  const A most{0.75}, least{0.25};
  const V left = load<V>(before) + load<V>(at + 2 * tap), middle = load<V>(at + tap);
  const V right = load<V>(at) + load<V>(after + 2 * tap);
  sums[0] = most * (left + middle) + least * (right + load<V>(before + tap));
  sums[1] = most * (right + middle) + least * (left + load<V>(after + tap));
}

// Whether sum_two gives outputs `at` and at + 1 of those before `end`.
bool comes_in_twos(int at, int end, int inputs, int outputs) {
  return outputs == 2 * inputs && at % 2 == 0 && at >= 2 && at + 2 <= std::min(end, outputs - 2);
}

template <typename A>
class Strip {
 public:
  Strip(const PyramidConvParams& p, const Plan<A>& plan, const Product<A>& product, const A* bias,
        int most_columns)
      : p_(p),
        plan_(plan),
        product_(product),
        bias_(bias),
        pixels_(static_cast<size_t>(padded_rows(most_columns)) * plan.depth),
        products_(static_cast<size_t>(padded_rows(most_columns)) * product.columns()),
        mixed_(size_t{kSlots} * 3 * kStrip * plan.out, false),
        sums_(size_t{2} * kStrip * plan.out, false),
        scratch_(product.scratch(most_columns), false) {}

  // Output rows begin ... end - 1 of the columns.
  void run(int64_t n, Range rows, Range columns) {
    columns_ = columns;
    std::fill_n(held_, kSlots, -1);
    for (int y = rows.begin; y < rows.end;) {
      if (comes_in_twos(y, rows.end, p_.height, p_.out_height)) {
        write_two_rows(n, y);
        y += 2;
      } else {
        write_one_row(n, y++);
      }
    }
  }

 private:
  void write_one_row(int64_t n, int y) {
    TapTerm<A> terms[6];
    const int count = tap_terms(plan_.rows, p_.out_height, y, terms);
    const int oldest = touched(plan_.rows, p_.out_height, y, y + 1).begin;
    Part<A> parts[6];
    for (int t = 0; t < count; ++t) {
      const A* slot = row_of(n, terms[t].at, oldest);
      parts[t] = {slot + int64_t{terms[t].tap} * kStrip * plan_.out, terms[t].weight};
    }
    const int size = columns_.size() * plan_.out;
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      combine<decltype(level)>(parts, count, size, sums_.data());
    });
    write_activated(sums_.data(), plan_.out, columns_.size(), p_.out_channels, bias_,
                    static_cast<A>(p_.negative_slope), p_.output, n, y, columns_.begin);
  }

  // Rows y and y + 1.
  void write_two_rows(int64_t n, int y) {
    const int i = y / 2;
    const A *before = row_of(n, i - 1, i - 1), *at = row_of(n, i, i - 1),
            *after = row_of(n, i + 1, i - 1);
    const A slope = static_cast<A>(p_.negative_slope);
    const auto write = [&](auto* upper, auto* lower, int64_t stride) {
      for_rows<A>(
          columns_.size(), p_.out_channels, [&](auto type, int x, int c) MAFNET_INLINE_LAMBDA {
            using V = typename decltype(type)::type;
            const int64_t from = int64_t{x} * plan_.out + c;
            const V bias = load<V>(bias_ + c);
            V sums[2];
            sum_two(before + from, at + from, after + from, int64_t{kStrip} * plan_.out, sums);
            const V first = sums[0] + bias, second = sums[1] + bias;
            store_stored<V>(upper + x * stride + c, leaky_relu(first, slope));
            store_stored<V>(lower + x * stride + c, leaky_relu(second, slope));
          });
    };
    const auto write_as = [&](auto type) {
      using T = typename decltype(type)::type;
      write(pixel_at<T>(p_.output, n, y, columns_.begin),
            pixel_at<T>(p_.output, n, y + 1, columns_.begin), p_.output.stride[3]);
    };
    if (lies_as<A>(p_.output)) return write_as(Type<A>{});
    if constexpr (sizeof(A) == 4) {
      if (lies_as<BFloat16>(p_.output)) return write_as(Type<BFloat16>{});
    }
    A* rows[2] = {sums_.data(), sums_.data() + int64_t{kStrip} * plan_.out};
    write(rows[0], rows[1], plan_.out);
    for (int r = 0; r < 2; ++r) {
      write_row(rows[r], plan_.out, columns_.size(), p_.out_channels, p_.output, n, y + r,
                columns_.begin);
    }
  }

  // Z of row i, made unless it is held; rows above `oldest` will not be asked for any more.
  const A* row_of(int64_t n, int i, int oldest) {
    const int64_t size = int64_t{3} * kStrip * plan_.out;
    int free = 0;
    for (int slot = 0; slot < kSlots; ++slot) {
      if (held_[slot] == i) return mixed_.data() + slot * size;
      if (held_[slot] < oldest) free = slot;
    }
    held_[free] = i;
    make_row(n, i, mixed_.data() + free * size);
    return mixed_.data() + free * size;
  }

  void make_row(int64_t n, int i, A* mixed) {
    const Range from = touched(plan_.columns, p_.out_width, columns_.begin, columns_.end);
    multiply_row(n, i, from);
    const int64_t pixel = product_.columns(), row = int64_t{kStrip} * plan_.out;
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int x = columns_.begin; x < columns_.end;) {
        A* to = mixed + int64_t{x - columns_.begin} * plan_.out;
        if (comes_in_twos(x, columns_.end, p_.width, p_.out_width)) {
          const A* at = products_.data() + (x / 2 - from.begin) * pixel;
          for (int ky = 0; ky < 3; ++ky, at += 3 * plan_.out) {
            for_channels<decltype(level), A>(plan_.out, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
              typename decltype(type)::type sums[2];
              sum_two(at - pixel + c, at + c, at + pixel + c, plan_.out, sums);
              store(to + ky * row + c, sums[0]);
              store(to + ky * row + plan_.out + c, sums[1]);
            });
          }
          x += 2;
          continue;
        }
        TapTerm<A> terms[6];
        Part<A> parts[6];
        const int count = tap_terms(plan_.columns, p_.out_width, x++, terms);
        for (int ky = 0; ky < 3; ++ky) {
          for (int t = 0; t < count; ++t) {
            parts[t] = {products_.data() + (terms[t].at - from.begin) * pixel +
                            (3 * ky + terms[t].tap) * plan_.out,
                        terms[t].weight};
          }
          combine<decltype(level)>(parts, count, plan_.out, to + ky * row);
        }
      }
    });
  }

  // P of pixels of row i.
  void multiply_row(int64_t n, int i, Range from) {
    if (product_.in_bf16() && lies_as<BFloat16>(p_.input)) {
      return product_.set(pixel_at<BFloat16>(p_.input, n, i, from.begin), p_.input.stride[3],
                          from.size(), products_.data(), product_.columns(), scratch_.data());
    }
    const Row<A> pixels = rows_of(p_.input, n, i, from.begin, from.size(), p_.width, p_.channels,
                                  p_.channels, pixels_.data(), plan_.depth);
    product_.set(pixels.data, pixels.stride, from.size(), products_.data(), product_.columns(),
                 scratch_.data());
  }

  const PyramidConvParams& p_;
  const Plan<A>& plan_;
  const Product<A>& product_;
  const A* bias_;
  Buffer<A> pixels_, products_, mixed_, sums_;
  Buffer<uint16_t> scratch_;
  Range columns_{0, 0};
  int held_[kSlots];
};

// Strips of equal width but for the last.
Range strip_at(const PyramidConvParams& p, int strip, int width) {
  return {strip * width, std::min(p.out_width, (strip + 1) * width)};
}

template <typename A>
void forward(const PyramidConvParams& p) {
  const Plan<A> plan(p);
  Product<A> product(p.channels, 9 * plan.out, p.dtype);
  for (int tap = 0; tap < 9; ++tap) {
    product.load({p.weight, p.dtype, tap, 9, int64_t{9} * p.channels}, p.channels, p.out_channels,
                 0, tap * plan.out);
  }
  product.pack();
  Buffer<A> bias(plan.out);
  load_bias(p.bias, p.dtype, p.out_channels, bias.data());
  prepare(p.output, p.batch, int64_t{p.out_channels} * p.out_height * p.out_width);

  const int strips = static_cast<int>(divide_up(p.out_width, kStrip));
  const int width = static_cast<int>(divide_up(p.out_width, strips));
  int most = 0;
  for (int s = 0; s < strips; ++s) {
    const Range columns = strip_at(p, s, width);
    most = std::max(most, touched(plan.columns, p.out_width, columns.begin, columns.end).size());
  }
  // Bands only as many as threads need: each begins with rows of Z that its neighbour made, too.
  // What the bands are has no bearing on the sums: none begins or ends within two rows that come in
  // twos.
  const int64_t threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : divide_up(4 * threads, p.batch * strips);
  const int64_t bands = std::clamp<int64_t>(wanted, 1, divide_up(p.out_height, 8));
  const int band = round_up(static_cast<int>(divide_up(p.out_height, bands)), 2);
  parallel_for(0, p.batch * strips * bands, 1, [&](int64_t begin, int64_t end) {
    Strip<A> strip(p, plan, product, bias.data(), most);
    for (int64_t task = begin; task < end; ++task) {
      const int first = static_cast<int>(task % bands) * band;
      const int at = static_cast<int>(task / bands % strips);
      strip.run(task / bands / strips,
                {std::min(first, p.out_height), std::min(first + band, p.out_height)},
                strip_at(p, at, width));
    }
  });
}

}  // namespace

int launch_resize_conv_forward(const PyramidConvParams& p, void*) {
  if (p.batch == 0 || p.out_channels == 0) return 0;
  if (p.height == p.out_height && p.width == p.out_width) return launch_conv_3x3_forward(p);
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a)>(p); });
}

}  // namespace mafnet
