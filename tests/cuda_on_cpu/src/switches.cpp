#include "switches.h"

#include "runtime.h"

namespace cuemu {
namespace {

constexpr int kMostMutants = 4096;
bool g_seen[kMostMutants];

}  // namespace

bool mutant_is(int number) { return number == config().mutant; }

bool sees(int number, bool value, bool lost_value) {
  if (value != lost_value) g_seen[number] = true;
  return value;
}

std::vector<int> take_seen() {
  std::vector<int> seen;
  for (int number = 0; number < kMostMutants; ++number) {
    if (g_seen[number]) seen.push_back(number);
    g_seen[number] = false;
  }
  return seen;
}

}  // namespace cuemu
