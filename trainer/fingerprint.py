"""Which function the weights were trained as: its code, its constants, and its loss on fixed tokens.

Weights are in a checkpoint; what is computed with them is not. So every checkpoint keeps what tells whether
"these weights under today's code" are what they were: a hash of the code, the constants of the model that was
built, and the loss of a few tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.sites.trace import unwrap
from osp_diag.trainer import model as model_package
from osp_diag.trainer import optimizers as optimizers_package
from osp_diag.trainer.model.attention import Attention
from osp_diag.trainer.model.rotary import Rotation
from osp_diag.trainer.optimizers.routes import folded
from osp_diag.trainer.parallel import reshard

__all__ = [
    "code_fingerprint",
    "function_constants",
    "function_record",
    "reference_loss",
    "reference_tokens",
]

REFERENCE_TOKENS = 1024
_PROBED = 8
"""Tokens of the passes in which constants are observed."""

Autocast = Callable[[], AbstractContextManager[Any]]


def code_fingerprint() -> str:
    """SHA-256 of the sources of model and optimizers and of torch's version, in 64 hexadecimal digits."""
    digest = hashlib.sha256(torch.__version__.encode())
    for package in (model_package, optimizers_package):
        for path in sorted(Path(next(iter(package.__path__))).glob("*.py")):
            digest.update(f"\n{package.__name__} {path.name}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def function_constants(model: nn.Module) -> dict[str, Any]:
    """What the function is made of beside its weights, read off the model that was built.

    ``rotary_base`` follows from the angles that reach the first block, and ``mask`` from which outputs change
    with a token, in passes of eight tokens; the rest from the modules. Names of modules are without their
    layer's number.

    Returns
    -------
    dict : ``rotary_base`` (θ to six digits; None of heads two channels wide), ``mask`` ("causal",
        "not causal", or None where logits are not finite), ``attention`` (kinds), ``norms`` (module → kind),
        ``norm_epsilon`` and ``norm_scale`` (module → value; the scale of norms without a gain)
    """
    inner = unwrap(model)
    assert isinstance(inner, model_package.Llama)
    device = next(inner.parameters()).device
    ids = torch.arange(_PROBED, device=device)[None] % inner.config.vocabulary_size
    rotations: list[Rotation] = []
    block = inner.blocks[0]
    hook = block.register_forward_pre_hook(lambda _, arguments: rotations.append(arguments[1]))
    try:
        logits = _logits(inner, ids)
    finally:
        hook.remove()
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % inner.config.vocabulary_size
    others = _logits(inner, changed)
    norms = {name: module for name, module in inner.named_modules() if hasattr(module, "epsilon")}
    without_gain = {name: norm for name, norm in norms.items() if not list(norm.parameters())}
    kinds = {type(module).__name__.removeprefix("FSDP") for module in norms.values()}
    return {
        "rotary_base": _rotary_base(rotations[0]),
        "mask": _mask(logits, others),
        "attention": sorted({module.kind for module in inner.modules() if isinstance(module, Attention)}),
        "norms": sorted(kinds),
        "norm_epsilon": _by_place({name: float(module.epsilon) for name, module in norms.items()}),
        "norm_scale": _by_place({name: float(norm.scale) for name, norm in without_gain.items()}),
    }


def reference_tokens(held_out: Int[Any, "sequence position"]) -> Int[Tensor, "sequence position"]:
    """The first held-out tokens, 1,024 at most: whole sequences, or the beginning of one."""
    ids = torch.as_tensor(held_out)
    return ids[: max(1, REFERENCE_TOKENS // ids.shape[1]), :REFERENCE_TOKENS].clone()


def reference_loss(
    model: nn.Module, ids: Int[Tensor, "sequence position"], autocast: Autocast = nullcontext
) -> float:
    """Mean −log p of each token after those before it in its sequence, in nats; in evaluation, eagerly.

    Every token's loss is float32, as in training, and their mean float64. Under FSDP a collective.

    Parameters
    ----------
    model : one of ours
    ids : from :func:`reference_tokens`
    autocast : makes the context in which the training runs the model
    """
    inner = unwrap(model)
    ids = ids.to(next(inner.parameters()).device)
    with autocast():
        logits = _logits(inner, ids)
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    return float(losses.double().mean())


def function_record(
    model: nn.Module, ids: Int[Tensor, "sequence position"], autocast: Autocast, *, code: str
) -> dict[str, Any]:
    """What a checkpoint keeps of the function.

    ``code`` is the :func:`code_fingerprint` of when the training began: what is edited later does not run.

    Returns
    -------
    dict : ``code``, ``torch`` (its version), ``constants``, ``reference_loss`` (None if it is not finite) and
        its tokens, ``reference_ids``
    """
    loss = reference_loss(model, ids, autocast)
    return {
        "code": code,
        "torch": torch.__version__,
        "constants": function_constants(model),
        "reference_loss": loss if math.isfinite(loss) else None,
        "reference_ids": ids.tolist(),
    }


@torch.no_grad()
def _logits(model: nn.Module, ids: Int[Tensor, "sequence position"]) -> Tensor:
    """Of a pass that leaves the model as it was."""
    try:
        with evaluation_mode(model), torch.compiler.set_stance("force_eager"):
            return model(ids).logits
    finally:
        reshard(model)


def _rotary_base(by: Rotation) -> float | None:
    """θ from the second position's angles, θ^(−2i/d); of them the smallest, i = d/2 − 1, says most."""
    cosine, sine = (part[0, 1].double() for part in by)
    half = len(cosine) // 2
    if half < 2:
        return None
    angle = float(torch.atan2(sine[half - 1], cosine[half - 1]))
    # angle = θ^(−(half − 1)/half)
    return float(f"{angle ** (-half / (half - 1)):.6g}") if angle > 0 else None


def _mask(logits: Tensor, others: Tensor) -> str | None:
    """Whether outputs before a token are the same when it changes."""
    if not bool((logits.isfinite() & others.isfinite()).all()):
        return None
    return "causal" if torch.equal(logits[:, :-1], others[:, :-1]) else "not causal"


def _by_place(values: dict[str, float]) -> dict[str, Any]:
    """Values by the module's name without its layer; a list where layers differ."""
    places: dict[str, list[float]] = {}
    for name, value in values.items():
        places.setdefault(folded(name), []).append(value)
    return {name: of[0] if len(set(of)) == 1 else of for name, of in places.items()}
