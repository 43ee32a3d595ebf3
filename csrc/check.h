// Argument checks that name the operator, the argument, the rule and the value.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace latro {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would put the path and line of this build before the message.
template <class... Parts>
void require(bool rule, const Parts&... parts) {
  if (rule) {
    return;
  }
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline std::string shape(const Tensor& tensor) {
  std::string text;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    text += (dim ? ", " : "") + std::to_string(tensor.size(dim));
  }
  return "[" + text + "]";
}

// The tensor, contiguous, if it is [size], of this dtype and on the device of `like`.
inline Tensor vector_argument(
    const char* op, const char* name, const Tensor& tensor, int64_t size, ScalarType dtype, const Tensor& like) {
  using torch::headeronly::toString;
  const ScalarType found = tensor.scalar_type();
  require(
      tensor.dim() == 1 && tensor.size(0) == size, op, ": ", name, " must have shape [", size, "], got ",
      shape(tensor));
  require(found == dtype, op, ": ", name, " must have dtype ", toString(dtype), ", got ", toString(found));
  require(tensor.device() == like.device(), op, ": ", name, " must be on the device of the first argument");
  return torch::stable::contiguous(tensor);
}

}  // namespace latro
