"""Which optimizer moves which parameter, Muon over many ranks, schedules, and evidence about all of them."""

from osp_diag.trainer.optimizers.build import Optimizers, build_optimizer
from osp_diag.trainer.optimizers.evidence import optimizer_evidence
from osp_diag.trainer.optimizers.muon import Muon
from osp_diag.trainer.optimizers.routes import Route, Routing
from osp_diag.trainer.optimizers.routing import route
from osp_diag.trainer.optimizers.schedules import learning_rate_factor

__all__ = [
    "Muon",
    "Optimizers",
    "Route",
    "Routing",
    "build_optimizer",
    "learning_rate_factor",
    "optimizer_evidence",
    "route",
]
