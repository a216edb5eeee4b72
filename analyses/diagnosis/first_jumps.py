"""What jumped first along the network, and how far every other place went."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.monitoring import RunMonitor
from osp_diag.monitoring.places import Place
from osp_diag.monitoring.rules.jump import Rule
from osp_diag.schema import is_site, network_order

__all__ = ["first_jumps"]


def first_jumps(monitor: RunMonitor) -> xr.Dataset | None:
    """By site and layer in network order: the first jump of any of its numbers, else their largest change.

    Parameters
    ----------
    monitor : that has looked at the run

    Returns
    -------
    Dataset (place) with ``site``, ``layer``, ``step`` of the first jump (NaN: none), ``size`` in units of the
    usual largest change between probes (NaN: too few probes to say what is usual) and the ``statistic`` that
    it is of; ``threshold`` is the size from which on a change is a jump. None where no change can be judged.
    """
    rule = next((rule for rule in monitor.monitor.rules if isinstance(rule, Rule)), None)
    if rule is None:
        return None
    best: dict[tuple[str, int], tuple[float, float, str]] = {}
    for place, step, size in zip(rule.record.places, rule.record.step, rule.record.size, strict=True):
        if _is_in_network(place, monitor) and np.isfinite(size):
            where = (str(place.site), int(place.layer or 0))
            # The earliest jump, of those the largest; a change that is no jump comes after all.
            rank = (step if np.isfinite(step) else np.inf, -float(size), place.statistic)
            best[where] = min(best.get(where, rank), rank)
    if not best:
        return None
    order = network_order(best)
    steps = [best[where][0] if np.isfinite(best[where][0]) else np.nan for where in order]
    return xr.Dataset(
        {
            "step": ("place", steps, {"units": "step", "definition": "of the first jump; NaN: none"}),
            "size": (
                "place",
                [-best[where][1] for where in order],
                {
                    "units": "1",
                    "definition": "|Δ ln| between two probes over the largest such change of that statistic "
                    "and site before; of the first jump, or the largest where there is none",
                    "threshold": rule.times_usual,
                },
            ),
            "statistic": ("place", [best[where][2] for where in order]),
        },
        coords={
            "site": ("place", [site for site, _ in order]),
            "layer": ("place", [layer for _, layer in order]),
        },
    )


def _is_in_network(place: Place, monitor: RunMonitor) -> bool:
    declared = tuple(monitor.run.attrs.get("sites") or ())
    return place.site is not None and place.layer is not None and is_site(place.site, declared)
