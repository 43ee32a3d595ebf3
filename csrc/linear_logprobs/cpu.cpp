// linear_logprobs for CPU tensors: threads, and what is kept or made again.
//
// Tokens go in blocks and the vocabulary in strips of fixed size, so that results do not depend on the number of
// threads. Beside what it returns, a call needs a constant amount of memory, PIECE four times and scratch of threads;
// for bfloat16 tokens of several blocks, whose gradients of weight add up in float32, a float32 copy of that gradient;
// and a copy of hidden or weight where its rows are not contiguous.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "call.h"

namespace latro::linear_logprobs {
namespace {

// Where the largest logit is this far from its shift, sums of exponentials over any vocabulary are finite in float32,
// and so is one over them.
constexpr float FARTHEST = 60;

// What the forward pass finds of each token of a block.
struct Statistics {
  std::vector<float> shift, most;
  std::vector<double> sum, weighted;
  std::vector<float> target, slope;

  explicit Statistics(const Tokens& tokens)
      : shift(tokens.padded),
        most(tokens.padded),
        sum(tokens.padded),
        weighted(tokens.padded),
        target(tokens.target_count),
        slope(tokens.target_count) {
  }
};

class Forward {
 public:
  Forward(const Call& call, Exponentials kept, int64_t kept_entries, float* unit)
      : call_(call), kept_(kept), kept_entries_(kept_entries), unit_(unit) {
  }

  Statistics run(const Block& block) const {
    const Tokens tokens = block.tokens();
    const Buffer<char> packed = call_.packed(tokens);
    call_.pack_hidden(tokens, packed.data());
    Statistics found(tokens);
    in_parallel(tokens.padded / call_.kernels->panel, [&](int64_t begin, int64_t end) {
      const Buffer<float> memory = call_.scratch(tokens);
      const int panel = call_.kernels->panel;
      call_.kernels->guess(
          call_.problem, tokens, packed.data(), begin * panel, end * panel, found.shift.data(), memory.data());
    });
    make_logits(block, packed.data(), found);
    // From a guess as far off as a mask of -3e38, the first correction is itself rounded: to within FARTHEST of 0.
    for (int again = 0; again < 2 && correct_shifts(found); ++again) {
      make_logits(block, packed.data(), found);
    }
    return found;
  }

 private:
  // Whether any shift was too far from its token's largest logit.
  static bool correct_shifts(Statistics& found) {
    bool corrected = false;
    for (size_t t = 0; t < found.shift.size(); ++t) {
      if (std::isfinite(found.most[t]) && std::abs(found.most[t]) > FARTHEST) {
        found.shift[t] += found.most[t];
        corrected = true;
      }
    }
    return corrected;
  }

  void make_logits(const Block& block, const void* packed, Statistics& found) const {
    const Tokens tokens = block.tokens();
    const Buffer<float> sums(call_.strips() * SUMS * tokens.padded);
    if (unit_) {
      make_with_unit_grad(block, packed, found, sums.data());
    } else {
      make_strips(tokens, packed, found, sums.data(), {0, call_.problem.V}, kept_of(block), kept_entries_);
    }
    add_up(tokens, sums.data(), found);
  }

  Exponentials kept_of(const Block& block) const {
    return {static_cast<char*>(kept_.data) + block.first * call_.item_size(), kept_.stride};
  }

  // A frozen head: the gradient of hidden is a sum that needs no coefficient of its token before it is taken.
  void make_with_unit_grad(const Block& block, const void* packed, Statistics& found, float* sums) const {
    const Tokens tokens = block.tokens();
    const int64_t chunk = call_.chunk(tokens);
    const Buffer<char> made(chunk * tokens.padded * call_.item_size());
    const Exponentials out = {made.data(), tokens.padded};
    for (int64_t v = 0; v < call_.problem.V; v += chunk) {
      const Entries entries = {v, std::min(call_.problem.V, v + chunk)};
      make_strips(tokens, packed, found, sums, entries, out, chunk);
      call_.hidden_grad(tokens, out, entries, v > 0, unit_ + block.first * call_.grad_stride());
    }
  }

