// The kernels of the linear head as operators on CUDA tensors; linear_logprobs/strips.py is who calls them, through
// cuda.py, and knows all sizes to fit. Index tensors are not checked: that would read the device back.

#include <optional>

#include "../check.h"
#include "../cuda/device.h"
#include "../library.h"
#include "head_kernels.h"
#include "product_sm90.h"

namespace latro::head {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using Optional = std::optional<Tensor>;

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* read(const Optional& tensor) {
  return tensor ? read<T>(*tensor) : nullptr;
}

template <class T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <class T>
T* write(const Optional& tensor) {
  return tensor ? write<T>(*tensor) : nullptr;
}

template <class Call>
void for_dtype(const Tensor& tensor, const Call& call) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return call(float{});
    case ScalarType::BFloat16:
      return call(BFloat16{});
    case ScalarType::Half:
      return call(Half{});
    default:
      require(false, "linear_logprobs: impl='native' takes no ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

template <class Call>
void for_flag(bool flag, const Call& call) {
  flag ? call(std::true_type{}) : call(std::false_type{});
}

// Whether every row of the matrix, or the vector, can be read in runs of RUN numbers.
bool in_runs(const Tensor& tensor) {
  const bool rows_fit = tensor.dim() == 1 || (tensor.size(1) % RUN == 0 && tensor.stride(0) % RUN == 0);
  return rows_fit && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

dim3 grid(int64_t x, int64_t y = 1) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

int64_t blocks(int64_t size, int64_t block) {
  return (size + block - 1) / block;
}

template <class Kernel, class... Arguments>
void start(const Tensor& on, dim3 grid, Kernel kernel, Arguments... arguments) {
  const int32_t device = on.get_device_index();
  const DeviceGuard guard(device);
  launch(kernel, {.grid = grid, .block = dim3(THREADS), .stream = current_stream(device)}, arguments...);
}

void guess(
    const Tensor& hidden,
    const Tensor& weight,
    const Optional& bias,
    const Tensor& targets,
    const Tensor& state,
    double logit_scale,
    double softcap) {
  const int64_t M = hidden.size(0);
  for_dtype(hidden, [&]<class T>(T) {
    for_flag(in_runs(hidden) && in_runs(weight), [&](auto wide) {
      constexpr int WIDTH = wide ? RUN : 1;
      start(
          hidden, grid(blocks(M, WARPS)), guess_kernel<T, WIDTH>, read<T>(hidden), read<T>(weight), weight.stride(0),
          read<T>(bias), read<int64_t>(targets), write<float>(state), M, hidden.size(1),
          static_cast<float>(logit_scale), static_cast<float>(softcap));
    });
  });
}

template <class T>
Finish<T> finish_of(
    int64_t columns,
    const Optional& bias,
    const Tensor& targets,
    const Tensor& state,
    const Optional& exponentials,
    const Optional& partials,
    int64_t first_tile,
    int64_t first_v,
    double logit_scale,
    double softcap) {
  return {
      .M = state.size(1),
      .V = columns,
      .first_v = first_v,
      .logit_scale = static_cast<float>(logit_scale),
      .softcap = static_cast<float>(softcap),
      .targets = read<int64_t>(targets),
      .bias = read<T>(bias),
      .state = write<float>(state),
      .exponentials = write<T>(exponentials),
      .stride_e = exponentials ? exponentials->stride(0) : 0,
      .partials = write<float>(partials),
      .tiles = partials ? partials->size(1) : 0,
      .first_tile = first_tile,
  };
}

void epilogue(
    const Tensor& products,
    const Tensor& like,
    const Optional& bias,
    const Tensor& targets,
    const Tensor& state,
    const Optional& exponentials,
    const Optional& partials,
    int64_t first_tile,
    int64_t first_v,
    double logit_scale,
    double softcap) {
  const int64_t V = products.size(1);
  for_dtype(like, [&]<class T>(T) {
    const Finish<T> out =
        finish_of<T>(V, bias, targets, state, exponentials, partials, first_tile, first_v, logit_scale, softcap);
    for_flag(softcap > 0, [&](auto has_softcap) {
      for_flag(partials.has_value(), [&](auto statistics) {
        start(
            products, grid(blocks(out.M, WARPS), blocks(V, TILE)), epilogue_kernel<T, has_softcap, statistics>,
            read<float>(products), products.stride(0), out);
      });
    });
  });
}

void product_and_epilogue(
    const Tensor& hidden,
    const Tensor& weight,
    const Optional& bias,
    const Tensor& targets,
    const Tensor& state,
    const Optional& exponentials,
    const Optional& partials,
    int64_t first_tile,
    int64_t first_v,
    double logit_scale,
    double softcap) {
  for_dtype(hidden, [&]<class T>(T) {
    if constexpr (!std::is_same_v<T, float>) {
      const int32_t device = hidden.get_device_index();
      const DeviceGuard guard(device);
      launch_product_sm90<T>(
          {read<T>(hidden), hidden.stride(0), read<T>(weight), weight.stride(0), hidden.size(1)},
          finish_of<T>(
              weight.size(0), bias, targets, state, exponentials, partials, first_tile, first_v, logit_scale, softcap),
          0, current_stream(device));
    } else {
      require(false, "linear_logprobs: the fused product takes bfloat16 and float16");
    }
  });
}

void combine(const Tensor& partials, const Tensor& state, const Tensor& logps, const Tensor& entropy, bool headroom) {
  const int64_t M = logps.size(0);
  start(
      state, grid(blocks(M, COMBINED)), combine_kernel, read<float>(partials), partials.size(1), write<float>(state),
      write<float>(logps), write<float>(entropy), M, headroom);
}

void settle(
    const Tensor& partials,
    int64_t first_tile,
    int64_t tiles,
    int64_t width,
    const Tensor& state,
    const Tensor& exponentials,
    const Optional& unit) {
  const int64_t M = state.size(1);
  for_dtype(exponentials, [&]<class T>(T) {
    start(
        state, grid(blocks(M, COMBINED)), settle_kernel<T>, read<float>(partials), first_tile, first_tile + tiles,
        width, write<float>(state), write<T>(exponentials), exponentials.stride(0), exponentials.size(1),
        write<float>(unit), M, unit ? unit->size(1) : 0);
  });
}

void clear_targets(
    const Tensor& begins,
    const Tensor& ends,
    const Tensor& targets,
    const Tensor& state,
    int64_t first_v,
    const Tensor& exponentials) {
  const int64_t M = exponentials.size(0);
  for_dtype(exponentials, [&]<class T>(T) {
    start(
        exponentials, grid(blocks(M, THREADS)), clear_targets_kernel<T>, read<int64_t>(begins), read<int64_t>(ends),
        read<int64_t>(targets), read<float>(state), first_v, write<T>(exponentials), exponentials.stride(0), M,
        exponentials.size(1));
  });
}

void couple_targets(
    const Tensor& coefficients,
    const Tensor& begins,
    const Tensor& ends,
    const Tensor& targets,
    const Tensor& state,
    const Tensor& out) {
  const int64_t M = out.size(0);
  start(
      out, grid(blocks(M, THREADS)), couple_targets_kernel, read<float>(coefficients), read<int64_t>(begins),
      read<int64_t>(ends), read<int64_t>(targets), read<float>(state), write<float>(out), M);
}

// T is the dtype of weight, or of values where there is none.
void add_rows(
    const Tensor& values,
    const Tensor& coefficients,
    const Tensor& order,
    const Tensor& rows,
    const Tensor& ends,
    const Optional& weight,
    const Tensor& targets,
    const Optional& of_targets,
    const Tensor& out) {
  const int64_t D = values.size(1);
  const bool all_in_runs = in_runs(values) && in_runs(out) && (!weight || in_runs(*weight));
  for_flag(all_in_runs, [&](auto wide) {
    constexpr int WIDTH = wide ? RUN : 1;
    const auto run = [&]<class Value, class T, class Out>(Value, T, Out) {
      start(
          values, grid(rows.size(0), blocks(D, THREADS * WIDTH)), add_rows_kernel<Value, T, Out, WIDTH>,
          read<Value>(values), read<float>(coefficients), read<int64_t>(order), read<int64_t>(rows),
          read<int64_t>(ends), read<T>(weight), weight ? weight->stride(0) : 0, read<int64_t>(targets),
          read<float>(of_targets), write<Out>(out), D);
    };
    for_dtype(weight ? *weight : values, [&]<class T>(T) {
      for_dtype(out, [&]<class Out>(Out) {
        if constexpr (std::is_same_v<Out, float> || std::is_same_v<Out, T>) {
          values.scalar_type() == ScalarType::Float ? run(float{}, T{}, Out{}) : run(T{}, T{}, Out{});
        }
      });
    });
  });
}

void add_bias_grad(const Tensor& exponentials, const Tensor& coefficients, const Tensor& out) {
  const int64_t M = exponentials.size(0);
  const int64_t V = exponentials.size(1);
  for_dtype(exponentials, [&]<class T>(T) {
    start(
        exponentials, grid(blocks(V, WARP * RUN)), add_bias_grad_kernel<T>, read<T>(exponentials),
        exponentials.stride(0), read<float>(coefficients), write<float>(out), M, V);
  });
}

}  // namespace
}  // namespace latro::head

STABLE_TORCH_LIBRARY_IMPL(LATRO_NAMESPACE, LATRO_CUDA_KEY, m) {
  m.impl("head_guess", TORCH_BOX(&latro::head::guess));
  m.impl("head_epilogue", TORCH_BOX(&latro::head::epilogue));
  m.impl("head_product_and_epilogue", TORCH_BOX(&latro::head::product_and_epilogue));
  m.impl("head_combine", TORCH_BOX(&latro::head::combine));
  m.impl("head_settle", TORCH_BOX(&latro::head::settle));
  m.impl("head_clear_targets", TORCH_BOX(&latro::head::clear_targets));
  m.impl("head_couple_targets", TORCH_BOX(&latro::head::couple_targets));
  m.impl("head_add_rows", TORCH_BOX(&latro::head::add_rows));
  m.impl("head_add_bias_grad", TORCH_BOX(&latro::head::add_bias_grad));
}
