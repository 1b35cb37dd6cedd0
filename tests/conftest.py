"""What every test shares: the environment of its process. Fixtures stand beside the tests that use them."""

import atexit
import os
import shutil
import tempfile

from hypothesis import settings

# Before any test imports a numeric library: the test processes share few cores, and no test asks a model hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# What programs keep on a machine lies in a folder of its own, which goes with the process.
if "XDG_STATE_HOME" not in os.environ:
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="flashbulb-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
# Read where a kernel is defined. With 0, the kernels' tests run on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A time limit per example measures the machine, not the code; in CI the examples are the same in every run.
settings.register_profile("house", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("house")
