"""Settings for all tests."""

import torch

torch.set_num_threads(1)  # the tests' networks and batches are too small to share among threads
