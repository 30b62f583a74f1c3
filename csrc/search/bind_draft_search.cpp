#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "arrays.h"
#include "draft_search.h"
#include "head_drafts.h"

namespace cerberus::search {
namespace {

using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;

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

// `value` where it is an array of this dtype and shape (-1: any size), without a copy: it stays the caller's.
template <typename T>
py::array_t<T, py::array::c_style> exact_array(const char* caller, const char* name, const py::object& value,
                                               const std::vector<py::ssize_t>& shape) {
  using Array = py::array_t<T, py::array::c_style>;
  bool fits = py::isinstance<Array>(value);
  if (fits) {
    const auto array = py::reinterpret_borrow<py::array>(value);
    fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (size_t axis = 0; fits && axis < shape.size(); ++axis)
      fits = shape[axis] < 0 || array.shape(static_cast<py::ssize_t>(axis)) == shape[axis];
  }
  if (fits) return py::reinterpret_borrow<Array>(value);
  std::string sizes;
  for (const py::ssize_t axis : shape)
    sizes += (sizes.empty() ? "" : ", ") + (axis < 0 ? "any" : std::to_string(axis));
  throw std::invalid_argument(std::string(caller) + ": " + name + " must be a contiguous array of dtype " +
                              std::string(py::str(py::dtype::of<T>())) + " and shape (" + sizes + ")");
}

// ConditionalTables, and the arrays that they read.
class TableArrays {
 public:
  TableArrays(const py::object& parents, const py::object& children, const py::object& places,
              const py::object& slopes, const py::object& rest)
      : parents_(exact_array<int16_t>(kName, "parents", parents, {-1, -1, -1})),
        children_(exact_array<int16_t>(kName, "children", children, {parents_.shape(1), parents_.shape(2)})),
        places_(exact_array<int64_t>(kName, "places", places, {-1})),
        slopes_(exact_array<float>(kName, "slopes", slopes, {parents_.shape(0)})),
        rest_(exact_array<float>(kName, "rest", rest, {parents_.shape(0)})) {}

  ConditionalTables view() const {
    ConditionalTables tables;
    tables.parents = reinterpret_cast<const uint16_t*>(parents_.data());
    tables.children = reinterpret_cast<const uint16_t*>(children_.data());
    tables.places = places_.data();
    tables.slopes = slopes_.data();
    tables.rest = rest_.data();
    tables.heads = static_cast<size_t>(parents_.shape(0)) + 1;
    tables.vocab = static_cast<size_t>(parents_.shape(1));
    tables.rank = static_cast<size_t>(parents_.shape(2));
    tables.tokens = static_cast<size_t>(places_.shape(0));
    return tables;
  }

 private:
  static constexpr const char* kName = "ConditionalTables";
  py::array_t<int16_t, py::array::c_style> parents_, children_;
  py::array_t<int64_t, py::array::c_style> places_;
  py::array_t<float, py::array::c_style> slopes_, rest_;
};

// The arrays of HeadDrafts.
class Conditional {
 public:
  Conditional(const TableArrays& tables, const py::object& tokens, const py::object& logprobs,
              const py::object& after, const py::object& platt, int64_t proposer)
      : tables_(tables.view()), proposer_(proposer) {
    const auto heads = static_cast<py::ssize_t>(tables_.heads);
    tokens_ = exact_array<int64_t>(kName, "heads: tokens", tokens, {heads, -1});
    const py::ssize_t drafts = tokens_.shape(1);
    logprobs_ = exact_array<float>(kName, "heads: logprobs", logprobs, {heads, drafts});
    if (!after.is_none())
      after_ = exact_array<float>(kName, "heads: after", after, {heads - 1, drafts, drafts});
    if (!platt.is_none()) platt_ = exact_array<double>(kName, "heads: platt", platt, {heads, 2});
  }

  HeadDrafts view() const {
    return {&tables_,
            tokens_.data(),
            logprobs_.data(),
            after_ ? after_->data() : nullptr,
            platt_ ? platt_->data() : nullptr,
            static_cast<size_t>(tokens_.shape(1)),
            proposer_};
  }

