"""Its presence makes the helper modules beside it importable from every test folder."""

import torch

# Tests fork ranks, which must not inherit a started thread pool.
torch.set_num_threads(1)
