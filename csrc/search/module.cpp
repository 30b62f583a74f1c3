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

py::array_t<int64_t> pack_tree_numpy(const py::object& parents, const py::object& tokens,
                                     const py::object& ranks, int64_t size, int64_t batch, int64_t drafts) {
  if (size < 1 || batch < 1) throw std::invalid_argument("pack_tree: size and batch must be >= 1");
  const Int64s tree = parents_array("pack_tree", parents);
  const Int64s given(checked_array("pack_tree", "tokens", tokens, 1, "iu"));
  const bool is_ranked = !ranks.is_none();
  const Int64s named = is_ranked ? Int64s(checked_array("pack_tree", "ranks", ranks, 1, "i")) : given;
  if (given.size() != tree.size() || named.size() != tree.size())
    throw std::invalid_argument("pack_tree: tokens and ranks must be of as many nodes as parents");
  std::vector<int64_t> packed = pack_tree(tree.data(), given.data(), is_ranked ? named.data() : nullptr,
                                          static_cast<size_t>(tree.size()), static_cast<size_t>(size),
                                          static_cast<size_t>(batch), drafts);
  const auto count = static_cast<py::ssize_t>(packed.size());
  return to_numpy(std::move(packed), {count});
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
  m.def("pack_tree", &pack_tree_numpy, py::arg("parents"), py::arg("tokens"), py::arg("ranks"),
        py::arg("size"), py::arg("batch"), py::arg("drafts"),
        "What a step of `size` nodes reads of a tree, see runtime/static_step.py.\n\n"
        "parents, tokens: (N,) integers, N <= size, parents as for `depths`. A smaller tree is padded with "
        "repetitions of node 1.\n"
        "ranks: (N,) integers, node i is draft ranks[i] of the head of its depth, less than 0: it is "
        "tokens[i]; "
        "or None: all are.\n"
        "batch: copies of the tokens, >= 1. drafts: of each head.\n"
        "Returns parents, depths, sources (size,), ancestors (size, W), tokens (batch, size), one behind the "
        "other, int64. Raises ValueError on anything else.");
}

}  // namespace cerberus::search
