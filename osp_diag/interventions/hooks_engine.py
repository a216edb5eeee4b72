"""The engine of native hooks: any torch model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from osp_diag.interventions.applying import intervened
from osp_diag.interventions.intervention import Intervention
from osp_diag.sites.names import SiteMap

__all__ = ["HooksEngine"]


class HooksEngine:
    """Runs a model under interventions by hooks on its modules.

    Parameters
    ----------
    model, sites, delimiter_ids : as of :func:`osp_diag.interventions.intervened`
    """

    def __init__(self, model: nn.Module, sites: SiteMap, delimiter_ids: Sequence[int]) -> None:
        self.model, self.sites, self.delimiter_ids = model, sites, delimiter_ids

    @contextmanager
    def running(self, interventions: Sequence[Intervention]) -> Iterator[Callable[..., Any]]:
        """Within, the model is under the interventions; yields what to call in its place."""
        with intervened(self.model, self.sites, interventions, delimiter_ids=self.delimiter_ids):
            yield self.model

    def close(self) -> None:
        """Leave no trace: there is none."""
