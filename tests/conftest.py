"""Its place makes the helper modules of this folder importable by every test below it."""

import torch

pytest_plugins = ["job_fixtures", "tiny_fixtures"]

torch.set_num_threads(1)