  // Exponentials of the first `kept` of the entries go to `out`.
  void make_strips(
      const Tokens& tokens,
      const void* packed,
      Statistics& found,
      float* sums,
      Entries entries,
      Exponentials out,
      int64_t kept) const {
    const int64_t first = entries.begin / STRIP;
    call_.for_strips(tokens, entries, [&](int64_t i, Entries strip, float* memory) {
      float* of_strip = sums + (first + i) * SUMS * tokens.padded;
      const Sums to = {
          of_strip, of_strip + tokens.padded, of_strip + 2 * tokens.padded, found.target.data(), found.slope.data()};
      const Exponentials part = call_.part(out, i);
      call_.kernels->exponentials(
          call_.problem, tokens, packed, found.shift.data(), strip, &to, i * STRIP < kept ? &part : nullptr, memory);
    });
  }

  void add_up(const Tokens& tokens, const float* sums, Statistics& found) const {
    std::fill(found.most.begin(), found.most.end(), -INFINITY);
    std::fill(found.sum.begin(), found.sum.end(), 0);
    std::fill(found.weighted.begin(), found.weighted.end(), 0);
    for (int64_t s = 0; s < call_.strips(); ++s, sums += SUMS * tokens.padded) {
      for (int64_t t = 0; t < tokens.padded; ++t) {
        found.most[t] = std::max(found.most[t], sums[t]);
        found.sum[t] += sums[tokens.padded + t];
        found.weighted[t] += sums[2 * tokens.padded + t] + double{sums[tokens.padded + t]} * sums[t];
      }
    }
    for (int64_t i = 0; i < tokens.target_count; ++i) {
      const int64_t t = tokens.targets[i].token;
      const double x = found.target[i];
      found.most[t] = std::max(found.most[t], found.target[i]);
      found.sum[t] += std::exp(x);
      found.weighted[t] += x > -INFINITY ? x * std::exp(x) : 0;
    }
  }

  const Call& call_;
  const Exponentials kept_;
  const int64_t kept_entries_;
  float* unit_;
};

// log(e^x / sum), also where the other terms of the sum are tiny beside e^x.
double log_share(double x, double sum) {
  const double own = std::exp(x);
  return own > sum / 2 ? -std::log1p((sum - own) / own) : x - std::log(sum);
}

int64_t kept_entries(const Call& call, int64_t budget) {
  const int64_t fit = budget / (std::max(LANES, round_up(call.M, LANES)) * call.item_size());
  return fit >= call.problem.V ? call.problem.V : fit / STRIP * STRIP;
}

// Rows of the state [STATE_ROWS, M], in float64.
enum State {
  SHIFT,
  ONE_OVER_SUM,
  SLOPE,  // of the softcap at the target
  LOGP,
  STATE_ROWS,
};

// logps and entropy [M]; the state; exponentials [entries kept, M padded]; unit_grad [M padded + BLOCK_ROWS, D padded],
// in whose place nothing is kept.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& hidden,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& rows,
    const Tensor& targets,
    const Tensor& numbers,
    const std::optional<Tensor>& temperatures,
    int64_t budget,
    bool unit_grad) {
  const Call call(hidden, weight, bias, rows, targets, numbers, temperatures);
  const int64_t M = call.M;
  const int64_t columns = round_up(M, LANES);
  const int64_t kept = unit_grad ? 0 : kept_entries(call, budget);
  const auto floats = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(hidden, size, ScalarType::Float);
  };
  Tensor logps = floats({M});
  Tensor entropy = floats({M});
  Tensor state = torch::stable::new_empty(hidden, {STATE_ROWS, M}, ScalarType::Double);
  Tensor exponentials = torch::stable::new_empty(hidden, {kept, columns});
  // Rows behind the last are written with the last block.
  Tensor unit = floats({unit_grad ? columns + BLOCK_ROWS : 0, call.grad_stride()});
  const Forward pass(
      call, {exponentials.mutable_data_ptr(), columns}, kept,
      unit_grad ? static_cast<float*>(unit.mutable_data_ptr()) : nullptr);
  float* to_logps = static_cast<float*>(logps.mutable_data_ptr());
  float* to_entropy = static_cast<float*>(entropy.mutable_data_ptr());
  double* to_state = static_cast<double*>(state.mutable_data_ptr());
  for (size_t b = 0; b < call.plan->blocks.size(); ++b) {
    const Statistics found = pass.run(call.plan->blocks[b]);
    for (const int64_t m : call.plan->members[b]) {
      const Place place = call.plan->places[m];
      const double sum = found.sum[place.token];
      const double logp = log_share(found.target[place.target], sum);
      to_logps[m] = static_cast<float>(logp);
      to_entropy[m] = static_cast<float>(std::log(sum) - found.weighted[place.token] / sum);
      to_state[SHIFT * M + m] = found.shift[place.token];
      to_state[ONE_OVER_SUM * M + m] = 1 / sum;
      to_state[SLOPE * M + m] = found.slope[place.target];
      to_state[LOGP * M + m] = logp;
    }
  }
  return {logps, entropy, state, exponentials, unit};
}

