// tree_attention for CPU tensors: checks, allocation, the choice of an instruction set, and threads.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../cpu/instruction_set.h"

namespace latro::tree_attention {
namespace {

constexpr const char* OP = "tree_attention";

// [heads, T, E] with E contiguous.
Tensor rows_of(const char* name, const Tensor& tensor, int64_t T, int64_t E, ScalarType dtype) {
  require(
      tensor.dim() == 3 && tensor.size(1) == T && tensor.size(2) == E, OP, ": ", name, " must have shape [heads, ", T,
      ", ", E, "]");
  require(
      tensor.scalar_type() == dtype, OP, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
  return tensor.stride(2) == 1 ? tensor : torch::stable::contiguous(tensor);
}

Operand operand(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// Results are stored [T, heads, E].
Result result(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(1), tensor.stride(0)};
}

// What a call needs, kept alive while its pointers are used.
struct Call {
  std::vector<Tensor> kept;
  Problem problem{};
  std::vector<int64_t> first_tile_of_prompt;  // [prompts + 1]
  ScalarType dtype;

  Call(
      const Tensor& q,
      const Tensor& k,
      const Tensor& v,
      const Tensor& tiles,
      const Tensor& positions,
      const std::optional<Tensor>& sinks,
      double scale,
      std::optional<double> softcap,
      std::optional<int64_t> window)
      : dtype(q.scalar_type()) {
    require(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16, OP, ": q must be float32 or bfloat16, got ",
        torch::headeronly::toString(dtype));
    require(q.dim() == 3, OP, ": q must have shape [H, T, E]");
    problem.T = q.size(1);
    problem.H = static_cast<int>(q.size(0));
    problem.Hkv = static_cast<int>(k.size(0));
    problem.E = static_cast<int>(q.size(2));
    require(
        problem.Hkv > 0 && problem.H % problem.Hkv == 0, OP, ": the heads of k must divide the ", problem.H,
        " heads of q, got ", problem.Hkv);
    problem.scale = static_cast<float>(scale);
    problem.softcap = static_cast<float>(softcap.value_or(0));
    problem.window = static_cast<int>(std::min(window.value_or(0), problem.T));
    problem.q = operand(keep(rows_of("q", q, problem.T, problem.E, dtype)));
    problem.k = operand(keep(rows_of("k", k, problem.T, problem.E, dtype)));
    problem.v = operand(keep(rows_of("v", v, problem.T, problem.E, dtype)));
    require(v.size(0) == problem.Hkv, OP, ": v must have the heads of k");
    if (sinks) {
      problem.sinks =
          keep(vector_argument(OP, "sinks", *sinks, problem.H, ScalarType::Float, q)).const_data_ptr<float>();
    }
    require(
        tiles.dim() == 2 && tiles.size(1) == 2 && tiles.scalar_type() == ScalarType::Int, OP,
        ": tiles must be int32 [tiles, 2]");
    problem.tiles = keep(torch::stable::contiguous(tiles)).const_data_ptr<int32_t>();
    problem.positions =
        keep(vector_argument(OP, "positions", positions, problem.T, ScalarType::Long, q)).const_data_ptr<int64_t>();
    read_tiles(tiles.size(0));
  }

  const Tensor& keep(Tensor tensor) {
    kept.push_back(std::move(tensor));
    return kept.back();
  }

  void read_tiles(int64_t count) {
    int64_t row = 0;
    int64_t path = 0;  // tokens of the path that ends at `row`
    require(problem.T > 0, OP, ": q must have at least one token");
    for (int64_t n = 0; n < count; ++n) {
      const int64_t begin = problem.tiles[2 * n];
      const int64_t end = problem.tiles[2 * n + 1];
      require(
          begin == row && begin < end && end <= problem.T, OP, ": tiles must cover the rows in order, got [", begin,
          ", ", end, ") after row ", row);
      row = end;
      const int64_t depth = problem.positions[begin];
      require(
          depth >= 0 && depth <= path, OP, ": positions must be the depths of a tree, got ", depth, " at row ", begin);
      path = depth + end - begin;
      if (depth == 0) {
        first_tile_of_prompt.push_back(n);
      }
      problem.tile = std::max(problem.tile, static_cast<int>(end - begin));
      problem.longest_path = std::max(problem.longest_path, static_cast<int>(path));
    }
    require(
        row == problem.T && problem.positions[0] == 0, OP, ": tiles must cover all ", problem.T, " rows, got ", row);
    first_tile_of_prompt.push_back(count);
  }

  // Tasks are pairs of a key head and a prompt: no two write the same place, and sums have a fixed order.
  void run(bool is_backward) const {
    const InstructionSet& set = instruction_set(OP);
    const Kernels& kernels = dtype == ScalarType::Float ? set.attention_float32 : set.attention_bfloat16;
    const auto kernel = is_backward ? kernels.backward : kernels.forward;
    const int64_t prompts = static_cast<int64_t>(first_tile_of_prompt.size()) - 1;
    const int64_t floats = kernels.scratch_size(problem, is_backward);
    torch::stable::parallel_for(0, problem.Hkv * prompts, 1, [&](int64_t begin, int64_t end) {
      const std::unique_ptr<float, decltype(&std::free)> scratch(
          static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)), &std::free);
      require(scratch != nullptr, OP, ": cannot allocate ", floats * sizeof(float), " bytes of scratch");
      for (int64_t task = begin; task < end; ++task) {
        const int64_t prompt = task % prompts;
        kernel(problem, task / prompts, first_tile_of_prompt[prompt], first_tile_of_prompt[prompt + 1], scratch.get());
      }
    });
  }
};

void point_at_stats(Problem& problem, const Tensor& stats) {
  problem.row_max = static_cast<float*>(stats.mutable_data_ptr());
  problem.row_sum = problem.row_max + problem.H * problem.T;
}

std::tuple<Tensor, Tensor> forward(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& tiles,
    const Tensor& positions,
    const std::optional<Tensor>& sinks,
    double scale,
    std::optional<double> softcap,
    std::optional<int64_t> window) {
  Call call(q, k, v, tiles, positions, sinks, scale, softcap, window);
  Problem& problem = call.problem;
  Tensor out = torch::stable::new_empty(q, {problem.T, problem.H, problem.E});
  Tensor stats = torch::stable::new_empty(q, {2, problem.H, problem.T}, ScalarType::Float);
  problem.out = result(out);
  point_at_stats(problem, stats);
  call.run(false);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad_out,
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& out,
    const Tensor& stats,
    const Tensor& tiles,
    const Tensor& positions,
    const std::optional<Tensor>& sinks,
    double scale,
    std::optional<double> softcap,
    std::optional<int64_t> window) {
  Call call(q, k, v, tiles, positions, sinks, scale, softcap, window);
  Problem& problem = call.problem;
  const int64_t H = problem.H;
  require(
      out.dim() == 3 && out.size(0) == problem.T && out.size(1) == H && out.size(2) == problem.E &&
          out.stride(2) == 1 && out.scalar_type() == call.dtype,
      OP, ": out must be the forward's, [", problem.T, ", ", H, ", ", problem.E, "]");
  require(
      stats.numel() == 2 * H * problem.T && stats.is_contiguous() && stats.scalar_type() == ScalarType::Float, OP,
      ": stats must be the forward's, [2, ", H, ", ", problem.T, "]");
  problem.out = result(out);
  point_at_stats(problem, stats);
  problem.grad_out = operand(call.keep(rows_of("grad_out", grad_out, problem.T, problem.E, call.dtype)));
  Tensor grad_q = torch::stable::new_empty(q, {problem.T, H, problem.E});
  Tensor grad_k = torch::stable::new_empty(q, {problem.T, problem.Hkv, problem.E});
  Tensor grad_v = torch::stable::new_empty(q, {problem.T, problem.Hkv, problem.E});
  problem.grad_q = result(grad_q);
  problem.grad_k = result(grad_k);
  problem.grad_v = result(grad_v);
  Tensor grad_sinks = torch::stable::new_empty(q, {sinks ? H : 0}, ScalarType::Float);
  std::vector<float> of_token(sinks ? H * problem.T : 0);
  problem.grad_sinks = sinks ? of_token.data() : nullptr;
  call.run(true);
  for (int64_t h = 0; h < grad_sinks.numel(); ++h) {
    double total = 0;
    for (int64_t t = 0; t < problem.T; ++t) {
      total += of_token[h * problem.T + t];
    }
    static_cast<float*>(grad_sinks.mutable_data_ptr())[h] = static_cast<float>(total);
  }
  return {grad_q, grad_k, grad_v, grad_sinks};
}

}  // namespace
}  // namespace latro::tree_attention

STABLE_TORCH_LIBRARY_IMPL(latro_kernels, CPU, m) {
  m.impl("tree_attention", TORCH_BOX(&latro::tree_attention::forward));
  m.impl("tree_attention_backward", TORCH_BOX(&latro::tree_attention::backward));
}
