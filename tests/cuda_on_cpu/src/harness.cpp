// The Python module of an op's kernels: run() calls one entry of its binding.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include "binding.h"
#include "checker.h"
#include "switches.h"

namespace py = pybind11;

namespace cuemu {
namespace {

constexpr size_t kOffsetUnit = 16;  // vector accesses are of at most so many bytes

HostArray host_array(const std::string& name, const py::array& array) {
  HostArray result;
  result.name = name;
  result.type = py::str(array.dtype().attr("str")).cast<std::string>().substr(1);
  result.data = static_cast<char*>(const_cast<void*>(array.data()));
  result.item_size = static_cast<size_t>(array.itemsize());
  result.offset = reinterpret_cast<uintptr_t>(array.data()) % kOffsetUnit;
  result.shape.assign(array.shape(), array.shape() + array.ndim());
  result.strides.assign(array.strides(), array.strides() + array.ndim());
  for (const int64_t stride : result.strides) {
    if (stride < 0) throw py::value_error(name + ": negative strides");
  }
  return result;
}

void configure(const std::string& order, uint64_t seed, double timeout, size_t shared_limit,
               int failing_launch, int mutant) {
  const std::map<std::string, Order> orders{
      {"forward", Order::kForward}, {"reverse", Order::kReverse}, {"random", Order::kRandom}};
  config() = Config{orders.at(order), seed, timeout, shared_limit, failing_launch, mutant};
}

// (status, [(kind, text), ...], number of launches)
py::tuple run(const std::string& entry, const std::map<std::string, py::array>& arrays,
              const std::map<std::string, double>& numbers) {
  const auto found = entries().find(entry);
  if (found == entries().end()) throw py::key_error("no entry '" + entry + "'");
  std::vector<HostArray> host_arrays;
  for (const auto& [name, array] : arrays) host_arrays.push_back(host_array(name, array));
  findings().clear();
  g_block.abandoned = false;
  g_block.launches = 0;
  check_begin_call();
  Arguments arguments(std::move(host_arrays), numbers);
  int status = 0;
  {
    const Watchdog watchdog;
    status = found->second(arguments);
  }
  check_end_call();
  arguments.finish();
  py::list list;
  for (const Finding& finding : findings()) list.append(py::make_tuple(finding.kind, finding.text));
  return py::make_tuple(status, list, g_block.launches);
}

std::vector<std::string> entry_names() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : entries()) names.push_back(name);
  return names;
}

}  // namespace
}  // namespace cuemu

PYBIND11_MODULE(kernels, module) {
  module.def("configure", &cuemu::configure, py::kw_only(), py::arg("order"), py::arg("seed"),
             py::arg("timeout"), py::arg("shared_limit"), py::arg("failing_launch"),
             py::arg("mutant"));
  module.def("run", &cuemu::run);
  module.def("entries", &cuemu::entry_names);
  module.def("take_seen", &cuemu::take_seen);
  module.attr("is_checked") = cuemu::kIsChecked;
}
