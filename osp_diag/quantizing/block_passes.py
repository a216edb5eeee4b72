"""A model's blocks, run one after the other on states of the stream that are kept between them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from osp_diag.errors import CheckpointError, TokenError
from osp_diag.sites import find_sites
from osp_diag.sites.trace import outputs_of, unwrap
from osp_diag.tokens import make_batches

__all__ = ["BlockPasses", "calibration_ids"]

_CHECKED_TOKENS = 24
_TOLERANCE = 1e-3
"""How far states may lie from those of the whole model, of their own length."""
_HALF_TOLERANCE = 5e-2


class _Reached(Exception):  # noqa: N818 (no error)
    """A pass has come as far as was asked."""


def calibration_ids(model: nn.Module, calibration: Any) -> Int64[Tensor, "sequence position"]:
    """Token ids to calibrate on, checked against the model.

    Raises
    ------
    TokenError : none, ids of another shape, or foreign to the model
    """
    shape = tuple(getattr(calibration, "shape", ()))
    if len(shape) != 2 or 0 in shape:
        raise TokenError(
            f"calibration takes token ids of shape (sequence, position), not of shape {shape}; give some "
            "that are not evaluated"
        )
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return torch.from_numpy(make_batches(ids=calibration, vocabulary_size=max(tables, default=None)).tokens)


class BlockPasses:
    """The blocks of a causal language model, each called as the model calls it, but for the stream.

    A block's other arguments (rotary angles, masks) are taken from one pass of the model; they must not
    depend on which tokens there are, and each block's output must be the next one's input. Both are checked
    on a short sequence of other tokens.

    Parameters
    ----------
    model : causal language model, in evaluation mode
    ids : tokens of shape (sequence, position), which the passes are of
    batch_size : sequences a pass
    blocks : path or pattern of the stack of blocks, where the guess fails

    Raises
    ------
    CheckpointError : blocks that cannot be run one after the other
    SiteError : no blocks were found
    """

    def __init__(
        self,
        model: nn.Module,
        ids: Int64[Tensor, "sequence position"],
        *,
        batch_size: int = 1,
        blocks: str | None = None,
    ) -> None:
        self.model = unwrap(model)
        self.paths = find_sites(self.model, blocks=blocks).block_paths
        self.blocks = [self.model.get_submodule(path) for path in self.paths]
        if len(set(self.paths)) < len(self.paths):
            raise self._refusal("a block runs several times")
        self.batches = ids.to(next(self.model.parameters()).device).split(batch_size)
        self._returns_tensor = True
        self._calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._check(self.batches[0][:1, :_CHECKED_TOKENS])

    @torch.no_grad()
    def first_states(self) -> list[Float[Tensor, "sequence position channel"]]:
        """What the first block reads, of each batch."""
        return [self._recorded(batch)[0] for batch in self.batches]

    def run(self, layer: int, state: Float[Tensor, "sequence position channel"]) -> Tensor:
        """The output of a block for a state of the stream."""
        arguments, keywords = self._calls[tuple(state.shape[:2])][layer]
        if arguments:
            result = self.blocks[layer](state, *arguments[1:], **keywords)
        else:
            result = self.blocks[layer](**keywords | {"hidden_states": state})
        return outputs_of(result)[None] if isinstance(result, Tensor) else outputs_of(result)[0]

    def rest(self, ids: Int64[Tensor, "sequence position"], state: Tensor) -> Tensor:
        """The logits for a state behind the last block: what the model does with it, its blocks left out."""
        with ExitStack() as undo:
            for block in self.blocks:
                result = state if self._returns_tensor else (state,)
                undo.callback(_restore_forward, block, vars(block).get("forward"))
                block.forward = _constant(result)
            output = self._called(ids)
        return output.logits if hasattr(output, "logits") else outputs_of(output)[0]

    def _called(self, ids: Tensor) -> Any:
        return self.model(ids, **({"use_cache": False} if hasattr(self.model, "config") else {}))

    def _recorded(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """(what the first block reads, what the last gives); the latter if calls of the shape are new."""
        new = tuple(ids.shape) not in self._calls
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        states: list[Tensor] = []

        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            state = arguments[0] if arguments else keywords.get("hidden_states")
            if not isinstance(state, Tensor) or tuple(state.shape[:2]) != tuple(ids.shape):
                raise self._refusal("its blocks are not called on (sequence, position, channel)")
            if module is self.blocks[0]:
                states.append(state.detach().clone())
                if not new:
                    raise _Reached
            kept = arguments[:0] if not arguments else (None, *arguments[1:])
            calls.append((kept, {k: v for k, v in keywords.items() if k != "hidden_states"}))

        def after(module: nn.Module, arguments: Any, result: Any) -> None:
            self._returns_tensor = isinstance(result, Tensor)
            states.append(result if isinstance(result, Tensor) else outputs_of(result)[0])
            raise _Reached

        with ExitStack() as undo:
            for block in self.blocks:
                undo.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            undo.callback(self.blocks[-1].register_forward_hook(after).remove)
            with suppress(_Reached):
                self._called(ids)
        if not new:
            return states[0], None
        if len(calls) != len(self.blocks):
            raise self._refusal("not every block runs in a pass")
        self._calls[tuple(ids.shape)] = calls
        return states[0], states[-1]

    @torch.no_grad()
    def _check(self, ids: Tensor) -> None:
        self._recorded(ids.flip(1))
        state, _ = self._recorded(ids)  # which runs with the arguments of the other tokens
        for layer in range(len(self.blocks)):
            state = self.run(layer, state)
        del self._calls[tuple(ids.shape)]
        _, expected = self._recorded(ids)
        assert expected is not None, "the calls are new"
        limit = _TOLERANCE if state.element_size() >= 4 else _HALF_TOLERANCE
        moved = float((state - expected).double().norm())
        size = float(expected.double().norm())
        if not moved <= limit * size and size < float("inf"):
            raise self._refusal(
                "run one after the other they give other states, since a block's arguments depend on the "
                "tokens, or something stands between the blocks"
            )

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"the blocks of {type(self.model).__name__} cannot be calibrated one after the other: {reason}; "
            "rounding to nearest needs no calibration"
        )


def _constant(result: Any) -> Callable[..., Any]:
    def forward(*arguments: Any, **keywords: Any) -> Any:
        return result

    return forward


def _restore_forward(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own
