// NumPy arrays in and out of the module `_host`.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace cerberus::search {

namespace py = pybind11;

using Int64s = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// `value` as an array of `rank` axes whose NumPy kind is one of `kinds`; only then may it be cast without
// loss.
inline py::array checked_array(const char* caller, const char* name, const py::object& value, int rank,
                               const char* kinds) {
  const std::string must =
      std::string(caller) + ": " + name + " must be a " + std::to_string(rank) + "-D array of " +
      (std::string(kinds).find('f') == std::string::npos ? "integers" : "real numbers") + ", got ";
  const py::array array = py::array::ensure(value);
  if (!array) {
    PyErr_Clear();
    throw std::invalid_argument(must + std::string(py::str(py::type::of(value))));
  }
  if (array.ndim() != rank || std::string(kinds).find(array.dtype().kind()) == std::string::npos) {
    throw std::invalid_argument(must + std::to_string(array.ndim()) + "-D of dtype " +
                                std::string(py::str(array.dtype())));
  }
  return array;
}

// Hands a vector over to NumPy: the array owns it, nothing is copied.
inline py::array_t<int64_t> to_numpy(std::vector<int64_t>&& values, std::vector<py::ssize_t> shape) {
  auto* owned = new std::vector<int64_t>(std::move(values));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<int64_t>*>(p); });
  return py::array_t<int64_t>(std::move(shape), owned->data(), owner);
}

}  // namespace cerberus::search
