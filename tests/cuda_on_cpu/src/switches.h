// What a kernel can lose at run time, for the mutations of the tests: mutants.py writes these
// calls to every such place.
#pragma once

#include <vector>

namespace cuemu {

// Whether this is what the call is to lose. Pure as far as the kernel is concerned.
[[gnu::const]] bool mutant_is(int number);

// Returns value. Where it is not what it counts as once it is lost, the loss can be noticed.
bool sees(int number, bool value, bool lost_value);

// Since the last time, the numbers whose loss can be noticed.
std::vector<int> take_seen();

}  // namespace cuemu
