// The operator's arguments checked and unpacked, and the work that the forward and the backward pass share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#include "../check.h"
#include "../cpu/instruction_set.h"
#include "plan.h"

namespace latro::linear_logprobs {

constexpr const char* OP = "linear_logprobs";

constexpr int64_t PIECE = 12 << 20;  // bytes of each of the four pieces of memory that a call has: under 64 MB together
constexpr int64_t STRIP = 192;       // vocabulary entries: two of the kernel's blocks
constexpr int64_t MOST_TOKENS = 2048;  // in a block: enough for products at full rate
constexpr int SUMS = 3;

// Memory that is not set to zero, and whose pages are first touched by the threads that fill it.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(
            static_cast<T*>(std::aligned_alloc(64, std::max<int64_t>(64, round_up(size * sizeof(T), 64)))),
            &std::free) {
    require(data_ != nullptr, OP, ": cannot allocate ", size * sizeof(T), " bytes");
  }
  T* data() const {
    return data_.get();
  }

 private:
  std::unique_ptr<T, decltype(&std::free)> data_;
};

inline Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

inline int64_t most_tokens(int64_t V, int64_t D) {
  const int64_t of_sums = PIECE / (SUMS * sizeof(float) * std::max<int64_t>(1, (V + STRIP - 1) / STRIP));
  const int64_t of_hidden = PIECE / (sizeof(float) * round_up(D, LANES));
  return std::max(LANES, std::min({MOST_TOKENS, of_sums, of_hidden}) / LANES * LANES);
}

template <class F>
void in_parallel(int64_t count, const F& f) {
  torch::stable::parallel_for(0, count, 1, f);
}

// The arguments of a call, kept alive while its pointers are used.
struct Call {
  Tensor hidden, weight;
  ScalarType dtype;
  int64_t M;
  Problem problem{};
  std::vector<float> bias;
  std::vector<double> temperatures;
  Tensor rows, targets;
  std::optional<Plan> plan;
  const Kernels* kernels;

  Call(
      const Tensor& hidden_,
      const Tensor& weight_,
      const std::optional<Tensor>& bias_,
      const Tensor& rows_,
      const Tensor& targets_,
      const Tensor& numbers_,
      const std::optional<Tensor>& temperatures_)
      : hidden(matrix("hidden", hidden_)),
        weight(matrix("weight", weight_)),
        dtype(hidden.scalar_type()),
        M(rows_.numel()) {
    require(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16, OP, ": hidden must be float32 or bfloat16, got ",
        torch::headeronly::toString(dtype));
    require(
        weight.scalar_type() == dtype && weight.size(1) == hidden.size(1), OP,
        ": weight must have the dtype and the columns of hidden");
    require(hidden.size(1) > 0, OP, ": hidden must have at least one column, got ", shape(hidden));
    const InstructionSet& set = instruction_set(OP);
    kernels = dtype == ScalarType::Float ? &set.logprobs_float32 : &set.logprobs_bfloat16;
    if (bias_) {
      read_bias(*bias_);
    }
    rows = vector_argument(OP, "rows", rows_, M, ScalarType::Long, hidden);
    targets = vector_argument(OP, "targets", targets_, M, ScalarType::Long, hidden);
    check_index("rows", rows, hidden.size(0));
    check_index("targets", targets, weight.size(0));
    const Tensor numbers = vector_argument(OP, "numbers", numbers_, 3, ScalarType::Double, numbers_);
    const double* number = numbers.const_data_ptr<double>();
    temperatures.assign(M, number[0]);
    if (temperatures_) {
      read_temperatures(*temperatures_);
    }
    problem = {
        weight.size(0),
        weight.size(1),
        rows_of(hidden),
        rows_of(weight),
        bias_ ? bias.data() : nullptr,
        static_cast<float>(number[2]),
        static_cast<float>(number[1])};
    plan.emplace(
        rows.const_data_ptr<int64_t>(), targets.const_data_ptr<int64_t>(), temperatures, problem.logit_scale,
        most_tokens(problem.V, problem.D));
  }

