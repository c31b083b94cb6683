// resize_conv: a 3 x 3 convolution of a bilinearly resized map, which is never made.
//
// Resizing and multiplying by a tap's weight commute: the nine products are taken of the small map,
//   P[tap] = input W[tap],                                  (h w 9 C C_out products, not H W 9 C
//   C_out)
// and their resized, shifted planes are added up, first along x, then along y:
//   Z[ky](i, X) = sum over kx and the columns x that make X + kx - 1 of weight * P[ky, kx](i, x)
//   output(Y, X) = bias + sum over ky and the rows i that make Y + ky - 1 of weight * Z[ky](i, X)
// A tap outside the large map has no terms. At the size of the input, see cpu_conv_3x3.cpp.
// Backward is the transpose: Z and P become the gradients of what they are here.
#include "common/parallel.h"
#include "pyramid_spatial_attention/resize.h"

namespace mafnet {
namespace {

// Columns of output in a strip, at most: P and the rows of Z that are alive stay in the second
// cache.
constexpr int kStrip = 96;
// Columns of input in a strip of backward, long enough for the sums of the weight's gradient to
// pay.
constexpr int kBackwardStrip = 96;
// Rows of Z that are kept: an output row needs at most 6, of which some may be the next one's.
constexpr int kSlots = 8;

struct Range {
  int begin, end;
  int size() const { return end - begin; }
};

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

template <typename A>
struct Plan {
  Plan(const PyramidConvParams& p)
      : rows(resize_terms<A>(p.height, p.out_height)),
        columns(resize_terms<A>(p.width, p.out_width)),
        depth(padded_columns(p.channels)),
        out(padded_columns(p.out_channels)) {}

  TermLists<A> rows, columns;
  int depth, out;
};

// ------------------------------------------------------------------------------------- forward

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
        sums_(size_t{kStrip} * plan.out, false),
        scratch_(product.scratch(most_columns), false) {}

  // Output rows begin ... end - 1 of the columns.
  void run(int64_t n, Range rows, Range columns) {
    columns_ = columns;
    std::fill_n(held_, kSlots, -1);
    for (int y = rows.begin; y < rows.end; ++y) {
      TapTerm<A> terms[6];
      const int count = tap_terms(plan_.rows, p_.out_height, y, terms);
      const int oldest = touched(plan_.rows, p_.out_height, y, y + 1).begin;
      Part<A> parts[6];
      for (int t = 0; t < count; ++t) {
        const A* slot = row_of(n, terms[t].at, oldest);
        parts[t] = {slot + int64_t{terms[t].tap} * kStrip * plan_.out, terms[t].weight};
      }
      const int size = columns.size() * plan_.out;
      with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
        combine<decltype(level)>(parts, count, size, sums_.data());
      });
      write_activated(sums_.data(), plan_.out, columns.size(), p_.out_channels, bias_,
                      static_cast<A>(p_.negative_slope), p_.output, n, y, columns.begin);
    }
  }

 private:
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
    copy_row(p_.input, n, i, from.begin, from.size(), p_.channels, pixels_.data(), plan_.depth);
    product_.set(pixels_.data(), plan_.depth, from.size(), products_.data(), product_.columns(),
                 scratch_.data());
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int x = columns_.begin; x < columns_.end; ++x) {
        TapTerm<A> terms[6];
        Part<A> parts[6];
        const int count = tap_terms(plan_.columns, p_.out_width, x, terms);
        for (int ky = 0; ky < 3; ++ky) {
          for (int t = 0; t < count; ++t) {
            const int64_t pixel = int64_t{terms[t].at - from.begin} * product_.columns();
            parts[t] = {products_.data() + pixel + (3 * ky + terms[t].tap) * plan_.out,
                        terms[t].weight};
          }
          combine<decltype(level)>(parts, count, plan_.out,
                                   mixed + (int64_t{ky} * kStrip + x - columns_.begin) * plan_.out);
        }
      }
    });
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
  // What the bands are has no bearing on the sums.
  const int64_t threads = num_threads();
  const int64_t wanted = threads == 1 ? 1 : divide_up(4 * threads, p.batch * strips);
  const int64_t bands = std::clamp<int64_t>(wanted, 1, divide_up(p.out_height, 8));
  const int band = static_cast<int>(divide_up(p.out_height, bands));
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

// ------------------------------------------------------------------------------------ backward

