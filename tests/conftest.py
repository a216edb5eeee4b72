"""What holds for every test: no network, no windows, and property tests that don't depend on the clock."""

from __future__ import annotations

import gc
import os
import signal

# Read when the libraries are imported, which is after this file.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Compiling takes longer than what is compiled: the same passes over the graph, none over the machine code.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as NumPy, one program after the other

from hypothesis import HealthCheck, settings

from tests.new_figures import new_figure

__all__ = ["new_figure"]

# A shell starts background jobs with Ctrl-C ignored, which the processes that tests send it to would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Deadlines fail on a busy machine, and first examples pay for compilation.
settings.register_profile(
    "default", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile(
    "ci", settings.get_profile("default"), max_examples=100, derandomize=True, print_blob=True
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_configure() -> None:
    gc.disable()  # importing makes half a million objects, all of which stay


def pytest_collection_finish() -> None:
    """Look for garbage in what tests make, and in larger lots: a tenth of their time was looking."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or else libraries say at the end of Python that something leaks
