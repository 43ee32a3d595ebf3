// linear_logprobs for CPU tensors: checks, the plan of a call, threads, and what is kept or made again.
//
// Tokens go in blocks and the vocabulary in strips of fixed size, so that results do not depend on the number of
// threads. Beside what it returns, a call needs a constant amount of memory, PIECE four times and scratch of threads;
// and for bfloat16 tokens of several blocks, whose gradients of weight add up in float32, a float32 copy of that
// gradient.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <memory>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../check.h"
#include "../cpu/instruction_set.h"

namespace latro::linear_logprobs {
namespace {

constexpr const char* OP = "linear_logprobs";

constexpr int64_t PIECE = 12 << 20;  // bytes
constexpr int64_t STRIP = 192;       // vocabulary entries: two of the kernel's blocks
constexpr int64_t MOST_TOKENS = 2048;
constexpr int64_t LANES = 64;       // blocks of tokens are padded to this, a multiple of every panel and vector
constexpr int64_t BLOCK_ROWS = 12;  // of every register block a multiple
constexpr int SUMS = 3;

// Where the largest logit is this far from its shift, sums of exponentials over any vocabulary are finite in float32,
// and so is one over them.
constexpr float FARTHEST = 60;

int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

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

// Consecutive projected tokens, and where each scored token is among them.
struct Block {
  int64_t first;  // of all projected tokens
  std::vector<int64_t> rows;
  std::vector<float> scale;
  std::vector<float> inv_temperature;
  std::vector<Target> targets;

  Tokens tokens() const {
    const int64_t padded = scale.size();
    return {
        static_cast<int64_t>(rows.size()),   padded, rows.data(), scale.data(), inv_temperature.data(), targets.data(),
        static_cast<int64_t>(targets.size())};
  }
};

struct Place {
  int64_t token;   // in its block
  int64_t target;  // in its block
};

// Which logits to make: a hidden row that is scored several times at one temperature is projected once.
struct Plan {
  std::vector<Block> blocks;
  std::vector<std::vector<int64_t>> members;  // of each block, the scored tokens
  std::vector<Place> places;                  // [M]

  Plan(
      const int64_t* rows,
      const int64_t* targets,
      const std::vector<double>& temperatures,
      float logit_scale,
      int64_t most_tokens)
      : places(temperatures.size()) {
    const int64_t M = temperatures.size();
    std::vector<int64_t> order(M);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return std::make_pair(rows[a], temperatures[a]) < std::make_pair(rows[b], temperatures[b]);
    });
    int64_t count = 0;
    for (int64_t i = 0; i < M; ++i) {
      const int64_t m = order[i];
      const int64_t before = i ? order[i - 1] : -1;
      if (i == 0 || rows[m] != rows[before] || temperatures[m] != temperatures[before]) {
        if (count % most_tokens == 0) {
          blocks.push_back({count, {}, {}, {}, {}});
          members.emplace_back();
        }
        blocks.back().rows.push_back(rows[m]);
        blocks.back().scale.push_back(static_cast<float>(logit_scale / temperatures[m]));
        blocks.back().inv_temperature.push_back(static_cast<float>(1 / temperatures[m]));
        ++count;
      }
      places[m].token = blocks.back().rows.size() - 1;
      members.back().push_back(m);
    }
    for (size_t b = 0; b < blocks.size(); ++b) {
      place_targets(blocks[b], members[b], targets);
      const int64_t padded = round_up(blocks[b].rows.size(), LANES);
      blocks[b].scale.resize(padded, 1);
      blocks[b].inv_temperature.resize(padded, 1);
    }
  }

