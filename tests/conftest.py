"""Makes the helper modules of this folder importable by all tests, and registers hypothesis' profiles.

`HYPOTHESIS_PROFILE=ci` runs five times as many examples. No profile has a deadline, so load fails no test.
"""

import os

import torch
from hypothesis import settings

pytest_plugins = ["job_fixtures", "tiny_fixtures"]

torch.set_num_threads(1)

settings.register_profile("default", max_examples=100, deadline=None)
settings.register_profile("ci", max_examples=500, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
