"""Shared settings of the test suite."""

import torch

torch.set_num_threads(1)