template <typename A>
class BackwardStrip {
 public:
  BackwardStrip(const PyramidConvParams& p, const Plan<A>& plan, const TermLists<A>& row_uses,
                const TermLists<A>& column_uses, const Product<A>& product)
      : p_(p),
        plan_(plan),
        row_uses_(row_uses),
        column_uses_(column_uses),
        product_(product),
        pixels_(size_t{padded_rows(kBackwardStrip)} * plan.depth + kRowPad),
        products_(size_t{padded_rows(kBackwardStrip)} * 9 * plan.out),
        inputs_(size_t{padded_rows(kBackwardStrip)} * plan.depth),
        grads_(0),
        results_(0),
        mixed_(0),
        scratch_(product.scratch(kBackwardStrip), false),
        by_pixels_(kBackwardStrip, p.channels, 9 * plan.out, p.dtype) {}

  // Input row i of the columns: adds to the gradient of the weight, writes that of the input.
  void run(int64_t n, int i, Range columns, bool same_strip, A* grad_weight, A* grad_bias) {
    // Output columns that a term of these columns, or its neighbours, lie in.
    const Range used = used_columns(columns);
    if (!same_strip) {
      std::fill_n(held_, kSlots, -1);
      const size_t size = static_cast<size_t>(used.size()) * plan_.out;
      grads_.resize(size * kSlots);
      results_.resize(size, false);
      mixed_.resize(size * 3, false);
    }
    const int row = 9 * plan_.out;
    mix_rows(n, i, used);
    mix_columns(columns, used);
    if (grad_weight != nullptr) {
      copy_row(p_.input, n, i, columns.begin, columns.size(), p_.channels, pixels_.data(),
               plan_.depth);
      by_pixels_.set_left(pixels_.data(), plan_.depth, columns.size());
      by_pixels_.add(products_.data(), row, row, grad_weight, row);
      // Each output adds to the central taps with weights whose sum is 1.
      add_rows(products_.data() + 4 * plan_.out, row, columns.size(), plan_.out, grad_bias);
    }
    if (p_.grad_input.data == nullptr) return;
    product_.set(products_.data(), row, columns.size(), inputs_.data(), product_.columns(),
                 scratch_.data());
    write_row(inputs_.data(), product_.columns(), columns.size(), p_.channels, p_.grad_input, n, i,
              columns.begin);
  }

 private:
  Range used_columns(Range columns) const {
    Range used{p_.out_width, 0};
    for (int x = columns.begin; x < columns.end; ++x) {
      if (column_uses_.count(x) == 0) continue;
      used.begin = std::min(used.begin, column_uses_.begin(x)->at - 1);
      used.end = std::max(used.end, (column_uses_.end(x) - 1)->at + 2);
    }
    used = {std::max(used.begin, 0), std::min(used.end, p_.out_width)};
    return {std::min(used.begin, used.end), used.end};
  }

  // Gradients of output row y before its activation, dense.
  const A* grad_row(int64_t n, int y, Range used) {
    const int slot = y % kSlots;
    A* grads = grads_.data() + static_cast<int64_t>(slot) * used.size() * plan_.out;
    if (held_[slot] == y) return grads;
    held_[slot] = y;
    read_gradients(p_.grad_output, as_source(p_.output), n, y, used.begin, used.size(),
                   p_.out_channels, static_cast<A>(p_.negative_slope), grads, plan_.out,
                   results_.data());
    return grads;
  }

