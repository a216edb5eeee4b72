"""The monitor: a run judged while it is made, or afterwards, by rules silent in healthy trainings."""

from osp_diag.monitoring.finding import SEVERITIES, Finding, Severity
from osp_diag.monitoring.following import RunMonitor, judge
from osp_diag.monitoring.forecast import Forecast, forecasts
from osp_diag.monitoring.monitor import Monitor
from osp_diag.monitoring.places import Block, Place, blocks_of

__all__ = [
    "SEVERITIES",
    "Block",
    "Finding",
    "Forecast",
    "Monitor",
    "Place",
    "RunMonitor",
    "Severity",
    "blocks_of",
    "forecasts",
    "judge",
]
