// ldmatrix and mma.sync: who holds what, from the fragment tables of the PTX ISA (section "Warp
// level matrix instructions"). With lane l: group g = l / 4, member t = l % 4.
#include "checker.h"

namespace cuemu {

namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;

// ---- ldmatrix: 8 x 8 matrices of 16-bit elements, each row an address given by one lane

struct LoadMatrices {
  uint32_t* registers;
  const char* row;
  int count;
  bool transpose;
};

const LoadMatrices& load_of(const Thread& t) { return *static_cast<LoadMatrices*>(t.operand); }

void check_row(Thread& giver, const char* row, Place place) {
  Thread* const last_to_come = g_current;
  g_current = &giver;  // the read belongs to the lane that gave the address
  require_alignment(row, 16, place);
  if (!is_in_shared_array(row, 16)) {
    abandon("out of bounds",
            "an ldmatrix row lies outside every shared array, at " + describe(place));
  }
  check_access(row, 16, Access::kRead, place);
  g_current = last_to_come;
}

void do_load_matrices(Warp& warp, uint32_t) {
  const LoadMatrices& any = load_of(*warp.by_lane[0]);
  for (int matrix = 0; matrix < any.count; ++matrix) {
    uint16_t element[8][8];
    for (int r = 0; r < 8; ++r) {
      Thread& giver = *warp.by_lane[matrix * 8 + r];
      check_row(giver, load_of(giver).row, giver.place);
      std::memcpy(element[r], load_of(giver).row, 16);
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint32_t low = any.transpose ? element[2 * t][g] : element[g][2 * t];
      const uint32_t high = any.transpose ? element[2 * t + 1][g] : element[g][2 * t + 1];
      load_of(*warp.by_lane[lane]).registers[matrix] = low | high << 16;
    }
  }
}

// ---- mma: D(16, 8) += A(16, K) B(K, 8)

struct Multiply {
  float* d;
  const uint32_t *a, *b;
};

float half_value(uint16_t bits) {
  __half h;
  std::memcpy(&h, &bits, sizeof h);
  return __half2float(h);
}
float bfloat16_value(uint16_t bits) { return __bfloat162float({bits}); }
// The tensor core ignores the 13 low bits of a float.
float tf32_value(uint32_t bits) { return cuemu_bits_as<float>(bits & 0xffffe000u); }

// Where register i of a lane lies in A (16 x K) and B (K x 8). A register holds kPacked elements
// that are neighbours along K.
template <int kPacked>
struct Fragment {
  static int a_row(int g, int i) { return g + 8 * (i & 1); }
  static int a_column(int t, int i) { return kPacked * t + 4 * kPacked * (i >> 1); }
  static int b_row(int t, int i) { return kPacked * t + 4 * kPacked * i; }
};

template <int K, int kPacked, typename Decode>
void multiply(Warp& warp, const Decode& decode) {
  constexpr int kRegistersB = K / (4 * kPacked), kRegistersA = 2 * kRegistersB;
  using Place = Fragment<kPacked>;
  alignas(64) float a[16][K], b[K][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Multiply& m = *static_cast<Multiply*>(warp.by_lane[lane]->operand);
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < kPacked; ++e) {
      for (int i = 0; i < kRegistersA; ++i) {
        a[Place::a_row(g, i)][Place::a_column(t, i) + e] = decode(m.a[i], e);
      }
      for (int i = 0; i < kRegistersB; ++i) b[Place::b_row(t, i) + e][g] = decode(m.b[i], e);
    }
    for (int i = 0; i < 4; ++i) d[g + 8 * (i >> 1)][2 * t + (i & 1)] = m.d[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < K; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const Multiply& m = *static_cast<Multiply*>(warp.by_lane[lane]->operand);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) m.d[i] = d[g + 8 * (i >> 1)][2 * t + (i & 1)];
  }
}

uint16_t half_of(uint32_t packed, int e) { return static_cast<uint16_t>(packed >> (16 * e)); }
float decode_half(uint32_t packed, int e) { return half_value(half_of(packed, e)); }
float decode_bfloat16(uint32_t packed, int e) { return bfloat16_value(half_of(packed, e)); }
float decode_tf32(uint32_t packed, int) { return tf32_value(packed); }

}  // namespace

void load_matrices(uint32_t* registers, const void* row, int count, bool transpose, Place place) {
  LoadMatrices operand{registers, static_cast<const char*>(row), count, transpose};
  warp_operation(kAllLanes, &operand, do_load_matrices, place);
}

void mma(Mma shape, float* d, const uint32_t* a, const uint32_t* b, Place place) {
  Multiply operand{d, a, b};
  WarpOperation operation = nullptr;
  switch (shape) {
    case Mma::kM16N8K16F16:
      operation = [](Warp& warp, uint32_t) { multiply<16, 2>(warp, decode_half); };
      break;
    case Mma::kM16N8K16BFloat16:
      operation = [](Warp& warp, uint32_t) { multiply<16, 2>(warp, decode_bfloat16); };
      break;
    case Mma::kM16N8K8F16:
      operation = [](Warp& warp, uint32_t) { multiply<8, 2>(warp, decode_half); };
      break;
    case Mma::kM16N8K8Tf32:
      operation = [](Warp& warp, uint32_t) { multiply<8, 1>(warp, decode_tf32); };
      break;
  }
  warp_operation(kAllLanes, &operand, operation, place);
}

}  // namespace cuemu
