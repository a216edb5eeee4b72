"""Which optimizer moves which parameter: decided by name before the first step, shown, and checked."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.trainer.config import Destination, OptimizerConfig, OptimizerName, TrainConfig
from osp_diag.trainer.optimizers.checks import check
from osp_diag.trainer.optimizers.routes import Role, Route, Routing, folded

__all__ = ["named_parameters", "named_trainable_parameters", "role_of", "route"]

WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
"""What DDP, torch.compile and activation checkpointing put into names."""

HIDDEN: dict[OptimizerName, Destination] = {
    "adamw": "adamw",
    "muon": "muon",
    "muon_only": "muon",
    "soap": "soap",
    "shampoo": "shampoo",
}
"""Where hidden matrices and embedding projections go."""

OUTER: dict[OptimizerName, Destination] = {**dict.fromkeys(HIDDEN, "adamw"), "muon_only": "muon"}
"""Where embedding and head go; tied, they are one parameter, the embedding."""


def named_trainable_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that need a gradient by name, each once, without what wrappers add to names."""
    return {name: value for name, value in named_parameters(model).items() if value.requires_grad}


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, each once, without what wrappers add to names."""
    return {WRAPPERS.sub("", name): parameter for name, parameter in model.named_parameters()}


def role_of(name: str, parameter: Tensor) -> Role:
    """What a parameter is, by its dimensions and its module's name."""
    if parameter.ndim < 2:
        return "vector"
    module = name.removesuffix(".weight").rpartition(".")[2]
    roles: dict[str, Role] = {
        "embed_tokens": "embedding",
        "lm_head": "head",
        "embedding_projection": "embedding_projection",
        "unembedding_projection": "embedding_projection",
    }
    return roles.get(module, "hidden")


def route(model: nn.Module, config: TrainConfig) -> Routing:
    """Send every trainable parameter to an optimizer.

    =====================  ===========================================  ===============================
    ``optimizer.name``     matrices                                     vectors and scalars
    =====================  ===========================================  ===============================
    ``adamw``              AdamW                                        AdamW
    ``muon``               Muon, the projections included;              AdamW; under ``muon_form=osp``
                           embedding and head AdamW                     Muon's M / ‖M‖, as OSP has it
    ``muon_only``          Muon                                         Muon's M / ‖M‖
    ``soap``, ``shampoo``  as ``muon``, with that one in Muon's place   AdamW
    =====================  ===========================================  ===============================

    ``optimizer.route`` overrides this by pattern. AdamW beside another optimizer has
    ``optimizer.embedding_lr``; matrices alone decay.

    Raises
    ------
    UsageError : a pattern of ``optimizer.route`` matches no parameter
    TrainingError : the outcome is no longer what the recipe says
        (:func:`~osp_diag.trainer.optimizers.checks.check`)
    """
    parameters = named_parameters(model)
    _check_patterns(config.optimizer, list(parameters))
    routes = [
        _route(name, value, config.optimizer) for name, value in parameters.items() if value.requires_grad
    ]
    frozen = tuple(name for name, value in parameters.items() if not value.requires_grad)
    return Routing(tuple(routes), frozen, check(routes, config))


def _route(name: str, parameter: Tensor, config: OptimizerConfig) -> Route:
    role = role_of(name, parameter)
    optimizer = _destination(name, role, config)
    lr = config.lr
    if optimizer == "adamw" and config.name != "adamw" and config.embedding_lr is not None:
        lr = config.embedding_lr
    # Why gains do not decay: docs/decisions.md, Training.
    decay = 0.0 if role == "vector" else config.weight_decay
    return Route(name, tuple(parameter.shape), role, optimizer, lr, decay)


def _destination(name: str, role: Role, config: OptimizerConfig) -> Destination:
    for pattern, destination in config.route.items():
        if fnmatchcase(name, pattern):
            return destination
    if role != "vector":
        return (OUTER if role in ("embedding", "head") else HIDDEN)[config.name]
    under_muon = config.name == "muon_only" or (config.name == "muon" and config.muon_form == "osp")
    return "muon" if under_muon else "adamw"


def _check_patterns(config: OptimizerConfig, names: list[str]) -> None:
    for pattern in config.route:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"optimizer.route: no parameter is named like {pattern!r}; their names are such as "
                f"{', '.join(dict.fromkeys(folded(name) for name in names[:4]))}"
            )