  void place_targets(Block& block, std::vector<int64_t> of_block, const int64_t* targets) {
    const auto key = [&](int64_t m) { return std::make_pair(targets[m], places[m].token); };
    std::sort(of_block.begin(), of_block.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
    for (size_t i = 0; i < of_block.size(); ++i) {
      const int64_t m = of_block[i];
      if (i == 0 || key(m) != key(of_block[i - 1])) {
        block.targets.push_back({static_cast<int32_t>(targets[m]), static_cast<int32_t>(places[m].token)});
      }
      places[m].target = block.targets.size() - 1;
    }
  }
};

Rows rows_of(const Tensor& tensor) {
  return {tensor.const_data_ptr(), tensor.stride(0)};
}

int64_t most_tokens(int64_t V, int64_t D) {
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

  Entries strip(int64_t s) const {
    return {s * STRIP, std::min(problem.V, (s + 1) * STRIP)};
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
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t column_tasks =
        std::max((width + HIDDEN_GRAD_COLUMNS - 1) / HIDDEN_GRAD_COLUMNS, std::min(threads, width / 128));
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
    if (std::any_of(found.most.begin(), found.most.end(), [](float most) { return std::abs(most) > FARTHEST; })) {
      for (int64_t t = 0; t < tokens.padded; ++t) {
        found.shift[t] += found.most[t];
      }
      make_logits(block, packed.data(), found);
    }
    return found;
  }

 private:
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
    in_parallel((entries.end - entries.begin + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
      const Buffer<float> memory = call_.scratch(tokens);
      for (int64_t i = begin; i < end; ++i) {
        float* of_strip = sums + (first + i) * SUMS * tokens.padded;
        const Sums to = {
            of_strip, of_strip + tokens.padded, of_strip + 2 * tokens.padded, found.target.data(), found.slope.data()};
        const Exponentials part = {
            static_cast<char*>(out.data) + i * STRIP * out.stride * call_.item_size(), out.stride};
        call_.kernels->exponentials(
            call_.problem, tokens, packed, found.shift.data(), call_.strip(first + i), &to,
            i * STRIP < kept ? &part : nullptr, memory.data());
      }
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
        found.weighted[t] += sums[2 * tokens.padded + t];
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

// logps and entropy [M]; state [3, M]: the shift, one over the sum, and the slope of the softcap at the target;
// exponentials [entries kept, M padded]; unit_grad [M padded, D padded], empty unless it is asked for.
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
  const int64_t kept = kept_entries(call, budget);
  const auto floats = [&](torch::headeronly::IntHeaderOnlyArrayRef size) {
    return torch::stable::new_empty(hidden, size, ScalarType::Float);
  };
  Tensor logps = floats({M});
  Tensor entropy = floats({M});
  Tensor state = floats({3, M});
  Tensor exponentials = torch::stable::new_empty(hidden, {kept, columns});
  // Rows behind the last are written with the last block.
  Tensor unit = floats({unit_grad ? columns + BLOCK_ROWS : 0, call.grad_stride()});
  const Forward pass(
      call, {exponentials.mutable_data_ptr(), columns}, kept,
      unit_grad ? static_cast<float*>(unit.mutable_data_ptr()) : nullptr);
  float* to_logps = static_cast<float*>(logps.mutable_data_ptr());
  float* to_entropy = static_cast<float*>(entropy.mutable_data_ptr());
  float* to_state = static_cast<float*>(state.mutable_data_ptr());
  for (size_t b = 0; b < call.plan->blocks.size(); ++b) {
    const Statistics found = pass.run(call.plan->blocks[b]);
    for (const int64_t m : call.plan->members[b]) {
      const Place place = call.plan->places[m];
      const double sum = found.sum[place.token];
      to_logps[m] = static_cast<float>(log_share(found.target[place.target], sum));
      to_entropy[m] = static_cast<float>(std::log(sum) - found.weighted[place.token] / sum);
      to_state[m] = found.shift[place.token];
      to_state[M + m] = static_cast<float>(1 / sum);
      to_state[2 * M + m] = found.slope[place.target];
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
      const float* logps,
      const float* state,
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
      shift[place.token] = state[m];
      token[place.token] = static_cast<float>(all * state[M + m] * scale);
      // C p - c without cancellation where p is almost 1.
      const double slope = (all - own) * std::exp(double{logps[m]}) + own * std::expm1(double{logps[m]});
      target[place.target] = static_cast<float>(slope * scale * state[2 * M + m]);
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

  template <class F>
  void for_strips(const Tokens& tokens, Entries entries, const F& f) const {
    in_parallel((entries.end - entries.begin + STRIP - 1) / STRIP, [&](int64_t begin, int64_t end) {
      const Buffer<float> memory = call_.scratch(tokens);
      for (int64_t i = begin; i < end; ++i) {
        f(i, Entries{entries.begin + i * STRIP, std::min(entries.end, entries.begin + (i + 1) * STRIP)}, memory.data());
      }
    });
  }

  Exponentials part(const Exponentials& whole, int64_t strip) const {
    return {static_cast<char*>(whole.data) + strip * STRIP * whole.stride * call_.item_size(), whole.stride};
  }

  void make_again(
      const Tokens& tokens,
      const void* packed,
      const Factors& factors,
      Entries entries,
      const Exponentials& out) const {
    for_strips(tokens, entries, [&](int64_t i, Entries strip, float* memory) {
      const Exponentials to = part(out, i);
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
    for_strips(tokens, entries, [&](int64_t i, Entries strip, float* memory) {
      call_.kernels->weight_grad(
          call_.problem, tokens, scaled, part(made, i), strip, weight_grad(strip, factors, first), memory);
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
      " must be contiguous, of the shape of its tensor, and ", torch::headeronly::toString(dtype), ", got ",
      shape(*grad), " and ", torch::headeronly::toString(found));
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
    const Tensor& logps_,
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
  const Tensor logps = vector_argument(OP, "logps", logps_, M, ScalarType::Float, hidden);
  const Tensor state = torch::stable::contiguous(state_);
  require(
      state.numel() == 3 * M && state.scalar_type() == ScalarType::Float, OP, ": state must be the forward's, [3, ", M,
      "]");
  const int64_t columns = round_up(M, LANES);
  require(
      exponentials.dim() == 2 && exponentials.size(1) == columns && exponentials.size(0) <= call.problem.V &&
          exponentials.is_contiguous() && exponentials.scalar_type() == call.dtype,
      OP, ": exponentials must be the forward's");
  const bool has_unit = unit_grad.size(0) > 0;
  require(!has_unit || unit_grad.size(0) == columns + BLOCK_ROWS, OP, ": unit_grad must be the forward's");

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
        blocks[b], call.plan->members[b], *call.plan, grad.const_data_ptr<float>(), logps.const_data_ptr<float>(),
        state.const_data_ptr<float>(), M);
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
