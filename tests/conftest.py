"""Shared settings of the test suite."""

import torch
from hypothesis import settings

torch.set_num_threads(1)

# A busy machine must not fail a property by its clock.
settings.register_profile("atoll", deadline=None)
settings.load_profile("atoll")
