"""What the OSP paper calls a training run: ``Muon + SSNorm`` rather than three configuration keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from osp_diag.errors import StoreError
from osp_diag.runs.naming import model_name

if TYPE_CHECKING:
    from osp_diag.runs.following import FollowedRun
    from osp_diag.runs.run import Run

__all__ = ["PAPER_ORDER", "config_of", "recipe_labels", "recipe_of"]

PAPER_ORDER = ("Adam", "Muon-only", "Muon", "Muon + SSNorm", "Muon + EmbProj", "OSP")
"""The rows of Table 2 of Park et al. 2025 (Outlier-Safe Pre-Training)."""

_OPTIMIZERS = {
    "adamw": "Adam",
    "muon": "Muon",
    "muon_only": "Muon-only",
    "soap": "SOAP",
    "shampoo": "Shampoo",
}
_NORMS = {"rmsnorm": "", "ssnorm": "SSNorm", "srmsnorm": "SRMSNorm"}
_KEYS = ("optimizer.name", "model.norm", "model.embedding_projection")


def config_of(run: Run | FollowedRun) -> dict[str, Any]:
    """The configuration of the training that wrote a run, by dotted key.

    Raises
    ------
    StoreError : the run says nothing of a recipe: it was probed from a checkpoint, or in another loop
    """
    config = run.attrs.get("config")
    config = dict(config) if isinstance(config, Mapping) else {}
    absent = [key for key in _KEYS if key not in config]
    if absent:
        raise StoreError(
            f"the run of {model_name(run.attrs)} does not say its recipe (its "
            f"attribute `config` lacks {', '.join(absent)}); give one that `osp-diag train` wrote"
        )
    return config


def recipe_of(config: Mapping[str, Any]) -> str:
    """The paper's name of a configuration, or one made in the same way: ``SOAP + SSNorm, learned sink``.

    Parameters
    ----------
    config : by dotted key, with ``optimizer.name``, ``model.norm`` and ``model.embedding_projection``
    """
    norm, optimizer = str(config["model.norm"]), str(config["optimizer.name"])
    parts = [_OPTIMIZERS.get(optimizer, optimizer), _NORMS.get(norm, norm)]
    parts.append("EmbProj" if config["model.embedding_projection"] else "")
    name = " + ".join(part for part in parts if part)
    name = "OSP" if name == "Muon + SSNorm + EmbProj" else name
    attention = str(config.get("model.attention", "softmax"))
    return name if attention == "softmax" else f"{name}, {attention.replace('_', ' ')}"


def recipe_labels(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Run → its recipe, in the paper's order, others behind; with the seed, or the run, where some repeat."""
    labels = {key: recipe_of(config) for key, config in configs.items()}
    rank = {name: place for place, name in enumerate(PAPER_ORDER)}
    ordered = dict(sorted(labels.items(), key=lambda item: rank.get(item[1], len(rank))))
    seeded = {key: f"{label}, seed {configs[key].get('seed')}" for key, label in ordered.items()}
    ordered = _disambiguated(ordered, seeded)
    return _disambiguated(ordered, {key: f"{label}, {key}" for key, label in ordered.items()})


def _disambiguated(labels: Mapping[str, str], longer: Mapping[str, str]) -> dict[str, str]:
    """The longer labels for those that occur more than once."""
    count = Counter(labels.values())
    return {key: longer[key] if count[label] > 1 else label for key, label in labels.items()}
