"""Dashboards that scalars are sent to beside the run: trackio, Weights & Biases, TensorBoard."""

from trainer.loggers.opening import LOGGERS, Logger, open_loggers

__all__ = ["LOGGERS", "Logger", "open_loggers"]
