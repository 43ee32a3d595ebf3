// The operator's arguments checked and unpacked, and its results allocated: the same on every device.
#pragma once

#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "../check.h"
#include "math.h"

namespace latro::self_reward {

constexpr const char* OP = "self_reward";

inline Kl parse_kl(const std::string& name) {
  require(name == "k1" || name == "k2" || name == "k3", OP, ": kl must be 'k1', 'k2' or 'k3', got '", name, "'");
  return name == "k1" ? Kl::k1 : name == "k2" ? Kl::k2 : Kl::k3;
}

inline Scale parse_scale(const std::optional<std::string>& name) {
  if (!name) {
    return Scale::none;
  }
  require(*name == "group" || *name == "batch", OP, ": scale must be None, 'group' or 'batch', got '", *name, "'");
  return *name == "group" ? Scale::group : Scale::batch;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend, class T>
Outputs run(Arguments<T> arguments, const Tensor& logps) {
  const int64_t M = arguments.M;
  const int64_t R = arguments.R;
  const auto empty = [&](torch::headeronly::IntHeaderOnlyArrayRef shape) {
    return torch::stable::new_empty(logps, shape);
  };
  Outputs outputs = {empty({}), empty({R}), empty({R}), empty({R}), empty({R}), empty({R}), empty({M})};
  const Results<T> results = std::apply(
      [](const auto&... tensor) { return Results<T>{static_cast<T*>(tensor.mutable_data_ptr())...}; }, outputs);

  const Tensor scratch = torch::stable::new_empty(logps, {5 * R}, ScalarType::Double);
  double* exact = static_cast<double*>(scratch.mutable_data_ptr());
  Backend::run(arguments, Exact{exact, exact + R, exact + 2 * R, exact + 3 * R, exact + 4 * R}, results, logps);
  return outputs;
}

// The operator. Backend::run(arguments, exact, results, logps) fills exact and results; arguments hold float or double.
template <class Backend>
Outputs self_reward(
    const Tensor& logps,
    const Tensor& segment,
    const Tensor& kind,
    const Tensor& rationale,
    const Tensor& option,
    const Tensor& prompt,
    const std::optional<Tensor>& ref_logps,
    const std::optional<Tensor>& advantage,
    double beta,
    double answer_weight,
    const std::string& kl,
    std::optional<double> floor,
    const std::optional<std::string>& scale) {
  const ScalarType dtype = logps.scalar_type();
  require(
      dtype == ScalarType::Float || dtype == ScalarType::Double, OP, ": logps must be float32 or float64, got ",
      torch::headeronly::toString(dtype));
  const int64_t M = logps.numel();
  const int64_t S = kind.numel();
  const int64_t R = prompt.numel();
  const Options options = {
      beta, answer_weight, floor.value_or(-std::numeric_limits<double>::infinity()), parse_kl(kl), parse_scale(scale),
  };

  // These hold what the pointers below point to.
  const auto indices = [&](const char* name, const Tensor& tensor, int64_t size) {
    return vector_argument(OP, name, tensor, size, ScalarType::Long, logps);
  };
  const auto values = [&](const char* name, const Tensor& tensor, int64_t size) {
    return vector_argument(OP, name, tensor, size, dtype, logps);
  };
  const Tensor logps_ = values("logps", logps, M);
  const Tensor segment_ = indices("segment", segment, M);
  const Tensor kind_ = indices("kind", kind, S);
  const Tensor rationale_ = indices("rationale", rationale, S);
  const Tensor option_ = indices("option", option, S);
  const Tensor prompt_ = indices("prompt", prompt, R);
  const std::optional<Tensor> ref_ = ref_logps ? std::optional(values("ref_logps", *ref_logps, M)) : std::nullopt;
  const std::optional<Tensor> given_ = advantage ? std::optional(values("advantage", *advantage, R)) : std::nullopt;

  const auto call = [&]<class T>(T /*dtype*/) {
    const auto index = [](const Tensor& tensor) { return tensor.const_data_ptr<int64_t>(); };
    const auto value = [](const Tensor& tensor) { return tensor.const_data_ptr<T>(); };
    return run<Backend, T>(
        {M, S, R, value(logps_), index(segment_), index(kind_), index(rationale_), index(option_), index(prompt_),
         ref_ ? value(*ref_) : nullptr, given_ ? value(*given_) : nullptr, options},
        logps_);
  };
  return dtype == ScalarType::Float ? call(float{}) : call(double{});
}

}  // namespace latro::self_reward
