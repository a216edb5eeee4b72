"""Keeping the loaders of other libraries quiet: what matters is said by osp_diag itself."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

__all__ = ["quietly"]


@contextmanager
def quietly(*, bars: bool = False) -> Iterator[None]:
    """Silence the warnings, log lines and progress bars of transformers and the hub; restore them after.

    ``bars`` leaves progress bars on where stderr is a terminal: for downloads and conversions, which
    take long enough to be watched.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from huggingface_hub import constants
        from huggingface_hub.utils import (
            are_progress_bars_disabled,
            disable_progress_bars,
            enable_progress_bars,
        )
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging as model_logging

        watched = bars and sys.stderr.isatty()
        verbosity, hub_verbosity = model_logging.get_verbosity(), hub_logging.get_verbosity()
        model_bars, hub_bars = model_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
        model_logging.set_verbosity(logging.CRITICAL)
        hub_logging.set_verbosity(logging.CRITICAL)
        if not watched:
            model_logging.disable_progress_bar()
            disable_progress_bars()
        try:
            # Some bars belong to nobody who could be asked to leave them out.
            with redirect_stderr(sys.stderr if watched else io.StringIO()):
                yield
        finally:
            model_logging.set_verbosity(verbosity)
            hub_logging.set_verbosity(hub_verbosity)
            # Where the environment forbids bars, asking for them draws a warning.
            if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
                if model_bars:
                    model_logging.enable_progress_bar()
                (enable_progress_bars if hub_bars else disable_progress_bars)()
