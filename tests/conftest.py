"""Settings for all tests, and what several of them need."""
import torch

# The tensors here are tiny: a second thread costs more than it brings, and on a busy machine the
# two wait for each other.
torch.set_num_threads(1)


class StopAfter:
    """Like an Event that somebody sets during the given step."""

    def __init__(self, steps):
        self.left = steps

    def is_set(self):
        self.left -= 1
        return self.left <= 0