  // mixed[ky] = the gradient of Z[ky] of row i.
  void mix_rows(int64_t n, int i, Range used) {
    const int size = used.size() * plan_.out;
    for (int ky = 0; ky < 3; ++ky) {
      A* mixed = mixed_.data() + static_cast<int64_t>(ky) * size;
      std::fill_n(mixed, size, A{0});
      // Few at a time: the rows that a pass reads are all held.
      const Term<A>* t = row_uses_.begin(i);
      while (t != row_uses_.end(i)) {
        Part<A> parts[6];
        int count = 0;
        for (; t != row_uses_.end(i) && count < 5; ++t) {
          const int y = t->at - ky + 1;
          if (y < 0 || y >= p_.out_height) continue;
          parts[count++] = {grad_row(n, y, used), t->weight};
        }
        if (count == 0) continue;
        parts[count++] = {mixed, A{1}};
        with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
          combine<decltype(level)>(parts, count, size, mixed);
        });
      }
    }
  }

  // products[x][ky][kx] = the gradient of P.
  void mix_columns(Range columns, Range used) {
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int x = columns.begin; x < columns.end; ++x) {
        for (int tap = 0; tap < 9; ++tap) {
          const int ky = tap / 3, kx = tap % 3;
          parts_.clear();
          for (const Term<A>* t = column_uses_.begin(x); t != column_uses_.end(x); ++t) {
            const int column = t->at - kx + 1;
            if (column < 0 || column >= p_.out_width) continue;
            const int64_t pixel = static_cast<int64_t>(ky) * used.size() + column - used.begin;
            parts_.push_back({mixed_.data() + pixel * plan_.out, t->weight});
          }
          combine<decltype(level)>(
              parts_.data(), static_cast<int>(parts_.size()), plan_.out,
              products_.data() + (int64_t{x - columns.begin} * 9 + tap) * plan_.out);
        }
      }
    });
  }

  const PyramidConvParams& p_;
  const Plan<A>& plan_;
  const TermLists<A>&row_uses_, &column_uses_;
  const Product<A>& product_;
  Buffer<A> pixels_, products_, inputs_, grads_, results_, mixed_;
  Buffer<uint16_t> scratch_;
  PixelProduct<A> by_pixels_;
  std::vector<Part<A>> parts_;
  int held_[kSlots];
};

template <typename A>
void backward(const PyramidConvParams& p) {
  const Plan<A> plan(p);
  const auto row_uses = transposed(plan.rows, p.height, p.out_height);
  const auto column_uses = transposed(plan.columns, p.width, p.out_width);
  const int row = 9 * plan.out;
  const bool need_weight = p.grad_weight != nullptr || p.grad_bias != nullptr;
  Product<A> product(row, p.channels, p.dtype);
  for (int tap = 0; tap < 9; ++tap) {
    product.load({p.weight, p.dtype, tap, int64_t{9} * p.channels, 9}, p.out_channels, p.channels,
                 tap * plan.out, 0);
  }
  product.pack();
  if (p.grad_input.data != nullptr) {
    prepare(p.grad_input, p.batch, int64_t{p.channels} * p.height * p.width);
  }
  // A task is a strip of columns over some rows of one image, a chunk some tasks.
  const int64_t strips = divide_up(p.width, kBackwardStrip);
  const int64_t bands = divide_up(p.height, 16), band = divide_up(p.height, bands);
  const int64_t tasks = p.batch * strips * bands;
  const int64_t chunks = std::clamp<int64_t>(tasks, 1, kMostChunks);
  const int64_t per_chunk = divide_up(tasks, chunks);
  Partials<A> partials(static_cast<int>(chunks), p.channels, row, plan.out, need_weight);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    BackwardStrip<A> strip(p, plan, row_uses, column_uses, product);
    for (int64_t task = begin * per_chunk; task < std::min(tasks, end * per_chunk); ++task) {
      const int64_t first = task % bands * band, x = task / bands % strips * kBackwardStrip;
      const Range columns{static_cast<int>(x),
                          static_cast<int>(std::min<int64_t>(p.width, x + kBackwardStrip))};
      const int64_t chunk = task / per_chunk;
      for (int64_t i = first; i < std::min<int64_t>(first + band, p.height); ++i) {
        strip.run(task / bands / strips, static_cast<int>(i), columns, i > first,
                  need_weight ? partials.weight(chunk) : nullptr,
                  need_weight ? partials.bias(chunk) : nullptr);
      }
    }
  });
  partials.reduce();
  if (p.grad_weight != nullptr) {
    for (int tap = 0; tap < 9; ++tap) {
      scatter_pixels(partials.weight(0) + tap * plan.out, row, p.channels, p.out_channels,
                     {p.grad_weight, p.dtype, tap, 9, int64_t{9} * p.channels});
    }
  }
  if (p.grad_bias != nullptr) {
    scatter_pixels(partials.bias(0), plan.out, 1, p.out_channels, {p.grad_bias, p.dtype, 0, 0, 1});
  }
}

}  // namespace

int launch_resize_conv_forward(const PyramidConvParams& p, void*) {
  if (p.batch == 0 || p.out_channels == 0) return 0;
  if (p.height == p.out_height && p.width == p.out_width) return launch_conv_3x3_forward(p);
  return with_accumulator(p.dtype, [&](auto a) { forward<decltype(a)>(p); });
}

int launch_resize_conv_backward(const PyramidConvParams& p, void*) {
  if (p.height == p.out_height && p.width == p.out_width) return launch_conv_3x3_backward(p);
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a)>(p); });
}

}  // namespace mafnet
