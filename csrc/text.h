// A `str` of a schema, as the functions of ops take it.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <string>

namespace cerberus {

// Not std::string: up to torch 2.13 the conversion to it leaves one behind at every call (PyTorch's issue
// 191340).
struct Text {
  std::string text;
};

}  // namespace cerberus

template <>
struct torch::stable::detail::ToImpl<cerberus::Text> {
  static cerberus::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    cerberus::Text result{std::string(data, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return result;
  }
};
