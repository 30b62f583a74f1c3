#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "draft_search.h"

namespace cerberus::search {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

// The tokens and the probabilities of one proposer, kept alive while the search reads them.
struct Drafted {
  Int64s tokens;
  Doubles probabilities;

  Drafted(const py::object& tokens, const py::object& probabilities, int rank)
      : tokens(checked_array("best_drafts", "tokens", tokens, rank, "iu")),
        probabilities(checked_array("best_drafts", "probabilities", probabilities, rank, "f")) {
    for (int axis = 0; axis < rank; ++axis) {
      if (this->tokens.shape(axis) != this->probabilities.shape(axis)) {
        throw std::invalid_argument("best_drafts: tokens and probabilities must have one shape");
      }
    }
  }
};

py::tuple best_drafts_numpy(const py::object& tokens, const py::object& probabilities,
                            const py::object& proposers,
                            const std::vector<std::tuple<py::object, py::object, int64_t>>& paths,
                            int64_t vocabulary, int64_t size, int64_t max_depth) {
  const Drafted by_depth(tokens, probabilities, 2);
  const Int64s depth_proposers(checked_array("best_drafts", "proposers", proposers, 2, "iu"));
  for (int axis = 0; axis < 2; ++axis) {
    if (depth_proposers.shape(axis) != by_depth.tokens.shape(axis)) {
      throw std::invalid_argument("best_drafts: proposers must have the shape of tokens");
    }
  }
  std::vector<Drafted> kept;
  std::vector<PathDraft> path_drafts;
  kept.reserve(paths.size());
  for (const auto& [path_tokens, path_probabilities, proposer] : paths) {
    kept.emplace_back(path_tokens, path_probabilities, 1);
    const Drafted& path = kept.back();
    path_drafts.push_back(
        {path.tokens.data(), path.probabilities.data(), static_cast<size_t>(path.tokens.size()), proposer});
  }
  const DepthDrafts depth_drafts{by_depth.tokens.data(), by_depth.probabilities.data(),
                                 depth_proposers.data(), static_cast<size_t>(by_depth.tokens.shape(0)),
                                 static_cast<size_t>(by_depth.tokens.shape(1))};
  BestDrafts drafts = best_drafts(depth_drafts, path_drafts, vocabulary, size, max_depth);
  const auto nodes = static_cast<py::ssize_t>(drafts.parents.size());
  py::array_t<double> accepted(nodes, drafts.probabilities.data());
  return py::make_tuple(to_numpy(std::move(drafts.parents), {nodes}),
                        to_numpy(std::move(drafts.tokens), {nodes}),
                        to_numpy(std::move(drafts.proposers), {nodes}), std::move(accepted));
}

}  // namespace

void bind_draft_search(py::module_& m) {
  m.def("best_drafts", &best_drafts_numpy, py::arg("tokens"), py::arg("probabilities"), py::arg("proposers"),
        py::arg("paths"), py::arg("vocabulary"), py::arg("size"), py::arg("max_depth"),
        R"(The nodes most likely to be accepted, of all that several proposers draft.

tokens, probabilities, proposers: (K, P), the drafts for depths 1 .. K, best first; probabilities in 0 .. 1;
proposers: who makes each of them, any integers.
paths: list of (tokens (n,), probabilities (n,), proposer): drafts of how the text goes on; probabilities are those of a
token where the ones before it are right. vocabulary: tokens are in 0 .. vocabulary - 1.
size: nodes, the root included, >= 1; fewer come back where there are no more drafts, of which one of probability 0 is
none.
max_depth: of any node, >= 0.
Returns (parents, tokens, proposers, probabilities), (N,) each, best first, int64 but for the last, float64: parents[0]
= -1, parents[i] < i; proposers: who drafted the node, 0 for the root; probabilities: that it is accepted, 1 for the
root. The first n nodes are the best tree of n nodes.
A token that both kinds draft after a node is one node, with the larger probability and its proposer; the other drafts
after that node share what this probability leaves them. Raises ValueError on anything else.)");
}

}  // namespace cerberus::search