  static Tensor matrix(const char* name, const Tensor& tensor) {
    require(tensor.dim() == 2, OP, ": ", name, " must have two dimensions, got ", shape(tensor));
    return tensor.stride(1) == 1 || tensor.size(1) == 1 ? tensor : torch::stable::contiguous(tensor);
  }

  void read_bias(const Tensor& given) {
    const Tensor values =
        torch::stable::to(vector_argument(OP, "bias", given, weight.size(0), dtype, hidden), ScalarType::Float);
    bias.assign(values.const_data_ptr<float>(), values.const_data_ptr<float>() + values.numel());
  }

  void read_temperatures(const Tensor& given) {
    const Tensor values = vector_argument(OP, "temperatures", given, M, ScalarType::Double, hidden);
    temperatures.assign(values.const_data_ptr<double>(), values.const_data_ptr<double>() + M);
  }

  void check_index(const char* name, const Tensor& index, int64_t limit) const {
    const int64_t* values = index.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < M; ++i) {
      require(
          0 <= values[i] && values[i] < limit, OP, ": ", name, " must be in [0, ", limit, "), got ", values[i],
          " at index ", i);
    }
  }

  int64_t item_size() const {
    return dtype == ScalarType::Float ? 4 : 2;
  }

  int64_t strips() const {
    return (problem.V + STRIP - 1) / STRIP;
  }

  // f(strip, its entries, scratch) for each strip of the entries, which begin with one.
  template <class F>
  void for_strips(const Tokens& tokens, Entries entries, const F& f) const {
    in_parallel((entries.end - entries.begin + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
      const Buffer<float> memory = scratch(tokens);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = entries.begin + i * STRIP;
        f(i, Entries{first, std::min(entries.end, first + STRIP)}, memory.data());
      }
    });
  }

  // The rows of a strip.
  Exponentials part(const Exponentials& whole, int64_t strip) const {
    return {static_cast<char*>(whole.data) + strip * STRIP * whole.stride * item_size(), whole.stride};
  }

  // Vocabulary entries whose exponentials are made at once where they are not kept.
  int64_t chunk(const Tokens& tokens) const {
    return std::max<int64_t>(1, PIECE / (tokens.padded * item_size() * STRIP)) * STRIP;
  }

  Buffer<float> scratch(const Tokens& tokens) const {
    return Buffer<float>(kernels->scratch_size(problem, tokens.padded));
  }

  Buffer<char> packed(const Tokens& tokens) const {
    return Buffer<char>(kernels->packed_size(problem, tokens.padded));
  }

  void pack_hidden(const Tokens& tokens, void* packed) const {
    in_parallel(tokens.padded / kernels->panel, [&](int64_t begin, int64_t end) {
      kernels->pack_hidden(problem, tokens, begin * kernels->panel, end * kernels->panel, packed);
    });
  }

  void hidden_grad(const Tokens& tokens, const Exponentials& kept, Entries entries, bool add, float* grad) const {
    const int64_t width = round_up(problem.D, kernels->panel);
    // Threads share out the longer side: each packs what lies along the other.
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t shares = tokens.padded < width ? std::min(threads, width / 128) : 1;
    const int64_t column_tasks = std::max((width + HIDDEN_GRAD_COLUMNS - 1) / HIDDEN_GRAD_COLUMNS, shares);
    const int64_t columns = round_up((width + column_tasks - 1) / column_tasks, kernels->panel);
    const int64_t token_tasks = (threads + column_tasks - 1) / column_tasks;
    const int64_t rows = round_up((tokens.padded + token_tasks - 1) / token_tasks, BLOCK_ROWS);
    in_parallel(column_tasks * token_tasks, [&](int64_t begin, int64_t end) {
      const Buffer<float> memory = scratch(tokens);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task % column_tasks * columns;
        const int64_t row = task / column_tasks * rows;
        if (column < width && row < tokens.padded) {
          kernels->hidden_grad(
              problem, kept, entries, row, std::min(tokens.padded, row + rows), column,
              std::min(width, column + columns), add, grad, grad_stride(), memory.data());
        }
      }
    });
  }

  int64_t grad_stride() const {
    return round_up(problem.D, LANES);
  }
};

}  // namespace latro::linear_logprobs
