"""Misrouted runs are refused, and runs that are no OSP are told so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from osp_diag.errors import TrainingError
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.optimizers.routes import Route

__all__ = ["check"]

_SHOWN = 4


def check(routes: Sequence[Route], config: TrainConfig) -> tuple[str, ...]:
    """Hold the routes against the recipe; return what is worth a warning.

    A recipe is OSP's (Park et al. 2025, https://arxiv.org/abs/2506.19697) when ``optimizer.name`` is
    ``muon``, ``model.norm`` ``ssnorm`` and ``model.embedding_projection`` on. It wants hidden matrices and
    projections under Muon, embedding and head under AdamW, and no gain per channel on the residual stream.

    Raises
    ------
    TrainingError : with the names of what contradicts the recipe, or of parameters that the model lacks or
        has against its configuration, or of vectors that SOAP or Shampoo cannot precondition
    """
    _check_model(routes, config)
    _check_second_order(routes)
    if _is_osp(config):
        _check_osp(routes)
    return tuple(_warnings(routes, config))


def _is_osp(config: TrainConfig) -> bool:
    model = config.model
    return config.optimizer.name == "muon" and model.norm == "ssnorm" and model.embedding_projection


def _check_model(routes: Sequence[Route], config: TrainConfig) -> None:
    """The model is the one that the configuration describes, as far as outliers depend on it."""
    has_projections = any(route.role == "embedding_projection" for route in routes)
    if config.model.embedding_projection and not has_projections:
        raise TrainingError(
            "model.embedding_projection is on, but the model has no trainable embedding_projection.weight; "
            "build it from this configuration"
        )
    if not config.model.embedding_projection and has_projections:
        names = (route.name for route in routes if route.role == "embedding_projection")
        raise TrainingError(
            f"model.embedding_projection is off, but the model has {_listed(names)}; build it from this "
            "configuration"
        )
    gains = _residual_gains(routes)
    if config.model.norm == "ssnorm" and gains:
        raise TrainingError(
            f"gains per channel are left in under model.norm=ssnorm: {_listed(gains)}; SSNorm has one scalar "
            "a norm. Build the model from this configuration, or say model.norm=rmsnorm"
        )


def _check_second_order(routes: Sequence[Route]) -> None:
    for name in ("soap", "shampoo"):
        wrong = [route.name for route in routes if route.optimizer == name and route.role == "vector"]
        if wrong:
            raise TrainingError(
                f"optimizer.route sends vectors to {name}, which preconditions matrices: {_listed(wrong)}; "
                "send them to adamw"
            )


def _check_osp(routes: Sequence[Route]) -> None:
    for role, optimizer, remedy in (
        (
            "embedding",
            "adamw",
            "OSP keeps them apart, under AdamW; for Muon on all say optimizer.name=muon_only",
        ),
        ("head", "adamw", "OSP keeps them apart, under AdamW; for Muon on all say optimizer.name=muon_only"),
        ("embedding_projection", "muon", "OSP trains the projections by Muon; remove the route"),
        ("hidden", "muon", "OSP trains hidden matrices by Muon; for Adam on all say optimizer.name=adamw"),
    ):
        misrouted = [route for route in routes if route.role == role and route.optimizer != optimizer]
        if misrouted:
            names = _listed(route.name for route in misrouted)
            raise TrainingError(
                f"misrouted: {names} under {misrouted[0].optimizer} in an OSP recipe (muon, ssnorm, "
                f"embedding_projection); {remedy}. The routes come from optimizer.route"
            )


def _warnings(routes: Sequence[Route], config: TrainConfig) -> Iterable[str]:
    model, optimizer = config.model, config.optimizer
    gains = _residual_gains(routes)
    if optimizer.name in ("muon", "soap", "shampoo"):
        if gains:
            yield (
                f"{len(gains)} norms have a gain per channel ({_listed(gains)}): an ablation, not OSP, which "
                "has model.norm=ssnorm"
            )
        if not model.embedding_projection:
            yield "no embedding projections: an ablation, not OSP, which has model.embedding_projection=true"
        if model.norm == "srmsnorm":
            yield "model.norm=srmsnorm has no gain: OSP's ssnorm has one scalar a norm, to stay stable late"
    if optimizer.name == "muon":
        if model.tie_embeddings:
            yield "model.tie_embeddings: one matrix under AdamW for embedding and head; OSP has two"
        if model.query_key_norm:
            heads = [route.name for route in routes if _module(route.name) in ("q_norm", "k_norm")]
            yield f"gains per channel in the norms of queries and keys ({_listed(heads)}), which OSP has not"
    if optimizer.name in ("soap", "shampoo"):
        yield f"{optimizer.name} stands in Muon's place: a comparison, not OSP"
    if optimizer.name == "adamw" and (model.embedding_projection or model.norm != "rmsnorm"):
        yield "AdamW moves all, with parts of OSP in the model: none of the paper's rows"
    for name, default in (("muon_only", "muon"), ("adamw", "adamw")):
        elsewhere = [route.name for route in routes if route.optimizer != default]
        if optimizer.name == name and elsewhere:
            yield f"optimizer.name={name}, but optimizer.route sends {_listed(elsewhere)} elsewhere"
    if optimizer.name == "muon" and not _is_osp(config):
        outer = [
            route.name
            for route in routes
            if route.role in ("embedding", "head") and route.optimizer != "adamw"
        ]
        if outer:
            yield f"{_listed(outer)} under {optimizer.name}, where the paper has AdamW"


def _residual_gains(routes: Iterable[Route]) -> list[str]:
    """Norms of the residual stream whose gain has a number for every channel."""
    names = []
    for route in routes:
        module = _module(route.name)
        on_residual = module.endswith("norm") and module not in ("q_norm", "k_norm")
        if route.role == "vector" and on_residual and max(route.shape, default=1) > 1:
            names.append(route.name)
    return names


def _module(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _listed(names: Iterable[str]) -> str:
    all_names = list(names)
    remainder = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
    return ", ".join(all_names[:_SHOWN]) + remainder
