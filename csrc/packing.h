// How the bindings of steps are told what is packed: by dtypes.
#pragma once

#include "args.h"
#include "check.h"

namespace cerberus {

// A packed tensor's dtype says how.
inline Packing packing_of(ScalarType type) {
  switch (type) {
    case ScalarType::Byte:
      return Packing::kPacked;
    case ScalarType::Char:
      return Packing::kFourBits;
    case ScalarType::Short:
      return Packing::kEightBits;
    case ScalarType::Int:
      return Packing::kBytes;
    case ScalarType::Long:
      return Packing::kBytesOf16;
    case ScalarType::UInt16:
      return Packing::kFiveBits;
    default:
      return Packing::kNone;
  }
}

}  // namespace cerberus
