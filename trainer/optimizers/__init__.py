"""Which optimizer moves which parameter, Muon over many ranks, schedules, and evidence about all of them."""

from trainer.optimizers.build import Optimizers, build_optimizer
from trainer.optimizers.evidence import optimizer_evidence
from trainer.optimizers.muon import Muon
from trainer.optimizers.routing import Route, Routing, route
from trainer.optimizers.schedules import learning_rate_factor

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
