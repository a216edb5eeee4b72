"""What the model itself says: its states and its attention weights, from a dense pass in float64.

Weights (batch, head, query, key) are those that the model returns under eager attention; where it returns
none, the outcomes of the softmaxes over T keys that it computes. States are its own ``hidden_states``; where
it returns none, or others, what leaves its blocks. Nothing of osp_diag takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = [
    "Reference",
    "attention_statistics",
    "first_tensor",
    "make_eager",
    "reference_of",
    "state_statistics",
]

EPSILONS = (0.1, 0.2, 0.3, 0.5, 0.8)
SINK_POSITIONS = 4
MARGIN = 1e-5
"""An α this close to a threshold may lie on either side of it."""


@dataclass
class Reference:
    """A dense pass of a model.

    Attributes:
        weights: of each attention layer, (batch, head, query, key).
        states: the state that enters the first block, then what leaves each, (batch, token, channel).
        last_is_normed: whether the last state is the one after the final norm, or may be.
        output: the first tensor that the model returns.
        notes: how the reference differs from what was asked for.
    """

    weights: list[np.ndarray] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)
    last_is_normed: bool = True
    output: Tensor | None = None
    notes: list[str] = field(default_factory=list)


class _Softmaxes(TorchFunctionMode):
    """Keeps the outcome of every softmax with four axes.

    A learned sink may also be a factor for each query, σ(log-sum-exp − sink), taken before the softmax; the
    weights that such a model returns are without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outcomes: list[Tensor] = []
        self.have_factors = False
        self._factor: Tensor | None = None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "sigmoid" and isinstance(result, Tensor):
            self._factor = result
        elif name == "softmax" and isinstance(result, Tensor) and result.ndim == 4:
            weights = result.detach().double()
            if self._factor is not None and self._factor.shape == weights.shape[:-1]:
                weights, self.have_factors = weights * self._factor[..., None], True
            self._factor = None
            self.outcomes.append(weights)
        return result


def reference_of(
    model: nn.Module, batch: Mapping[str, Any], blocks: tuple[str, ...], stack: str = ""
) -> Reference:
    """Run a copy of the model densely.

    Parameters
    ----------
    blocks : paths of the blocks, for models that do not return their states; one may run several times
    stack : "encoder" or "decoder", of a model that has both
    """
    reference = Reference()
    double = copy.deepcopy(model).double()
    try:
        output, softmaxes, left = _dense_pass(double, _cast(batch, torch.float64), blocks)
    except RuntimeError:  # of dtypes that do not fit, or a number that is too large for one
        reference.notes.append("reference in float32: the model cannot run in float64")
        output, softmaxes, left = _dense_pass(copy.deepcopy(model), batch, blocks)
    else:
        if left and bool(left[-1].isnan().all()):
            reference.notes.append("reference in float32: in float64 the model gives NaN")
            output, softmaxes, left = _dense_pass(copy.deepcopy(model), batch, blocks)
    reference.output = first_tensor(output)
    weights, states = (_of_stack(output, kind, stack) for kind in ("attentions", "hidden_states"))
    # Some streams are (token, batch, channel).
    size = len(next(iter(batch.values())))
    # Blocks that do not run themselves show nothing, and streams may stand one behind the other.
    left = left or list(states or ())
    if _are_first_of_several(states, left):
        left = [state[:, : states[0].shape[1]] for state in left]
    tokens = left[0].shape[1 if left[0].shape[0] == size else 0]
    if _are_dense(weights, tokens) and not softmaxes.have_factors:
        reference.weights = [w.double().numpy() for w in weights if w is not None]
    else:
        square = [s for s in softmaxes.outcomes if s.shape[-2] == tokens and 0 <= s.shape[-1] - tokens <= 1]
        reference.weights = [s[..., :tokens].numpy() for s in square]
        if square:
            reference.notes.append("reference weights from the model's own softmax")
    if _are_states(states, left):
        reference.states = [s.double().numpy() for s in states]
    elif all(s.ndim == 3 for s in left):
        reference.states = [s.double().numpy() for s in left]
        reference.last_is_normed = False
    else:
        reference.notes.append("states not compared: they are several streams")
    return reference


