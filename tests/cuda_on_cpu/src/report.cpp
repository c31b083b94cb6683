// Findings of a launch, and how places and threads are named in them.
#include <algorithm>

#include "runtime.h"

namespace cuemu {

namespace {
constexpr size_t kMaxFindings = 20;
}

std::vector<Finding>& findings() {
  static std::vector<Finding> list;
  return list;
}

void report(const char* kind, const std::string& text) {
  auto& list = findings();
  const auto same = [&](const Finding& f) { return f.kind == kind && f.text == text; };
  if (list.size() < kMaxFindings && std::none_of(list.begin(), list.end(), same)) {
    list.push_back({kind, text});
  }
}

std::string describe(Place place) {
  const char* slash = std::strrchr(place.file, '/');
  return std::string(slash != nullptr ? slash + 1 : place.file) + ":" + std::to_string(place.line);
}

namespace {
std::string describe(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," +
         std::to_string(index.z) + ")";
}
}  // namespace

std::string describe(const Thread& thread) {
  return "block " + describe(g_block.index) + " thread " + describe(thread.index);
}

}  // namespace cuemu
