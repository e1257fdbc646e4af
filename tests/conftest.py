"""Makes the helper modules of this folder importable by all tests, and registers hypothesis' profiles.

`HYPOTHESIS_PROFILE=ci` runs five times as many examples. No profile has a deadline, so load fails no test.
"""

import os
from importlib.util import find_spec

import torch
from hypothesis import settings

# A GPU machine runs tests/gpu without Hydra.
pytest_plugins = ["job_fixtures", "tiny_fixtures"] if find_spec("hydra") else []

torch.set_num_threads(1)

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("ci", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
