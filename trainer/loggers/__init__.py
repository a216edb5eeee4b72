"""Dashboards that scalars are sent to beside the run: trackio, Weights & Biases, TensorBoard."""

from osp_diag.trainer.loggers.opening import LOGGERS, Logger, RichLogger, open_loggers

__all__ = ["LOGGERS", "Logger", "RichLogger", "open_loggers"]
