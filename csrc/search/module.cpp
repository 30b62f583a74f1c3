// The pybind11 module `cerberus_ext._host`: host-side structures. Arrays in, arrays out; every bad input is a
// ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <utility>

#include "arrays.h"
#include "tree.h"

namespace py = pybind11;

namespace cerberus::search {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

Int64s parents_array(const char* caller, const py::object& parents) {
  return Int64s(checked_array(caller, "parents", parents, 1, "i"));
}

py::tuple best_tree_numpy(const py::object& accuracy, int64_t size) {
  const Doubles table(checked_array("best_tree", "accuracy", accuracy, 2, "fiu"));
  Tree tree = best_tree(table.data(), table.shape(0), table.shape(1), size);
  const auto nodes = static_cast<py::ssize_t>(tree.parents.size());
  return py::make_tuple(to_numpy(std::move(tree.parents), {nodes}), to_numpy(std::move(tree.ranks), {nodes}));
}

py::array_t<int64_t> depths_numpy(const py::object& parents) {
  const Int64s array = parents_array("depths", parents);
  return to_numpy(depths(array.data(), array.size()), {array.size()});
}

py::array_t<int64_t> ancestors_numpy(const py::object& parents) {
  const Int64s array = parents_array("ancestors", parents);
  const auto words = static_cast<py::ssize_t>(ancestor_words(array.size()));
  return to_numpy(ancestors(array.data(), array.size()), {array.size(), words});
}

}  // namespace

void bind_draft_search(py::module_& m);
void bind_suffix_index(py::module_& m);

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side structures of cerberus_ext, in C++.";
  bind_draft_search(m);
  bind_suffix_index(m);
  m.def("best_tree", &best_tree_numpy, py::arg("accuracy"), py::arg("size"),
        "The draft tree with the largest expected number of accepted drafts.\n\n"
        "accuracy: (K, P), accuracy[d][r] is the probability in 0 .. 1 that draft r of head d + 1 is right.\n"
        "size: nodes of the tree, root included, >= 1; fewer come back where K and P allow no more.\n"
        "Returns (parents, ranks), both (N,) int64: parents[0] = -1, parents[i] < i, ranks[0] = 0.\n"
        "Equal inputs give equal trees: ties go to the node that could be added first.\n"
        "Raises ValueError on another rank, a value outside 0 .. 1, or size < 1.");
  m.def("ancestors", &ancestors_numpy, py::arg("parents"),
        "Ancestor bit masks of a tree, each node its own ancestor.\n\n"
        "parents: (N,) integers, parents[0] = -1 and 0 <= parents[i] < i.\n"
        "Returns (N, ceil(N / 64)) int64: bit j of row i is set where node j is on the path root .. i.\n"
        "Raises ValueError on anything else.");
  m.def("depths", &depths_numpy, py::arg("parents"),
        "Depth of every node of a tree: 0 for the root.\n\n"
        "parents: (N,) integers, parents[0] = -1 and 0 <= parents[i] < i.\n"
        "Returns (N,) int64. Raises ValueError on anything else.");
}

}  // namespace cerberus::search
