// `cerberus_ext._host.SuffixIndex`. Its methods hold the GIL, which is all the locking there is.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "arrays.h"
#include "suffix_index.h"

namespace cerberus::search {
namespace {

// Tokens as a 1-D array. An empty list has no integer type, so it is let through; uint64 does not fit int64.
Int64s tokens_array(const char* caller, const char* name, const py::object& value) {
  const py::array array = py::array::ensure(value);
  if (!array) return Int64s(checked_array(caller, name, value, 1, "iu"));  // says what it is
  if (array.ndim() == 1 && array.size() == 0) return Int64s(0);
  return Int64s(checked_array(caller, name, array, 1, array.itemsize() == 8 ? "i" : "iu"));
}

py::tuple draft_arrays(Continuation&& drafts) {
  const auto length = static_cast<py::ssize_t>(drafts.tokens.size());
  return py::make_tuple(to_numpy(std::move(drafts.tokens), {length}),
                        to_numpy(std::move(drafts.matches), {length}));
}

void extend(SuffixIndex& index, const py::object& tokens) {
  const Int64s array = tokens_array("SuffixIndex.extend", "tokens", tokens);
  index.extend(array.data(), array.size());
}

py::tuple propose(const SuffixIndex& index, int64_t length) { return draft_arrays(index.propose(length)); }

py::tuple propose_after(const SuffixIndex& index, const py::object& tail, int64_t length) {
  const Int64s array = tokens_array("SuffixIndex.propose_after", "tail", tail);
  return draft_arrays(index.propose_after(array.data(), array.size(), length));
}

py::array_t<int64_t> record(const SuffixIndex& index) {
  return to_numpy(std::vector<int64_t>(index.record()), {index.max_match() + 1, 2});
}

}  // namespace

void bind_suffix_index(py::module_& m) {
  py::class_<SuffixIndex>(
      m, "SuffixIndex",
      R"(How a text goes on, judging by its own past: an index that grows by a token at a time.

The match of a text is the longest run of its last tokens, at most `max_match`, that is followed by a token somewhere in
what is indexed. The draft is the token that has followed it most often; of several the one that did so last.

max_match: 1 .. 1024. The work per token grows with it.
max_tokens: 2 .. 2^30, the most tokens that are remembered. Tokens are indexed in halves of that size: when one is full,
the one before it is forgotten. Where both match, the longer match counts, of equal ones the younger half's.
Raises ValueError on other sizes.)")
      .def(py::init<int64_t, int64_t>(), py::arg("max_match") = 24, py::arg("max_tokens") = 1 << 20)
      .def("extend", &extend, py::arg("tokens"),
           "Appends tokens.\n\n"
           "tokens: (N,) integers in 0 .. 2^31 - 1. Raises ValueError on anything else, and appends none.")
      .def("end_document", &SuffixIndex::end_document,
           "What is appended from here on is another text: no match reaches across.")
      .def("propose", &propose, py::arg("length"),
           "What follows the text, token by token, each draft being context of the next.\n\n"
           "length: the most drafts, 0 .. 2^20.\n"
           "Returns (tokens, matches), both (n,) int64 with n <= length: draft i was made from a match of\n"
           "matches[i] tokens, and there is none after the last one where n < length.\n"
           "Raises ValueError on another length.")
      .def("propose_after", &propose_after, py::arg("tail"), py::arg("length"),
           "The same as `propose`, after any tokens instead of the text's.\n\n"
           "tail: (N,) integers in 0 .. 2^31 - 1; the last `max_match` of them count.\n"
           "Raises ValueError on anything else.")
      .def("record", &record,
           "How often matches have been right, by their length.\n\n"
           "Returns (max_match + 1, 2) int64: how often there was a match of m tokens before a token was\n"
           "appended, and how often that token was the draft. Row 0 counts the tokens without a match.")
      .def("__len__", &SuffixIndex::size)
      .def_property_readonly("size", &SuffixIndex::size, "Tokens that are remembered, as len().")
      .def_property_readonly("max_match", &SuffixIndex::max_match)
      .def_property_readonly("max_tokens", &SuffixIndex::max_tokens)
      .def_property_readonly("nbytes", &SuffixIndex::bytes, "Bytes of memory in use.");
}

}  // namespace cerberus::search
