"""One hypothesis profile and one torch thread for every test.

The same examples in every run, so that a red build means a change in the code; ``HYPOTHESIS_PROFILE=explore`` searches with
new ones. Tests work on small tensors, where threads only wait for each other (measured 2026-11-21 on 2 busy cores: the
contract tests took 8 s with one torch thread and 70 s with two); tests of parallel work set the number themselves.
"""

import os

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "steady",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no reason to fail
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "steady"))

torch.set_num_threads(1)