// What the gradients of a block are made with.
struct Factors {
  std::vector<float> shift;   // of padding, what makes its exponentials 0: others may overflow, and 0 times them is NaN
  std::vector<float> token;   // of each token's exponentials
  std::vector<float> target;  // of the weight row or the hidden row of each target

  // d loss / d logit is C p at an entry and C p - c at the target, where C is the sum of a token's coefficients.
  Factors(
      const Block& block,
      const std::vector<int64_t>& members,
      const Plan& plan,
      const float* grad,
      const double* state,
      int64_t M)
      : shift(block.scale.size(), INFINITY), token(block.scale.size()), target(block.targets.size()) {
    std::vector<double> of_token(block.scale.size());
    std::vector<double> of_target(block.targets.size());
    for (const int64_t m : members) {
      of_token[plan.places[m].token] -= grad[m];
      of_target[plan.places[m].target] -= grad[m];
    }
    for (const int64_t m : members) {
      const Place place = plan.places[m];
      const double all = of_token[place.token];
      const double own = of_target[place.target];
      const double scale = block.scale[place.token];
      shift[place.token] = static_cast<float>(state[SHIFT * M + m]);
      token[place.token] = static_cast<float>(all * state[ONE_OVER_SUM * M + m] * scale);
      // C p - c without cancellation where p is almost 1.
      const double logp = state[LOGP * M + m];
      const double slope = (all - own) * std::exp(logp) + own * std::expm1(logp);
      target[place.target] = static_cast<float>(slope * scale * state[SLOPE * M + m]);
    }
  }
};

struct Grads {
  Tensor* hidden;  // or null
  Tensor* weight;
  Tensor* bias;
  bool accumulate;
};

class Backward {
 public:
  Backward(const Call& call, Exponentials kept, int64_t kept_entries, const float* unit, const Grads& grads)
      : call_(call), kept_(kept), kept_entries_(kept_entries), unit_(unit), grads_(grads) {
  }

  void run(const Block& block, const Factors& factors, bool first) const {
    const Tokens tokens = block.tokens();
    if (unit_) {
      write_hidden_grad(block, factors, unit_ + block.first * call_.grad_stride());
      return;
    }
    const Buffer<float> sums(grads_.hidden ? (tokens.padded + BLOCK_ROWS) * call_.grad_stride() : 0);
    make_sums(block, factors, first, sums.data());
    if (grads_.hidden) {
      write_hidden_grad(block, factors, sums.data());
    }
  }

 private:
  void make_sums(const Block& block, const Factors& factors, bool first, float* sums) const {
    const Tokens tokens = block.tokens();
    const int64_t V = call_.problem.V;
    const Buffer<char> scaled = pack_scaled(tokens, factors);
    if (kept_entries_) {
      const Exponentials kept = {static_cast<char*>(kept_.data) + block.first * call_.item_size(), kept_.stride};
      add_entries(tokens, factors, scaled.data(), kept, {0, kept_entries_}, first, sums);
    }
    if (kept_entries_ == V) {
      return;
    }
    const Buffer<char> packed = call_.packed(tokens);
    call_.pack_hidden(tokens, packed.data());
    const int64_t chunk = call_.chunk(tokens);
    const Buffer<char> made(chunk * tokens.padded * call_.item_size());
    const Exponentials out = {made.data(), tokens.padded};
    for (int64_t v = kept_entries_; v < V; v += chunk) {
      const Entries entries = {v, std::min(V, v + chunk)};
      make_again(tokens, packed.data(), factors, entries, out);
      add_entries(tokens, factors, scaled.data(), out, entries, first, sums);
    }
  }

  Buffer<char> pack_scaled(const Tokens& tokens, const Factors& factors) const {
    Buffer<char> scaled = call_.packed(tokens);
    const int panel = call_.kernels->panel;
    in_parallel(grads_.weight ? (call_.problem.D + panel - 1) / panel : 0, [&](int64_t begin, int64_t end) {
      call_.kernels->pack_scaled(
          call_.problem, tokens, factors.token.data(), begin * panel, end * panel, scaled.data());
    });
    return scaled;
  }

