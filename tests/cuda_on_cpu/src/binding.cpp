#include "binding.h"

#include <algorithm>
#include <stdexcept>

#include "checker.h"

namespace cuemu {

std::map<std::string, Entry>& entries() {
  static std::map<std::string, Entry> map;
  return map;
}

void Array::require_axes(size_t axes) const {
  if (shape.size() == axes) return;
  throw std::invalid_argument(name + " has " + std::to_string(shape.size()) + " axes, not " +
                              std::to_string(axes));
}

Arguments::Arguments(std::vector<HostArray> arrays, std::map<std::string, double> numbers)
    : arrays_(std::move(arrays)), numbers_(std::move(numbers)) {}

bool Arguments::has(const std::string& name) const {
  const auto named = [&](const HostArray& a) { return a.name == name; };
  return numbers_.count(name) > 0 || std::any_of(arrays_.begin(), arrays_.end(), named);
}

Array Arguments::array(const std::string& name, Mode mode) {
  const auto found = std::find_if(arrays_.begin(), arrays_.end(),
                                  [&](const HostArray& a) { return a.name == name; });
  if (found == arrays_.end()) throw std::invalid_argument("no array '" + name + "' was given");
  used_.push_back(name);
  Array result{add_buffer(*found, mode).begin, found->type, found->shape, {}, name};
  for (const int64_t bytes : found->strides) {
    result.stride.push_back(bytes / static_cast<int64_t>(found->item_size));
  }
  return result;
}

void* Arguments::scratch(const std::string& name, int64_t bytes) {
  scratch_.push_back({name, "u1", nullptr, 1, 0, {bytes}, {1}});
  return add_buffer(scratch_.back(), Mode::kScratch).begin;
}

const Buffer& Arguments::add_buffer(const HostArray& array, Mode mode) {
  buffers_.emplace_back(array, mode);
  check_add_buffer(buffers_.back());
  return buffers_.back();
}

double Arguments::number(const std::string& name) {
  const auto found = numbers_.find(name);
  if (found == numbers_.end()) throw std::invalid_argument("no number '" + name + "' was given");
  used_.push_back(name);
  return found->second;
}

int64_t Arguments::integer(const std::string& name) { return static_cast<int64_t>(number(name)); }

void Arguments::finish() const {
  const auto require_used = [&](const std::string& name) {
    if (std::find(used_.begin(), used_.end(), name) == used_.end()) {
      throw std::invalid_argument("argument '" + name + "' is not one that this kernel takes");
    }
  };
  for (const HostArray& array : arrays_) require_used(array.name);
  for (const auto& [name, value] : numbers_) require_used(name);
  for (const Buffer& buffer : buffers_) {
    buffer.check_slack();
    buffer.copy_back();
  }
}

}  // namespace cuemu
