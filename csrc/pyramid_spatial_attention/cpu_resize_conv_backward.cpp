// The backward of resize_conv: Z and P become the gradients of what they are in the forward.
#include "pyramid_spatial_attention/resize_conv.h"

namespace mafnet {
namespace {

// Columns of input in a strip, long enough for the sums of the weight's gradient to pay.
constexpr int kStrip = 96;

// The transpose of the forward's sum_two: of pixel x of a row half as wide, not at its ends, the
// gradients of the three taps from those of columns 2 x - 2 ... 2 x + 3.
template <typename L, typename A>
MAFNET_INLINE void split_two(const A* grads, int out, A* taps) {
  const A most{0.75}, least{0.25};
  for_channels<L, A>(out, [&](auto type, int c) MAFNET_INLINE_LAMBDA {
    using V = typename decltype(type)::type;
    V grad[6];
#pragma GCC unroll 6
    for (int i = 0; i < 6; ++i) grad[i] = load<V>(grads + i * out + c);
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const V sum = most * (grad[i + 1] + grad[i + 2]) + least * (grad[i] + grad[i + 3]);
      store(taps + (2 - i) * out + c, sum);
    }
  });
}

template <typename A>
class Strip {
 public:
  Strip(const PyramidConvParams& p, const Plan<A>& plan, const TermLists<A>& row_uses,
        const TermLists<A>& column_uses, const Product<A>& product)
      : p_(p),
        plan_(plan),
        row_uses_(row_uses),
        column_uses_(column_uses),
        product_(product),
        pixels_(size_t{padded_rows(kStrip)} * plan.depth + kRowPad),
        products_(size_t{padded_rows(kStrip)} * 9 * plan.out),
        inputs_(size_t{padded_rows(kStrip)} * plan.depth),
        grads_(0),
        results_(0),
        mixed_(0),
        scratch_(product.scratch(kStrip), false),
        by_pixels_(kStrip, p.channels, 9 * plan.out, p.dtype) {}

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
      // Few at a time: the rows that a pass reads are all held.
      const Term<A>* t = row_uses_.begin(i);
      do {
        Part<A> parts[6];
        int count = 0;
        if (t != row_uses_.begin(i)) parts[count++] = {mixed, A{1}};
        for (; t != row_uses_.end(i) && count < 6; ++t) {
          const int y = t->at - ky + 1;
          if (y < 0 || y >= p_.out_height) continue;
          parts[count++] = {grad_row(n, y, used), t->weight};
        }
        with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
          combine<decltype(level)>(parts, count, size, mixed);
        });
      } while (t != row_uses_.end(i));
    }
  }

  // products[x][ky][kx] = the gradient of P.
  void mix_columns(Range columns, Range used) {
    with_level<A>([&](auto level) MAFNET_INLINE_LAMBDA {
      for (int x = columns.begin; x < columns.end; ++x) {
        A* to = products_.data() + int64_t{x - columns.begin} * 9 * plan_.out;
        if (p_.out_width == 2 * p_.width && x > 0 && x < p_.width - 1) {
          for (int ky = 0; ky < 3; ++ky, to += 3 * plan_.out) {
            const int64_t pixel = int64_t{ky} * used.size() + 2 * x - 2 - used.begin;
            split_two<decltype(level)>(mixed_.data() + pixel * plan_.out, plan_.out, to);
          }
          continue;
        }
        for (int tap = 0; tap < 9; ++tap) {
          const int ky = tap / 3, kx = tap % 3;
          parts_.clear();
          for (const Term<A>* t = column_uses_.begin(x); t != column_uses_.end(x); ++t) {
            const int column = t->at - kx + 1;
            if (column < 0 || column >= p_.out_width) continue;
            const int64_t pixel = static_cast<int64_t>(ky) * used.size() + column - used.begin;
            parts_.push_back({mixed_.data() + pixel * plan_.out, t->weight});
          }
          combine<decltype(level)>(parts_.data(), static_cast<int>(parts_.size()), plan_.out,
                                   to + tap * plan_.out);
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
  const int64_t strips = divide_up(p.width, kStrip);
  const int64_t bands = divide_up(p.height, 16), band = divide_up(p.height, bands);
  const int64_t tasks = p.batch * strips * bands;
  const int64_t chunks = std::clamp<int64_t>(tasks, 1, kMostChunks);
  const int64_t per_chunk = divide_up(tasks, chunks);
  Partials<A> partials(static_cast<int>(chunks), p.channels, row, plan.out, need_weight);
  parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    Strip<A> strip(p, plan, row_uses, column_uses, product);
    for (int64_t task = begin * per_chunk; task < std::min(tasks, end * per_chunk); ++task) {
      const int64_t first = task % bands * band, x = task / bands % strips * kStrip;
      const Range columns{static_cast<int>(x),
                          static_cast<int>(std::min<int64_t>(p.width, x + kStrip))};
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

int launch_resize_conv_backward(const PyramidConvParams& p, void*) {
  if (p.height == p.out_height && p.width == p.out_width) return launch_conv_3x3_backward(p);
  return with_accumulator(p.dtype, [&](auto a) { backward<decltype(a)>(p); });
}

}  // namespace mafnet