  void make_again(
      const Tokens& tokens,
      const void* packed,
      const Factors& factors,
      Entries entries,
      const Exponentials& out) const {
    call_.for_strips(tokens, entries, [&](int64_t i, Entries strip, float* memory) {
      const Exponentials to = call_.part(out, i);
      call_.kernels->exponentials(call_.problem, tokens, packed, factors.shift.data(), strip, nullptr, &to, memory);
    });
  }

  void add_entries(
      const Tokens& tokens,
      const Factors& factors,
      const void* scaled,
      const Exponentials& made,
      Entries entries,
      bool first,
      float* sums) const {
    if (grads_.hidden) {
      call_.hidden_grad(tokens, made, entries, entries.begin > 0, sums);
    }
    if (!grads_.weight && !grads_.bias) {
      return;
    }
    call_.for_strips(tokens, entries, [&](int64_t i, Entries strip, float* memory) {
      call_.kernels->weight_grad(
          call_.problem, tokens, scaled, call_.part(made, i), strip, weight_grad(strip, factors, first), memory);
    });
  }

  WeightGrad weight_grad(Entries strip, const Factors& factors, bool first) const {
    WeightGrad grad{};
    if (grads_.weight) {
      grad.is_float = grads_.weight->scalar_type() == ScalarType::Float;
      const int64_t size = grad.is_float ? 4 : call_.item_size();
      grad.data = static_cast<char*>(grads_.weight->mutable_data_ptr()) + strip.begin * call_.problem.D * size;
    }
    grad.bias = grads_.bias ? static_cast<float*>(grads_.bias->mutable_data_ptr()) : nullptr;
    grad.accumulate = grads_.accumulate || !first;
    grad.factor = factors.token.data();
    grad.target_factor = factors.target.data();
    return grad;
  }

  // Each hidden row from the sums of its tokens, and the exact terms of their targets.
  void write_hidden_grad(const Block& block, const Factors& factors, const float* sums) const {
    const int64_t D = call_.problem.D;
    const std::vector<int64_t> by_token = targets_by_token(block);
    std::vector<int64_t> begins;  // of tokens that share a hidden row
    const int64_t count = block.rows.size();
    for (int64_t t = 0; t < count; ++t) {
      if (t == 0 || block.rows[t] != block.rows[t - 1]) {
        begins.push_back(t);
      }
    }
    begins.push_back(count);
    std::vector<int64_t> first_target(count + 1);
    for (const Target& target : block.targets) {
      ++first_target[target.token + 1];
    }
    std::partial_sum(first_target.begin(), first_target.end(), first_target.begin());
    const int64_t row_bytes = D * call_.item_size();
    in_parallel(begins.size() - 1, [&](int64_t begin, int64_t end) {
      std::vector<float> total(D);
      for (int64_t i = begin; i < end; ++i) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t t = begins[i]; t < begins[i + 1]; ++t) {
          for (int64_t d = 0; d < D; ++d) {
            total[d] += factors.token[t] * sums[t * call_.grad_stride() + d];
          }
          for (int64_t j = first_target[t]; j < first_target[t + 1]; ++j) {
            const int64_t target = by_token[j];
            call_.kernels->add_weight_row(
                call_.problem, block.targets[target].entry, factors.target[target], total.data());
          }
        }
        char* to = static_cast<char*>(grads_.hidden->mutable_data_ptr()) + block.rows[begins[i]] * row_bytes;
        call_.kernels->add_to_row(total.data(), D, to);
      }
    });
  }

  static std::vector<int64_t> targets_by_token(const Block& block) {
    std::vector<int64_t> order(block.targets.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return block.targets[a].token < block.targets[b].token;
    });
    return order;
  }

  const Call& call_;
  const Exponentials kept_;
  const int64_t kept_entries_;
  const float* unit_;
  const Grads& grads_;
};

