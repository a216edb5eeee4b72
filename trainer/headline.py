"""The few numbers of a probed step that a dashboard shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.probing.session import Probe
from osp_diag.runs.headline import headline_of
from osp_diag.schema import KURTOSIS, SINK_EPSILON, SINK_POSITION
from osp_diag.trainer.loggers import Logger, RichLogger
from osp_diag.trainer.monitoring import TrainingMonitor

__all__ = ["PREFIX", "HeadlineLog", "channel_profiles", "headline"]

PREFIX = "osp_diag/"

_LARGEST_OF_LAYERS = (
    (f"largest_{KURTOSIS}", "residual_post", KURTOSIS),
    ("largest_max_median_ratio", "residual_post", "max_median_ratio"),
    ("largest_down_projection_input", "mlp_hidden", "absolute_maximum"),
)
"""Name, site and statistic, of which the largest over layers is logged."""


def headline(groups: Mapping[str, xr.Dataset], absent: Mapping[str, str] | None = None) -> dict[str, float]:
    """What to watch while a model trains: one number each, over all tokens; those not measured are left out.

    * ``osp_diag/osp_excess_kurtosis``: the mean over the hidden states that the OSP script measures;
      ``largest_osp_excess_kurtosis``: of the block's output that has most
    * ``largest_max_median_ratio``: of the blocks' outputs
    * ``largest_activation``: max |x| in the residual stream; ``largest_down_projection_input``: at the
      input of the feed-forward's last matrix
    * ``sink_rate``: share of heads and sequences whose first token gets more than 0.3 of the attention;
      ``first_token_attention``: how much it gets, on average over heads

    Parameters
    ----------
    groups : site → statistics of one step, without the dimension ``step``: :attr:`osp_diag.Probe.latest`
    absent : sites that the model was found not to have: :attr:`osp_diag.Probe.absent`
    """
    residual = headline_of(groups, absent)
    numbers: dict[str, float | None] = {
        KURTOSIS: residual.get(KURTOSIS),
        "largest_activation": residual.get("absolute_maximum"),
    }
    for name, site, statistic in _LARGEST_OF_LAYERS:
        numbers[name] = _reduced(_values(groups, site, statistic), np.max)
    numbers["sink_rate"] = _reduced(_sink_rate(groups), np.mean)
    numbers["first_token_attention"] = _reduced(
        _values(groups, "attention", "first_token_attention"), np.mean
    )
    return {PREFIX + name: value for name, value in numbers.items() if value is not None}


def channel_profiles(groups: Mapping[str, xr.Dataset]) -> dict[str, Float[np.ndarray, " channel"]]:
    """log10 of the RMS of every channel after each block, over all tokens, by name; see :func:`headline`.

    As ``osp_diag/log10_channel_rms/layer 3``. Logarithms, since beside one outlier channel all others would
    share a bin; a channel that is 0 has none and is left out.
    """
    rms = _values(groups, "residual_post", "channel_rms")
    if rms is None:
        return {}
    profiles = {}
    for layer, row in zip(rms["layer"].values, rms.transpose("layer", "channel").values, strict=True):
        positive = row[np.isfinite(row) & (row > 0)]
        if positive.size:
            profiles[f"{PREFIX}log10_channel_rms/layer {layer}"] = np.log10(positive)
    return profiles


def _values(groups: Mapping[str, xr.Dataset], site: str, statistic: str) -> xr.DataArray | None:
    if statistic not in groups.get(site, ()):
        return None
    values = groups[site][statistic]
    return values.sel(stratum="all") if "stratum" in values.dims else values


def _sink_rate(groups: Mapping[str, xr.Dataset]) -> xr.DataArray | None:
    rates = _values(groups, "attention", "sink_rate")
    if rates is None:
        return None
    is_epsilon = np.isclose(rates["epsilon"], SINK_EPSILON)
    return rates.isel(epsilon=is_epsilon, sink_position=rates["sink_position"] == SINK_POSITION)


def _reduced(values: xr.DataArray | None, reduction: object) -> float | None:
    """``reduction`` over all layers and heads that have a number."""
    if values is None:
        return None
    finite = values.values[~np.isnan(values.values)]
    return float(reduction(finite)) if finite.size else None  # type: ignore[operator]


class HeadlineLog:
    """Sends a logger the headline of each probed step, without waiting for a step that is deferred.

    Parameters
    ----------
    probe : which has measured the steps
    logger : where to, or None
    monitor : judges each probed step at the same moment, or None
    """

    def __init__(self, probe: Probe, logger: Logger | None, monitor: TrainingMonitor | None = None) -> None:
        self._probe, self._logger, self.monitor = probe, logger, monitor
        self._pending: tuple[int, dict[str, float]] | None = None

    def after_probe(self, step: int, values: Mapping[str, float]) -> None:
        """The probe has measured ``step``; ``values`` go beside its headline."""
        self._pending = (step, dict(values))
        if not self._probe.deferred:
            self.write()

    def write(self) -> None:
        """Send what is pending: before the next probe, and before anything of a later step."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        if self.monitor is not None:
            self.monitor.scalars(step, values)
            self.monitor.probe(step, self._probe.latest, tuple(self._probe.attributes["sites"]))
        if self._logger is not None:
            latest = self._probe.latest
            self._logger.log(step, values | headline(latest, self._probe.absent))
            if isinstance(self._logger, RichLogger) and (profiles := channel_profiles(latest)):
                self._logger.histograms(step, profiles)
