"""What every test runs under: no network, one thread a process, and the same drawn examples every time.

HYPOTHESIS_PROFILE=long draws new ones.
"""

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
settings.register_profile("same", derandomize=True, deadline=None)
if os.environ.get("HYPOTHESIS_PROFILE") != "long":
    settings.load_profile("same")
