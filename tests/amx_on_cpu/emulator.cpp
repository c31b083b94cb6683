// Tile registers (AMX) for processors without: their instructions raise SIGILL, and the handler
// carries them out, so that the kernels run as they were compiled.
//
// What a processor would refuse ends the process with a report, and so does what is legal but wrong
// for kernels that hold to these rules: tiles are released before they are configured again and
// before the process ends; rows in memory do not overlap; a tile is zeroed or loaded before it is
// read, and again once it has been stored.
//
// Facts: Intel's manual (SDM) volume 2, the instructions' pages and "AMX exception classes".
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>

#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns of its own headers

#define EXPORT extern "C" __attribute__((visibility("default")))

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));  // of this library

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Tile {
  alignas(64) uint32_t row[kRows][kRowBytes / 4];
  int rows, bytes;
  bool full;  // zeroed or loaded
};

struct Registers {
  bool configured = false;
  Tile tile[kTiles];
};

thread_local Registers registers;
std::atomic<long> open{0}, products{0};

// Mutations: the instruction at `changed` is left out, or its rows lie 64 bytes further apart.
enum Change : int { kLeftOut = 1, kStride = 2 };
std::atomic<uint64_t> changed{0};
std::atomic<int> change{0};

thread_local uint64_t instruction;  // being carried out, from the begin of the library

const int console = dup(STDERR_FILENO);  // before pytest takes it

[[noreturn]] void report(const char* what) {
  dprintf(console, "amx_on_cpu: %s, at +%#lx\n", what, static_cast<unsigned long>(instruction));
  abort();
}

void demand(bool holds, const char* otherwise) {
  if (!holds) report(otherwise);
}

// ---------------------------------------------------------------------------------- instructions

Tile& tile(int i) {
  demand(registers.configured, "a tile is used while none are configured");
  demand(i < kTiles && registers.tile[i].rows > 0, "a tile is used that is not configured");
  return registers.tile[i];
}

Tile& full_tile(int i) {
  demand(tile(i).full, "a tile is read that was neither zeroed nor loaded");
  return registers.tile[i];
}

void load_config(const uint8_t* from) {
  demand(!registers.configured, "tiles are configured that have not been released");
  demand(from[0] == 1 && from[1] == 0, "the palette is not 1 or the start row is not 0");
  for (int i = 2; i < kRowBytes; ++i) {
    const bool reserved = i < 16 || (i >= 32 && i < 48) || i >= 56;
    demand(!reserved || from[i] == 0, "a reserved byte of the configuration is not 0");
  }
  for (int i = 0; i < kTiles; ++i) {
    uint16_t bytes;
    memcpy(&bytes, from + 16 + 2 * i, sizeof(bytes));
    const int rows = from[48 + i];
    demand(rows <= kRows && bytes <= kRowBytes && (rows == 0) == (bytes == 0),
           "a tile has more than 16 rows of 64 bytes, or rows of no bytes");
    registers.tile[i] = Tile{{}, rows, bytes, false};
  }
  registers.configured = true;
  ++open;
}

void release() {
  demand(registers.configured, "tiles are released that were not configured");
  registers.configured = false;
  --open;
}

void zero(int to) { memset(tile(to).row, 0, sizeof(Tile::row)), tile(to).full = true; }

void check_stride(const Tile& t, int64_t stride) {
  demand(llabs(stride) >= t.bytes || t.rows == 1, "rows of a tile overlap in memory");
}

void load(int to, const char* from, int64_t stride) {
  check_stride(tile(to), stride);
  zero(to);
  for (int r = 0; r < tile(to).rows; ++r)
    memcpy(tile(to).row[r], from + r * stride, tile(to).bytes);
}

void store(int from, char* to, int64_t stride) {
  Tile& t = full_tile(from);
  check_stride(t, stride);
  for (int r = 0; r < t.rows; ++r) memcpy(to + r * stride, t.row[r], t.bytes);
  t.full = false;
}

// The even and the odd factors are summed up by themselves.
__attribute__((target("avx512f,fma"))) void multiply(int sums, int left, int right) {
  Tile &c = full_tile(sums), &a = full_tile(left), &b = full_tile(right);
  demand(c.rows == a.rows && c.bytes == b.bytes && a.bytes == 4 * b.rows,
         "the tiles of a product do not fit");
  demand(c.bytes % 4 == 0, "a row of a tile has no whole number of elements");
  ++products;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // denormals are zero, nothing traps, ties go to even
  const __mmask16 columns = static_cast<__mmask16>((1u << c.bytes / 4) - 1);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int m = 0; m < c.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = even;
    for (int k = 0; k < b.rows; ++k) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a.row[m][k]));
      const __m512i y = _mm512_load_si512(b.row[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(y, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_epi32(x, upper)),
                            _mm512_castsi512_ps(_mm512_and_epi32(y, upper)), odd);
    }
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(c.row[m]), _mm512_add_ps(even, odd));
    _mm512_mask_store_ps(c.row[m], columns, sum);
  }
  _mm_setcsr(before);
}