// A gradient that is asked for, of the shape of what it is the gradient of.
Tensor* asked(
    const char* name,
    std::optional<Tensor>& grad,
    std::initializer_list<int64_t> size,
    ScalarType dtype,
    ScalarType or_dtype) {
  if (!grad) {
    return nullptr;
  }
  const ScalarType found = grad->scalar_type();
  bool fits = grad->dim() == static_cast<int64_t>(size.size()) && grad->is_contiguous();
  for (size_t i = 0; fits && i < size.size(); ++i) {
    fits = grad->size(i) == size.begin()[i];
  }
  require(
      fits && (found == dtype || found == or_dtype), OP, ": ", name,
      " must be contiguous, of the shape of its tensor, and ", torch::headeronly::toString(dtype), " or ",
      torch::headeronly::toString(or_dtype), ", got ", shape(*grad), " and ", torch::headeronly::toString(found));
  return &*grad;
}

// Adds to hidden_grad and bias_grad (float32), and writes or adds to weight_grad, which is float32 or weight's dtype.
void backward(
    const Tensor& grad_,
    const Tensor& hidden,
    const Tensor& weight,
    const std::optional<Tensor>& bias,
    const Tensor& rows,
    const Tensor& targets,
    const Tensor& numbers,
    const std::optional<Tensor>& temperatures,
    const Tensor& state_,
    const Tensor& exponentials,
    const Tensor& unit_grad,
    std::optional<Tensor> hidden_grad,
    std::optional<Tensor> weight_grad,
    std::optional<Tensor> bias_grad,
    bool accumulate) {
  const Call call(hidden, weight, bias, rows, targets, numbers, temperatures);
  const int64_t M = call.M;
  const Tensor grad = vector_argument(OP, "grad", grad_, M, ScalarType::Float, hidden);
  const Tensor state = torch::stable::contiguous(state_);
  require(
      state.numel() == STATE_ROWS * M && state.scalar_type() == ScalarType::Double, OP,
      ": state must be the forward's, [", int{STATE_ROWS}, ", ", M, "]");
  const int64_t columns = round_up(M, LANES);
  require(
      exponentials.dim() == 2 && exponentials.size(1) == columns && exponentials.size(0) <= call.problem.V &&
          exponentials.is_contiguous() && exponentials.scalar_type() == call.dtype,
      OP, ": exponentials must be the forward's");
  const bool has_unit = unit_grad.size(0) > 0;
  require(!has_unit || unit_grad.size(0) == columns + BLOCK_ROWS, OP, ": unit_grad must be the forward's");
  require(
      !has_unit || (hidden_grad && !weight_grad && !bias_grad), OP,
      ": unit_grad gives the gradient of hidden alone; make the forward pass without it");

  const Problem& problem = call.problem;
  Grads grads = {
      asked("hidden_grad", hidden_grad, {hidden.size(0), problem.D}, call.dtype, call.dtype),
      asked("weight_grad", weight_grad, {problem.V, problem.D}, call.dtype, ScalarType::Float),
      asked("bias_grad", bias_grad, {problem.V}, ScalarType::Float, ScalarType::Float), accumulate};
  // Several blocks add up in float32.
  const std::vector<Block>& blocks = call.plan->blocks;
  std::optional<Tensor> total;
  if (weight_grad && weight_grad->scalar_type() != ScalarType::Float) {
    require(!accumulate, OP, ": weight_grad must be float32 to be added to");
    if (blocks.size() > 1) {
      total = torch::stable::new_empty(weight, {problem.V, problem.D}, ScalarType::Float);
      grads.weight = &*total;
    }
  }
  if (weight_grad && blocks.empty() && !accumulate) {
    torch::stable::zero_(*weight_grad);
  }
  const Backward pass(
      call, {exponentials.mutable_data_ptr(), columns}, exponentials.size(0),
      has_unit ? static_cast<const float*>(unit_grad.const_data_ptr()) : nullptr, grads);
  for (size_t b = 0; b < blocks.size(); ++b) {
    const Factors factors(
        blocks[b], call.plan->members[b], *call.plan, grad.const_data_ptr<float>(), state.const_data_ptr<double>(), M);
    pass.run(blocks[b], factors, b == 0);
  }
  if (total) {
    torch::stable::copy_(*weight_grad, *total);
  }
}

}  // namespace
}  // namespace latro::linear_logprobs

STABLE_TORCH_LIBRARY_IMPL(latro_kernels, CPU, m) {
  m.impl("linear_logprobs", TORCH_BOX(&latro::linear_logprobs::forward));
  m.impl("linear_logprobs_backward", TORCH_BOX(&latro::linear_logprobs::backward));
}
