"""From one attention call to the increments of its statistics, by the fastest exact way there is for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from osp_diag.capture.compiling import compile_apart
from osp_diag.capture.flex import FlexStatistics, is_expressible
from osp_diag.estimators.attention import AttentionMask, AttentionObservation, TokenIds
from osp_diag.estimators.attention_reach import with_reach
from osp_diag.estimators.attention_tiles import AttentionReductions, SoftmaxStatistics
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.schema import STRATA

if TYPE_CHECKING:
    from osp_diag.seams.attention import AttentionCall

__all__ = ["Masks", "mask_of", "measure_attention"]


def measure_attention(
    suite: Suite,
    call: AttentionCall,
    strata: torch.Tensor,
    *,
    stratum_names: tuple[str, ...] = STRATA,
    mask: AttentionMask,
    compiled: bool,
    token_ids: TokenIds | None = None,
    output_weight: torch.Tensor | None = None,
) -> tuple[Layout, State]:
    """Measure one call.

    Parameters
    ----------
    suite : the attention estimators
    strata : (stratum, batch, token)
    stratum_names : ``all``, then the others
    mask : from :func:`mask_of`
    token_ids : the ids of the tokens, on the call's device
    output_weight : (head, row, value channel) of the output projection, where a measurement reads it
    compiled : use FlexAttention where its masks hold the call's; otherwise, and on a CPU, tiles of queries
    """
    if call.logits is not None:
        extra = max(call.logits.shape[-1] - call.logits.shape[-2], 0)
        observation = AttentionObservation.from_logits(
            call.logits,
            call.value,
            strata,
            stratum_names=stratum_names,
            mask=mask,
            extra_columns=extra,
            token_ids=token_ids,
            output_weight=output_weight,
        )
        return observation.layout, suite.measure(observation)
    query, key = call.query, call.key
    assert query is not None, "a call without logits has queries"
    assert key is not None, "and keys"
    # The ways from the fastest: FlexAttention's two passes, else tiles of queries.
    if compiled and query.device.type == "cuda" and is_expressible(mask):
        vocabulary = None if token_ids is None else token_ids.vocabulary
        measure = _compiled(suite, call, mask, query, vocabulary, stratum_names)
        return _layout(query, key, token_ids, stratum_names), measure(call, strata, token_ids, output_weight)
    observation = AttentionObservation(
        query,
        key,
        call.value,
        strata,
        stratum_names=stratum_names,
        scale=call.scale,
        mask=mask,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        token_ids=token_ids,
        output_weight=output_weight,
    )
    return observation.layout, suite.measure(observation)


def mask_of(call: AttentionCall, valid: torch.Tensor) -> AttentionMask:
    """What the queries of a call see, and whether any sees what is later; ``valid`` is 0 for padding.

    A window without causality reaches both ways, which takes a function. Of logits that the model made and
    masked itself only the reach is told.
    """
    if call.logits is not None:
        return with_reach(
            AttentionMask(causal=call.causal), valid, heads=call.logits.shape[1], logits=call.logits
        )
    window, function = call.window, call.mask_function
    if window is not None and not call.causal:
        width, other_mask = window, function

        def within_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
            in_window = (query - key).abs() < width
            return in_window if other_mask is None else in_window & other_mask(batch, head, query, key)

        window, function = None, within_window
    mask = AttentionMask(causal=call.causal, window=window, tensor=call.mask, function=function)
    return with_reach(mask, valid, heads=call.tensor.shape[1])


class Masks:
    """The masks of the last calls of a pass: layers that are handed the same tensor are asked once."""

    def __init__(self) -> None:
        self._recent: list[tuple[Any, AttentionCall, AttentionMask]] = []

    def of(self, call: AttentionCall, valid: torch.Tensor) -> AttentionMask:
        """See :func:`mask_of`."""
        if call.logits is not None:
            return mask_of(call, valid)
        tensor = call.mask
        key: tuple[Any, ...] = (call.causal, call.window, call.mask_function, call.tensor.shape[:3])
        if tensor is not None:
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            # Without a version counter (inference mode) a tensor may have been written to since.
            key = (*key, *place, None if tensor.is_inference() else tensor._version)
        known = next((mask for name, _, mask in self._recent if name == key), None)
        if known is not None and not (tensor is not None and tensor.is_inference()):
            return known
        mask = mask_of(call, valid)
        # The call is kept so that its mask's memory is not another's meanwhile; two kinds take turns.
        only_mask = replace(call, query=call.tensor[:0], key=None, value=None, logits=None)
        self._recent = [(key, only_mask, mask), *self._recent[:1]]
        return mask


def _layout(
    query: torch.Tensor, key: torch.Tensor, token_ids: TokenIds | None, strata: tuple[str, ...]
) -> Layout:
    _, heads, tokens, width = query.shape
    return Layout(
        channels=heads * width,
        heads=heads,
        key_value_heads=key.shape[1],
        head_channels=width,
        tokens=tokens,
        vocabulary=1 if token_ids is None else token_ids.vocabulary,
        strata=strata,
    )


_COMPILED: dict[tuple[Any, ...], _CompiledMeasure] = {}


def _compiled(
    suite: Suite,
    call: AttentionCall,
    mask: AttentionMask,
    query: torch.Tensor,
    vocabulary: int | None,
    strata: tuple[str, ...],
) -> _CompiledMeasure:
    """One compiled measurement for all layers that are alike."""
    name = (
        suite.measurements,
        call.scale,
        mask.causal,
        mask.window,
        call.softcap,
        query.shape[2],
        query.device,
        vocabulary,
        strata,
    )
    if name not in _COMPILED:
        _COMPILED[name] = _CompiledMeasure(suite, mask, call.scale, call.softcap, query, vocabulary, strata)
    return _COMPILED[name]


class _CompiledMeasure:
    """FlexAttention's statistics, then everything else in one compiled function."""

    def __init__(
        self,
        suite: Suite,
        mask: AttentionMask,
        scale: float,
        softcap: float | None,
        query: torch.Tensor,
        vocabulary: int | None,
        stratum_names: tuple[str, ...],
    ) -> None:
        self.softmax = FlexStatistics(
            query.shape[2],
            query.device,
            mask,
            scale=scale,
            softcap=softcap,
            stratum_names=stratum_names,
            compile=compile_apart,
        )

        def measure(
            query: Any,
            key: Any,
            value: Any,
            strata: Any,
            sinks: Any,
            ids: Any,
            output_weight: Any,
            softmax: SoftmaxStatistics,
        ) -> State:
            reductions = AttentionReductions(softmax_statistics=lambda *_: softmax)
            observation = AttentionObservation(
                query,
                key,
                value,
                strata,
                stratum_names=stratum_names,
                scale=scale,
                mask=mask,
                softcap=softcap,
                sink_logits=sinks,
                token_ids=None if vocabulary is None else TokenIds(ids, vocabulary),
                output_weight=output_weight,
                reductions=reductions,
            )
            return suite.measure(observation)

        self.measure = compile_apart(measure)

    def __call__(
        self,
        call: AttentionCall,
        strata: torch.Tensor,
        token_ids: TokenIds | None,
        output_weight: torch.Tensor | None,
    ) -> State:
        query, key, sinks = call.query, call.key, call.sink_logits
        assert query is not None, "a call without logits has queries"
        assert key is not None, "and keys"
        ids = None if token_ids is None else token_ids.ids
        softmax = self.softmax(query, key, strata, sinks)
        return self.measure(query, key, call.value, strata, sinks, ids, output_weight, softmax)