// --------------------------------------------------------------------------------------- decoding

// The general registers in the order of their numbers.
constexpr int kGeneral[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                            REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Operands {
  int first, second, third;  // ModRM.reg, ModRM.rm and VEX.vvvv
  char* memory;
  int64_t stride;  // the scaled index
};

// Carries out the instruction at regs[REG_RIP] and steps over it; false where it is another.
bool run(greg_t* regs) {
  // VEX in three bytes with opcodes 0F 38, 128 bits and W = 0.
  const auto* code = reinterpret_cast<const uint8_t*>(regs[REG_RIP]);
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;
  const int prefix = code[2] & 3, opcode = code[3], mode = code[4] >> 6;  // none, 66, F3, F2
  const int no_base = code[1] & 0x20 ? 0 : 8, no_index = code[1] & 0x40 ? 0 : 8;
  Operands o{code[4] >> 3 & 7, code[4] & 7, ~code[2] >> 3 & 15, nullptr, 0};
  if ((code[1] & 0x80) == 0) o.first += 8;
  const uint8_t* next = code + 5;
  if (mode != 3) {
    int base = o.second, index = 4;
    if (base == 4) {  // a byte for base, index and scale
      base = *next & 7;
      index = (*next >> 3 & 7) + no_index;
      if (index != 4) o.stride = regs[kGeneral[index]] << (*next >> 6);
      ++next;
    }
    if (mode == 0 && base == 5) return false;  // without a base
    int32_t displacement = 0;
    if (mode == 1) displacement = static_cast<int8_t>(*next);
    if (mode == 2) memcpy(&displacement, next, sizeof(displacement));
    next += mode == 1 ? 1 : mode == 2 ? 4 : 0;
    o.memory = reinterpret_cast<char*>(regs[kGeneral[base + no_base]] + displacement);
  }
  instruction = reinterpret_cast<uint64_t>(code) - reinterpret_cast<uint64_t>(__ehdr_start);
  const int changes = instruction == changed ? change.load() : 0;
  const bool carried_out = changes != kLeftOut;
  if (changes == kStride) o.stride += 64;
  if (opcode == 0x49 && prefix == 0 && mode != 3 && o.first == 0) {
    if (carried_out) load_config(reinterpret_cast<const uint8_t*>(o.memory));
  } else if (opcode == 0x49 && prefix == 0 && code[4] == 0xc0) {
    if (carried_out) release();
  } else if (opcode == 0x49 && prefix == 3 && mode == 3) {
    if (carried_out) zero(o.first);
  } else if (opcode == 0x4b && prefix == 3 && mode != 3) {
    if (carried_out) load(o.first, o.memory, o.stride);
  } else if (opcode == 0x4b && prefix == 2 && mode != 3) {
    if (carried_out) store(o.first, o.memory, o.stride);
  } else if (opcode == 0x5c && prefix == 2 && mode == 3) {
    if (carried_out) multiply(o.first, o.second, o.third);
  } else {
    return false;
  }
  regs[REG_RIP] = reinterpret_cast<greg_t>(next);
  return true;
}

struct sigaction others;

void on_illegal_instruction(int, siginfo_t*, void* context) {
  auto* c = static_cast<ucontext_t*>(context);
  // What is no instruction of ours comes again, and to whoever handled it before.
  if (!run(c->uc_mcontext.gregs)) sigaction(SIGILL, &others, nullptr);
}

__attribute__((destructor)) void end() {
  dprintf(console, "amx_on_cpu: %ld products of tiles\n", products.load());
  if (open != 0) report("tiles are still configured at the end");
}

}  // namespace

// What pretend.h puts in place of syscall: without the permission, tile instructions stay illegal.
// MAFNET_AMX_REFUSED=1 is a system that refuses.
EXPORT long amx_on_cpu_request(long number, long request, long feature) {
  if (number != SYS_arch_prctl || request != 0x1023 || feature != 18) return -1;
  if (getenv("MAFNET_AMX_REFUSED") != nullptr) return -1;
  struct sigaction ours{};
  ours.sa_sigaction = on_illegal_instruction;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &ours, &others);
}

EXPORT void amx_on_cpu_change(uint64_t at, int how) {
  changed = at;
  change = how;
}