def _dense_pass(
    model: nn.Module, batch: Mapping[str, Any], blocks: tuple[str, ...]
) -> tuple[Any, _Softmaxes, list[Tensor]]:
    states: list[Tensor] = []  # copies: some blocks add in place

    def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not states:
            states.append(first_tensor([args, kwargs]).detach().clone())  # type: ignore[union-attr]

    def leaves(module: nn.Module, args: Any, output: Any) -> None:
        states.append(first_tensor(output).detach().clone())  # type: ignore[union-attr]

    arguments = dict(batch)
    if hasattr(model, "dense"):
        model.dense()
    if hasattr(model, "config"):
        make_eager(model)
        arguments |= {"output_attentions": True, "output_hidden_states": True}
    with ExitStack() as stack, torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for index, path in enumerate(dict.fromkeys(blocks)):
            module = model.get_submodule(path)
            if not index:
                handle = module.register_forward_pre_hook(enters, with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(leaves).remove)
        softmaxes = stack.enter_context(_Softmaxes())
        try:
            output = model(**arguments)
        except TypeError as error:
            if "output_" not in str(error):
                raise
            states.clear()
            softmaxes.outcomes.clear()
            output = model(**batch)
    return output, softmaxes, states


def make_eager(model: nn.Module) -> bool:
    """Have a model of transformers compute its weights, in place; False where it did before, or is another's.

    Every part's own configuration is changed: T5's stacks have copies, which ``set_attn_implementation`` does
    not reach.
    """
    changed = False
    for module in model.modules():
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation is not None and implementation != "eager":
            module.config._attn_implementation = "eager"  # type: ignore[union-attr]
            changed = True
    return changed


def _of_stack(output: Any, kind: str, stack: str) -> Any:
    names = [f"{stack}_{kind}", kind] if stack else [kind]
    for name in names:
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return None


def _are_states(states: Any, left: list[Tensor]) -> bool:
    """Whether they are one for each block, and before them what enters the first (Falcon Mamba's are not)."""
    return (
        isinstance(states, (list, tuple))
        and len(states) == len(left)
        and all(s.ndim == 3 and s.shape == left[0].shape for s in states)
        and torch.equal(states[0], left[0])
    )


def _are_first_of_several(states: Any, left: list[Tensor]) -> bool:
    """Whether the model returns the first of several streams that stand one behind the other in its rows."""
    if not isinstance(states, (list, tuple)) or not states or states[0].ndim != 3 or left[0].ndim != 3:
        return False
    times, rest = divmod(left[0].shape[1], states[0].shape[1])
    return times > 1 and not rest and torch.equal(states[0], left[0][:, : states[0].shape[1]])


def _are_dense(weights: Any, tokens: int) -> bool:
    present = [w for w in weights or () if isinstance(w, Tensor)]
    if not present or not all(w.ndim == 4 and w.shape[-2:] == (tokens, tokens) for w in present):
        return False
    # SqueezeBERT returns logits under this name.
    return all(bool((w.isnan() | ((w >= 0) & (w < 1.001))).all()) for w in present)


def _cast(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in batch.items()
    }


def first_tensor(value: Any) -> Tensor | None:
    """The first floating tensor inside nested outputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return next((t for t in map(first_tensor, parts) if t is not None), None)


def state_statistics(states: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Kurtosis over channels, averaged over valid tokens: Fisher's and that of the OSP script."""
    x = states[valid > 0]
    centred = x - x.mean(-1, keepdims=True)
    second = (centred**2).mean(-1)
    fisher = (centred**4).mean(-1) / second**2 - 3
    osp = np.maximum((x**4).mean(-1) / x.var(-1, ddof=1) ** 2 - 3, 0)
    return {
        "osp_excess_kurtosis": float(osp.mean()),
        "fisher_kurtosis": float(fisher.mean()),
        "absolute_maximum": float(np.abs(x).max()),
    }


def attention_statistics(weights: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of each head from T×T weights (batch, head, query, key) and the valid tokens (batch, token).

    Whether a key can be seen by the queries before it is read off the weights.
    """
    batch, heads, tokens, _ = weights.shape
    causal = not np.triu(weights, 1).any()
    received = np.full((batch, heads, tokens), np.nan)
    to_first: list[np.ndarray] = []
    for b in range(batch):
        places = np.flatnonzero(valid[b])
        for key in places:
            queries = places[places >= key] if causal else places
            received[b, :, key - places[0]] = weights[b][:, queries, key].mean(-1)
        to_first += [weights[b, :, query, places[0]] for query in places]
    present = ~np.isnan(received)
    total = np.where(present, received, 0).sum(0)
    with np.errstate(invalid="ignore"):
        mass = total / present.sum(0)
    first = [received[present[:, 0, k], :, k] for k in range(min(SINK_POSITIONS, tokens))]
    rates = {
        name: np.moveaxis(
            np.array([[(alpha > e + margin).mean(0) for alpha in first] for e in EPSILONS]), -1, 0
        )
        for name, margin in (("sink_rate", 0.0), ("sink_rate_least", MARGIN), ("sink_rate_most", -MARGIN))
    }
    return {
        "key_mass": mass,
        "first_token_attention": np.mean(to_first, axis=0),
        **rates,
    }