 private:
  static constexpr const char* kName = "best_drafts";
  ConditionalTables tables_;
  py::array_t<int64_t, py::array::c_style> tokens_;
  py::array_t<float, py::array::c_style> logprobs_;
  std::optional<py::array_t<float, py::array::c_style>> after_;
  std::optional<py::array_t<double, py::array::c_style>> platt_;
  int64_t proposer_;
};

using GivenHeads = std::tuple<const TableArrays*, py::object, py::object, py::object, py::object, int64_t>;

py::tuple best_drafts_numpy(const py::object& tokens, const py::object& probabilities,
                            const py::object& proposers,
                            const std::vector<std::tuple<py::object, py::object, int64_t>>& paths,
                            int64_t vocabulary, int64_t size, int64_t max_depth,
                            const std::optional<GivenHeads>& heads) {
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
  std::optional<Conditional> conditional;
  HeadDrafts head_drafts;
  if (heads) {
    const auto& [tables, head_tokens, logprobs, after, platt, proposer] = *heads;
    if (!tables)
      throw std::invalid_argument("best_drafts: heads: tables must be ConditionalTables, got None");
    head_drafts = conditional.emplace(*tables, head_tokens, logprobs, after, platt, proposer).view();
  }
  BestDrafts drafts = best_drafts(depth_drafts, path_drafts, vocabulary, size, max_depth,
                                  conditional ? &head_drafts : nullptr);
  const auto nodes = static_cast<py::ssize_t>(drafts.parents.size());
  py::array_t<double> accepted(nodes, drafts.probabilities.data());
  return py::make_tuple(to_numpy(std::move(drafts.parents), {nodes}),
                        to_numpy(std::move(drafts.tokens), {nodes}),
                        to_numpy(std::move(drafts.proposers), {nodes}), std::move(accepted));
}

py::tuple read_drafts_numpy(const py::object& ids, const py::object& logprobs, const py::object& platt,
                            int64_t vocabulary, int64_t max_depth) {
  constexpr const char* kName = "read_drafts";
  const Int64s head_ids(checked_array(kName, "ids", ids, 2, "iu"));
  const Floats head_logprobs(checked_array(kName, "logprobs", logprobs, 2, "f"));
  const py::ssize_t heads = head_ids.shape(0), drafts = head_ids.shape(1);
  if (head_logprobs.shape(0) != heads || head_logprobs.shape(1) != drafts)
    throw std::invalid_argument("read_drafts: ids and logprobs must have one shape");
  std::optional<py::array_t<double, py::array::c_style>> lines;
  if (!platt.is_none()) lines = exact_array<double>(kName, "platt", platt, {heads, 2});
  if (max_depth < 0) throw std::invalid_argument("read_drafts: max_depth must be >= 0");
  const py::ssize_t rows = std::min<py::ssize_t>(heads, max_depth);
  py::array_t<int64_t> tokens({rows, drafts});
  py::array_t<double> probabilities({rows, drafts});
  read_drafts(head_ids.data(), head_logprobs.data(), lines ? lines->data() : nullptr,
              static_cast<size_t>(rows), static_cast<size_t>(drafts), vocabulary, tokens.mutable_data(),
              probabilities.mutable_data());
  return py::make_tuple(std::move(tokens), std::move(probabilities));
}

}  // namespace

void bind_draft_search(py::module_& m) {
  py::class_<TableArrays>(m, "ConditionalTables",
                          R"(The tables of conditional heads, see drafting/conditional.py.

parents (K - 1, Vd, r), children (Vd, r): the bits of bfloat16 as int16; places (V,) int64: a token's row of the tables,
another number where it has none; slopes, rest (K - 1,) float32. Contiguous; they are not copied, and may change.
Raises ValueError on anything else.)")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&,
                    const py::object&>(),
           py::arg("parents"), py::arg("children"), py::arg("places"), py::arg("slopes"), py::arg("rest"));
  m.def("best_drafts", &best_drafts_numpy, py::arg("tokens"), py::arg("probabilities"), py::arg("proposers"),
        py::arg("paths"), py::arg("vocabulary"), py::arg("size"), py::arg("max_depth"),
        py::arg("heads") = py::none(),
        R"(The nodes most likely to be accepted, of all that several proposers draft.

tokens, probabilities, proposers: (K, P), the drafts for depths 1 .. K, best first; probabilities in 0 .. 1;
proposers: who makes each of them, any integers.
paths: list of (tokens (n,), probabilities (n,), proposer): drafts of how the text goes on; probabilities are those of a
token where the ones before it are right. vocabulary: tokens are in 0 .. vocabulary - 1.
size: nodes, the root included, >= 1; fewer come back where there are no more drafts, of which one of probability 0 is
none.
max_depth: of any node, >= 0.
heads: None, or (tables, tokens, logprobs, after, platt, proposer) of heads with conditional drafts: tokens (H, D) int64
and logprobs (H, D) float32 of what they draft, D of each of H heads; after (H - 1, D, D) float32: what `ops.rerank`
makes of these, or None; platt (H, 2) float64: (slope, shift) of each head, or None; proposer: which of the drafts above
are theirs. After every node but the root these have the probability that they have after its token: by `after` where it
is one of the heads' drafts for its depth, else by the tables; as they are where it has no row there.
Returns (parents, tokens, proposers, probabilities), (N,) each, best first, int64 but for the last, float64: parents[0]
= -1, parents[i] < i; proposers: who drafted the node, 0 for the root; probabilities: that it is accepted, 1 for the
root. The first n nodes are the best tree of n nodes.
A token that both kinds draft after a node is one node, with the larger probability and its proposer; the other drafts
after that node share what this probability leaves them. Raises ValueError on anything else.)");
  m.def("read_drafts", &read_drafts_numpy, py::arg("ids"), py::arg("logprobs"), py::arg("platt"),
        py::arg("vocabulary"), py::arg("max_depth"),
        R"(What heads draft, as the probabilities that their drafts are right.

ids (K, P) integers, logprobs (K, P), best first; platt (K, 2) float64, contiguous: (slope, shift) of each head, see
drafting/platt.py, or None: probabilities are taken as they are. vocabulary: tokens are in 0 .. vocabulary - 1.
max_depth: of so many heads, the first ones, >= 0.
Returns (tokens int64, probabilities float64), (min(K, max_depth), P) each, best first; what is no draft, for its id or
its probability, comes last, as token 0 with probability 0. Raises ValueError on anything else.)");
}

}  // namespace cerberus::search
