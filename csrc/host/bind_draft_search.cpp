#include <pybind11/stl.h>

#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "draft_search.h"

namespace cerberus::host {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;

// The tokens and the chances of one source, kept alive while the search reads them.
struct Guessed {
  Int64s tokens;
  Doubles chances;

  Guessed(const py::object& tokens, const py::object& chances, int rank)
      : tokens(checked_array("best_drafts", "tokens", tokens, rank, "iu")),
        chances(checked_array("best_drafts", "chances", chances, rank, "f")) {
    for (int axis = 0; axis < rank; ++axis) {
      if (this->tokens.shape(axis) != this->chances.shape(axis)) {
        throw std::invalid_argument("best_drafts: tokens and chances must have one shape");
      }
    }
  }
};

py::tuple best_drafts_numpy(const py::object& tokens, const py::object& chances, const py::object& sources,
                            const std::vector<std::tuple<py::object, py::object, int64_t>>& paths,
                            int64_t vocabulary, int64_t size, int64_t deepest) {
  const Guessed places(tokens, chances, 2);
  const Int64s place_sources(checked_array("best_drafts", "sources", sources, 2, "iu"));
  for (int axis = 0; axis < 2; ++axis) {
    if (place_sources.shape(axis) != places.tokens.shape(axis)) {
      throw std::invalid_argument("best_drafts: sources must have the shape of tokens");
    }
  }
  std::vector<Guessed> kept;
  std::vector<PathGuess> path_guesses;
  kept.reserve(paths.size());
  for (const auto& [path_tokens, path_chances, source] : paths) {
    kept.emplace_back(path_tokens, path_chances, 1);
    const Guessed& path = kept.back();
    path_guesses.push_back(
        {path.tokens.data(), path.chances.data(), static_cast<size_t>(path.tokens.size()), source});
  }
  const PlaceGuesses place_guesses{places.tokens.data(), places.chances.data(), place_sources.data(),
                                   static_cast<size_t>(places.tokens.shape(0)),
                                   static_cast<size_t>(places.tokens.shape(1))};
  Drafts drafts = best_drafts(place_guesses, path_guesses, vocabulary, size, deepest);
  const auto nodes = static_cast<py::ssize_t>(drafts.parents.size());
  py::array_t<double> found(nodes, drafts.chances.data());
  return py::make_tuple(to_numpy(std::move(drafts.parents), {nodes}),
                        to_numpy(std::move(drafts.tokens), {nodes}),
                        to_numpy(std::move(drafts.sources), {nodes}), std::move(found));
}

}  // namespace

void bind_draft_search(py::module_& m) {
  m.def(
      "best_drafts", &best_drafts_numpy, py::arg("tokens"), py::arg("chances"), py::arg("sources"),
      py::arg("paths"), py::arg("vocabulary"), py::arg("size"), py::arg("deepest"),
      "The nodes most likely to be accepted, of all that several sources guess.\n\n"
      "tokens, chances, sources: (K, P), the guesses for each of the next K places, best first; chances in\n"
      "0 .. 1; sources: who makes each of them, any integers.\n"
      "paths: list of (tokens (n,), chances (n,), source): guesses of how the text goes on; chances are\n"
      "those of a token where the ones before it are right. vocabulary: tokens are in 0 .. vocabulary - 1.\n"
      "size: nodes, the root included, >= 1; fewer come back where there are no more guesses, of which one\n"
      "of chance 0 is none.\n"
      "deepest: of any node, >= 0.\n"
      "Returns (parents, tokens, sources, chances), (N,) each, best first, int64 but for the last, float64:\n"
      "parents[0] = -1, parents[i] < i; sources: who guessed the node, 0 for the root; chances: that it is\n"
      "accepted, 1 for the root. The first n nodes are the best tree of n nodes.\n"
      "A token that both kinds guess after a node is one node, with the larger chance and its source; the\n"
      "other guesses after that node share what this chance leaves them. Raises ValueError on anything "
      "else.");
}

}  // namespace cerberus::host
