import torch

# The matrices are tiny: with more threads the model tests take four times as long.
torch.set_num_threads(1)
