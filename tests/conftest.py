"""Settings for all tests."""
import torch

# The tensors here are tiny: a second thread costs more than it brings, and on a busy machine the
# two wait for each other.
torch.set_num_threads(1)
