// Where operators are registered, and for which tensors the CUDA kernels are: tests/emulator.py builds both otherwise.
#pragma once

#include <torch/csrc/stable/library.h>

#ifndef LATRO_NAMESPACE
#define LATRO_NAMESPACE latro_kernels
#define LATRO_CUDA_KEY CUDA
#endif
