"""Interventions on activations and attention, while somebody else runs the model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from osp_diag.capture.hooks import ForwardPass, SiteCapture, input_of, output_of, unobserved
from osp_diag.capture.strata import strata_of
from osp_diag.errors import CaptureError
from osp_diag.interventions.calls import edited_call
from osp_diag.interventions.intervention import KEYS, Intervention
from osp_diag.interventions.operations import changed
from osp_diag.interventions.placement import rewritten, shares_its_input, with_input, with_output
from osp_diag.interventions.targets import is_at_call, layers_of, taps_of, tokens_of
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.editing import AttentionEditing
from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.names import SiteMap, Tap

__all__ = ["Editing"]


class Editing:
    """The hooks, and the attention calls, of interventions on a running model.

    Parameters
    ----------
    model : not wrapped
    sites : what was found in it
    interventions : on activations and keys, checked by :func:`osp_diag.interventions.targets.check`
    delimiter_ids : the tokens of the stratum ``delimiter``
    operate : makes of (intervention, layer, site, which tokens are meant) what is put in the site's place
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteMap,
        interventions: Sequence[Intervention],
        delimiter_ids: Sequence[int],
        operate: Callable[[Intervention, int, Tensor, Tensor], Tensor] = changed,
    ) -> None:
        self.operate = operate
        self.model, self.sites, self.delimiter_ids = model, sites, tuple(delimiter_ids)
        self.at_call = [i for i in interventions if is_at_call(sites, i)]
        self.at_taps = [i for i in interventions if i not in self.at_call]
        self.capture = SiteCapture(
            model,
            (),
            sites.block_paths,
            lambda tap, layer, value: None,
            on_start=self._begin,
            on_stop=self._end,
            on_stream=self._stream,
            prefix=sites.prefix,
            entries=sites.entries,
            channels_first=sites.channels_first,
            streams_in_a_row=sites.streams_in_a_row,
        )
        self.attention: AttentionEditing | None = None
        if self.at_call:
            masks = any(i.operation == KEYS for i in self.at_call)
            self.attention = AttentionEditing(model, self._edit_call, masks=masks)
        self._cross = {model.get_submodule(path) for path in sites.cross_attention.values()}
        self._own_memory = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
        self._handles: list[Any] = []
        self._chosen: dict[int, Tensor] = {}
        self._shape = (0, 0)
        self._reached: Counter[tuple[int, int]] = Counter()
        self._calls: Counter[int] = Counter()

    # -- the hooks ------------------------------------------------------------------------------------------

    def __enter__(self) -> Editing:
        try:
            self.capture.attach()
            by_place: dict[tuple[str, str], list[tuple[Intervention, Tap]]] = defaultdict(list)
            for intervention in self.at_taps:
                for tap in taps_of(self.sites, intervention):
                    by_place[tap.module, tap.side].append((intervention, tap))
            for (path, side), edits in by_place.items():
                module = self.model.get_submodule(path)
                if side == "input":
                    hook = of_this_thread(self._input_hook(edits))
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                else:
                    hook = of_this_thread(self._output_hook(edits))
                    self._handles.append(module.register_forward_hook(hook))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        if self.attention is not None:
            self.attention.stop()
        self.capture.detach()

    def _input_hook(self, edits: list[tuple[Intervention, Tap]]) -> Callable[..., Any]:
        calls: Counter[int] = Counter()

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            for intervention, tap in self._of_this_call(edits, calls):
                value = input_of(tap.argument, args, kwargs)
                new = self._edited(intervention, tap, value)
                if self._is_shared(module, tap, value):
                    value.copy_(new)
                else:
                    args, kwargs = with_input(tap.argument, args, kwargs, new)
            return args, kwargs

        return hook

    def _output_hook(self, edits: list[tuple[Intervention, Tap]]) -> Callable[..., Any]:
        calls: Counter[int] = Counter()

        def hook(module: nn.Module, args: Any, result: Any) -> Any:
            for intervention, tap in self._of_this_call(edits, calls):
                new = self._edited(intervention, tap, output_of(tap.argument, result))
                result = with_output(tap.argument, result, new)
            return result

        return hook

    def _of_this_call(
        self, edits: list[tuple[Intervention, Tap]], calls: Counter[int]
    ) -> list[tuple[Intervention, Tap]]:
        """Those that are meant by the call under way, of a module or a block that runs several times."""
        current = self.capture.current
        if current is None:
            return []
        number = calls[id(current)]
        for past in [key for key in calls if key != id(current)]:
            del calls[past]
        calls[id(current)] += 1
        return [
            (i, tap)
            for i, tap in edits
            if self._is_of_running_layer(tap) and (tap.call is None or tap.call == number)
        ]

    def _is_of_running_layer(self, tap: Tap) -> bool:
        block = self.sites.block_paths[tap.layer]
        several = self.sites.block_paths.count(block) > 1 and f"{tap.module}.".startswith(f"{block}.")
        return not several or self.capture.current is None or self.capture.current.layer == tap.layer

    def _is_shared(self, module: nn.Module, tap: Tap, value: Tensor) -> bool:
        """Whether the change is written into the very tensor that is read, which is this pass's own."""
        if not shares_its_input(module, tap):
            return False
        overlaps = any(
            size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True)
        )
        return not overlaps and value.untyped_storage().data_ptr() not in self._own_memory | self._arguments

    def _edited(self, intervention: Intervention, tap: Tap, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            raise CaptureError(f"{intervention}: {tap.module} has no tensor at its {tap.side} in this pass")
        batch, tokens = self._layout()
        chosen = self._tokens(intervention).to(value.device)
        self._reached[id(intervention), tap.layer] += 1
        with unobserved(value.device):
            return rewritten(
                self.sites,
                tap,
                value,
                batch,
                tokens,
                lambda x: self.operate(intervention, tap.layer, x, chosen),
            )

    # -- a pass ---------------------------------------------------------------------------------------------

    def _begin(self, current: ForwardPass) -> None:
        self._chosen, self._shape = {}, (0, 0)
        self._reached.clear()
        self._calls.clear()
        if torch.is_grad_enabled():
            raise CaptureError(
                "activations are changed without gradients, since what a backward pass computes once more "
                "would not be changed; run the model under torch.no_grad()"
            )
        values = [v for level in current.levels for v in level.values()]
        if any(hasattr(v, "get_seq_length") and v.get_seq_length() > 0 for v in values):
            raise CaptureError(
                "this pass goes on with a cache, and which of its tokens is the first is not known; run "
                "whole sequences, with use_cache=False"
            )
        self._arguments = {v.untyped_storage().data_ptr() for v in values if isinstance(v, Tensor)}

    def _stream(self, current: ForwardPass) -> None:
        if self.attention is not None:
            self.attention.start()

    def _end(self, raised: bool) -> None:
        if self.attention is not None:
            self.attention.stop()
        if raised:
            return
        for intervention in (*self.at_taps, *self.at_call):
            for layer in layers_of(self.sites, intervention):
                if not self._reached[id(intervention), layer]:
                    raise CaptureError(
                        f"{intervention}: layer {layer} was not reached in this pass, so that it is not "
                        "changed there; name the `layers` that run, at a site that a hook or a seam sees"
                    )

    def _layout(self) -> tuple[int, int]:
        """(sequences, tokens) of the pass."""
        current = self.capture.current
        stream = None if current is None else current.stream
        if stream is None or stream.ndim != 3:
            raise CaptureError(
                "the sequences and tokens of this pass cannot be told where it is to be changed: before the "
                "first block, or in a stream that is not (batch, token, channel)"
            )
        turned = self.sites.tokens_first
        return (stream.shape[1], stream.shape[0]) if turned else (stream.shape[0], stream.shape[1])

    def _tokens(self, intervention: Intervention) -> Bool[Tensor, "batch token"]:
        """Which tokens of the pass are meant."""
        if id(intervention) not in self._chosen:
            self._chosen[id(intervention)] = self._choose(intervention)
        return self._chosen[id(intervention)]

    def _choose(self, intervention: Intervention) -> Bool[Tensor, "batch token"]:
        current = self.capture.current
        batch, length = self._layout()
        assert current is not None, "only asked within a pass"
        assert current.stream is not None, "which has a layout"
        with unobserved(current.stream.device):
            ids = current.token_ids(batch, length, tokens_first=self.sites.tokens_first)
            strata = strata_of(
                ids,
                current.padding_mask(batch, length),
                self.delimiter_ids,
                current.position_ids(batch, length),
                inputs_embeds=current.stream.transpose(0, 1) if self.sites.tokens_first else current.stream,
            ).bool()
            return tokens_of(intervention, strata)

    # -- attention ------------------------------------------------------------------------------------------

    def _edit_call(self, call: AttentionCall) -> AttentionCall:
        current = self.capture.current
        layer = None if current is None else current.layer
        if layer is None or layer not in self.sites.attention_layers or call.module in self._cross:
            return call
        queries, keys = call.lengths
        batch, tokens = self._layout()
        if queries != keys or (call.tensor.shape[0], queries) != (batch, tokens):
            return call
        self._calls[layer] += 1
        if self._calls[layer] > 1:  # of several calls in a layer the first is the site
            return call
        new = call
        with unobserved(call.tensor.device):
            for intervention in self.at_call:
                if layer in layers_of(self.sites, intervention):
                    self._reached[id(intervention), layer] += 1
                    chosen = self._tokens(intervention).to(call.tensor.device)
                    new = edited_call(self.sites, intervention, layer, new, chosen, self.operate)
        return new
