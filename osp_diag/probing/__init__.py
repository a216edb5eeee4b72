"""Probing: a checkpoint in one call (:func:`probe`), or a model inside anyone's loop (:class:`Probe`)."""

from osp_diag.probing.checkpoint import probe
from osp_diag.probing.labelling import relabel
from osp_diag.probing.schedule import dense_early
from osp_diag.probing.session import Probe

__all__ = ["Probe", "dense_early", "probe", "relabel"]
