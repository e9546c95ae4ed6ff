"""Settings of every test."""

import torch
from hypothesis import HealthCheck, settings

# Tests fork ranks, which must not inherit a started thread pool.
torch.set_num_threads(1)

# Other jobs share the machine: a slow example is no failure.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")
