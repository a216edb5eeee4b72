"""From activations and attention calls to estimator states, on the device where they appear."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from osp_diag.capture.attention_measuring import measure_attention
from osp_diag.capture.compiling import compile_once
from osp_diag.capture.down_projection import down_projection
from osp_diag.capture.hooks import ForwardPass, heads_first, unobserved
from osp_diag.capture.snapshots import Snapshots
from osp_diag.capture.strata import strata_of
from osp_diag.capture.token_groups import GROUPED_FIELDS, TokenGroups
from osp_diag.errors import CaptureError
from osp_diag.estimators import default_estimators
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.attention import TokenIds
from osp_diag.estimators.base import Estimator, Layout, Observes, State, Suite, merge_states
from osp_diag.estimators.query_key import HeadsObservation
from osp_diag.estimators.weight_outliers import WeightObservation
from osp_diag.schema import ATTENTION, DOWN_WEIGHT, HEAD_SITES
from osp_diag.sites.names import Tap, matches

if TYPE_CHECKING:
    from osp_diag.capture.fused import FusedFolding
    from osp_diag.seams.attention import AttentionCall

__all__ = ["Collector", "Key", "suites_of"]

Key = tuple[str, int, str]
"""(site, layer, what is observed: "activation", "heads", "attention" or "weight")"""

GROWING = ("key_position", "token_position")
"""Dimensions whose length is the sequence's: shorter sequences are padded when states are merged."""


EstimatorChoice = Sequence[Estimator] | Mapping[str, Sequence[Estimator]] | None
"""Estimators for every site, for the sites that match a pattern, or (None) the default ones of each site."""


def suites_of(site: str, estimators: EstimatorChoice) -> dict[str, Suite]:
    """The estimators that apply at a site, by what they observe."""
    if isinstance(estimators, Mapping):
        matching = [group for pattern, group in estimators.items() if matches(site, (pattern,))]
        estimators = matching[0] if matching else ()
    kinds: tuple[Observes, ...] = ("activation",)
    if site == ATTENTION:
        kinds = ("attention",)
    elif site == DOWN_WEIGHT:
        kinds = ("weight",)
    elif site in HEAD_SITES:
        kinds = ("activation", "heads")
    suites: dict[str, Suite] = {}
    for kind in kinds:
        applicable: Sequence[Estimator] = default_estimators(observes=kind, site=site)
        if estimators is not None:
            applicable = [estimator for estimator in estimators if estimator.observes == kind]
        if applicable:
            suites[kind] = Suite(applicable)
    return suites


class Collector:
    """Keeps one small state for every (site, layer) and folds each observation into it.

    Parameters
    ----------
    includes : whether a site is measured
    estimators : the estimators to use; None for the default ones of each site
    delimiter_ids : token ids of the ``delimiter`` stratum
    causal_layers : layers whose attention is causal, whatever way its mask says so
    vocabulary : how many token ids the model has; None where that is not known, and then no statistic is
        told by token
    compiled : fold with ``torch.compile``, so that one site is read in few passes
    snapshots : keeps the raw activations of a first sequence for pictures, or None
    groups : keeps some sums apart by group of forward passes, or None
    """

    def __init__(
        self,
        includes: Callable[[str], bool],
        *,
        estimators: EstimatorChoice = None,
        delimiter_ids: Sequence[int] = (),
        causal_layers: Collection[int] = (),
        vocabulary: int | None = None,
        compiled: bool = False,
        snapshots: Snapshots | None = None,
        groups: TokenGroups | None = None,
    ) -> None:
        self.includes = includes
        self.estimators = estimators
        self.delimiter_ids = tuple(delimiter_ids)
        self.causal_layers = frozenset(causal_layers)
        self.vocabulary = vocabulary
        self.compiled = compiled
        self.snapshots = snapshots
        self.groups = groups
        self._states: dict[Key, State] = {}
        self._stacks: dict[tuple[Key, ...], State] = {}
        self._fused: FusedFolding | None = None
        self.layouts: dict[Key, Layout] = {}
        self.suites: dict[str, dict[str, Suite]] = {}
        self.skipped: dict[str, str] = {}
        self.forward_passes = 0
        self.block_runs: dict[str, int] = {}
        """How often each block ran in the pass in which it ran most."""
        self._strata: dict[torch.device, torch.Tensor] = {}
        self._ids: dict[torch.device, torch.Tensor] = {}
        self._pass: ForwardPass | None = None
        self._backup: tuple[Any, ...] = ()
        self._layers_called: set[int] = set()
        self._values: dict[int, torch.Tensor] = {}

    def needs(self, tap: Tap) -> bool:
        """Whether a tap is read: its site is measured, or attention statistics take their values there."""
        if tap.site == DOWN_WEIGHT and not self.suites_at(DOWN_WEIGHT):
            return False
        return self.includes(tap.site) or (tap.site == "value" and self.includes(ATTENTION))

    @property
    def states(self) -> dict[Key, State]:
        """The state of every (site, layer, kind) that was observed."""
        states = {key: dict(state) for key, state in self._states.items()}
        for keys, stack in self._stacks.items():
            for index, key in enumerate(keys):
                part = {name: value[index] for name, value in stack.items()}
                state = states.setdefault(key, {})
                fields = self.suites_at(key[0])[key[2]].fields(self.layouts[key])
                # A site that was read twice in a pass, or stacked otherwise in another, is one site.
                twice = {name: fields[name] for name in part if name in state}
                state |= part | (merge_states(twice, state, part) if twice else {})
        return states

    def suites_at(self, site: str) -> dict[str, Suite]:
        if site not in self.suites:
            self.suites[site] = suites_of(site, self.estimators)
        return self.suites[site]

    # One forward pass

    def start(self, forward_pass: ForwardPass) -> None:
        """Learn which tokens the pass is about: ids, padding and so the strata."""
        self._pass = forward_pass
        self._backup = (dict(self._states), dict(self._stacks), dict(self.layouts))
        self._layers_called, self._values = set(), {}
        if self.groups is not None:
            self.groups.start(self.forward_passes)
        ids, mask = forward_pass.token_ids, forward_pass.attention_mask
        if ids is None:
            other = forward_pass.embeddings
            if other is None:
                names = " or ".join(f"{forward_pass.prefix}{name}" for name in ("input_ids", "inputs_embeds"))
                raise CaptureError(
                    "the forward pass got no tensor of shape (batch, token, …), so its tokens cannot be told "
                    f"apart; call the model with {names}"
                )
            ids = torch.full(other.shape[:2], -1, device=other.device)
        with torch.no_grad():
            strata = strata_of(ids, mask, self.delimiter_ids, forward_pass.position_ids)
        self._strata = {strata.device: strata}
        self._ids = {ids.device: ids}
        self._source_strata = strata

    def stop(self, raised: bool) -> None:
        """A pass that raised is forgotten whole: half of its sites would bias the averages."""
        if self._fused is not None:
            self._fused.forget() if raised else self._fused.finish()
        if raised:
            self._states, self._stacks, self.layouts = self._backup
            if self.groups is not None:
                self.groups.forget()
            if self.snapshots is not None and self.forward_passes == 0:
                self.snapshots.clear()
        else:
            self.forward_passes += 1
            for path, runs in self._pass.runs.items() if self._pass is not None else ():
                self.block_runs[path] = max(runs, self.block_runs.get(path, 0))
        self._backup, self._pass, self._values = (), None, {}

    def forget_unfinished(self) -> None:
        """Forget a pass that Ctrl-C cut short, of which no hook tells."""
        if self._pass is not None:
            self.stop(True)

    def strata_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._strata:
            self._strata[device] = self._source_strata.to(device)
        return self._strata[device]

    def _token_ids_on(self, device: torch.device) -> TokenIds | None:
        if self.vocabulary is None:
            return None
        if device not in self._ids:
            self._ids[device] = next(iter(self._ids.values())).to(device)
        return TokenIds(self._ids[device], self.vocabulary)

    # What hooks deliver

    def on_activation(self, tap: Tap, layer: int, value: torch.Tensor) -> None:
        """Fold one tapped tensor."""
        strata = self.strata_on(value.device)
        _, batch, tokens = strata.shape
        if not _has_one_vector_a_token(value, batch, tokens):
            self.skipped[tap.site] = (
                f"its tensor {tuple(value.shape)} does not hold one vector a token ({batch} × {tokens})"
            )
            return
        if tap.heads:
            tensor = heads_first(tap, value, batch, tokens)
            if tap.site == "value":
                self._values[layer] = tensor
            if self.includes(tap.site):
                self._fold_heads(tap.site, layer, tensor, strata)
        elif self.includes(tap.site):
            self._fold(tap.site, layer, "activation", value.reshape(batch, tokens, -1), strata)

    def on_attention(self, call: AttentionCall, layer: int | None) -> None:
        """Fold one self-attention call: its heads' tensors and the statistics of its probabilities.

        A layer that calls attention several times (DiffLlama) counts once, by its first call.
        """
        if layer is None or layer in self._layers_called:
            return
        self._layers_called.add(layer)
        strata = self.strata_on(call.tensor.device)
        with unobserved(call.tensor.device, traced=self.compiled):
            for site, tensor in (
                ("query_post_rope", call.query),
                ("key_post_rope", call.key),
                ("value", call.value),
            ):
                if tensor is not None and self.includes(site):
                    self._fold_heads(site, layer, tensor, strata)
            if self.snapshots is not None:
                self.snapshots.offer_call(layer, call, causal=call.causal or layer in self.causal_layers)
            if self.includes(ATTENTION) and strata.shape[-1] > 1:
                if call.value is None and call.logits is not None:
                    call = replace(call, value=self._values.pop(layer, None))
                self._fold_attention(call, layer, strata)

    def on_routed(self, layer: int, rows: torch.Tensor, slots: int) -> None:
        """Fold the experts' hidden activations: each token's ``slots`` rows as so many parallel sequences."""
        strata = self.strata_on(rows.device)
        _, batch, tokens = strata.shape
        if rows.shape[0] != batch * tokens * slots:
            self.skipped["mlp_hidden"] = "its experts dropped or padded tokens, so rows cannot be told apart"
            return
        x = rows.reshape(batch, tokens, slots, -1).transpose(1, 2).flatten(0, 1)
        self._fold("mlp_hidden", layer, "activation", x, strata.repeat_interleave(slots, dim=1))

    def on_weight(self, tap: Tap, layer: int, module: nn.Module, hidden: torch.Tensor) -> None:
        """Measure a projection's weights, once a step: they are the same in all its forward passes."""
        key = (tap.site, layer, "weight")
        if key in self._states:
            return
        weight = down_projection(module, hidden)
        if isinstance(weight, str):
            self.skipped[tap.site] = weight
            return
        suite = self.suites_at(tap.site)["weight"]
        observation = WeightObservation(weight)
        self._merge(key, suite, observation.layout, suite.measure(observation))

    # Folding

    def _fold_heads(self, site: str, layer: int, tensor: torch.Tensor, strata: torch.Tensor) -> None:
        if tensor.shape[0] != strata.shape[1] or tensor.shape[2] != strata.shape[2]:
            self.skipped[site] = (
                f"its tensor {tuple(tensor.shape)} is not (batch, head, token, width) for these tokens"
            )
            return
        self._fold(site, layer, "activation", tensor.transpose(1, 2).flatten(2), strata, snapshot=False)
        self._fold(site, layer, "heads", tensor, strata)

    def _fold(
        self,
        site: str,
        layer: int,
        kind: str,
        x: torch.Tensor,
        strata: torch.Tensor,
        *,
        snapshot: bool = True,
    ) -> None:
        if snapshot and self.snapshots is not None:
            self.snapshots.offer(site, layer, x)
        suite = self.suites_at(site).get(kind)
        if suite is None:
            return
        key = (site, layer, kind)
        if kind == "activation" and self.compiled and x.device.type == "cuda":
            increment = self._fused_folding().fold(key, suite, x, strata)
        else:
            increment = self._measure_function(site, kind, x)(x, strata)
        if increment:
            self._merge(key, suite, _layout(kind, x), increment)

    def _measure_function(self, site: str, kind: str, x: torch.Tensor) -> Callable[..., State]:
        """The function (x, strata) → increments of a site, compiled once for all sites that are alike."""
        suite = self.suites_at(site)[kind]

        def measure(x: torch.Tensor, strata: torch.Tensor) -> State:
            if kind == "heads":
                return suite.measure(HeadsObservation(x, strata))
            return suite.measure(ActivationObservation(x, strata))

        if not self.compiled:
            return measure
        name = (suite.measurements, kind, x.shape, x.stride(), x.dtype, x.device)
        return compile_once(name, measure)

    def _fold_attention(self, call: AttentionCall, layer: int, strata: torch.Tensor) -> None:
        suite = self.suites_at(ATTENTION).get("attention")
        if suite is None:
            return
        causal = call.causal or layer in self.causal_layers
        ids = self._token_ids_on(strata.device)
        layout, increment = measure_attention(
            suite, call, strata, causal=causal, compiled=self.compiled, token_ids=ids
        )
        self._merge((ATTENTION, layer, "attention"), suite, layout, increment)

    def _fused_folding(self) -> FusedFolding:
        if self._fused is None:
            # Triton comes with torch's CUDA builds alone.
            from osp_diag.capture.fused import FusedFolding

            self._fused = FusedFolding(self._merge_stack)
        return self._fused

    def _merge(self, key: Key, suite: Suite, layout: Layout, increment: State) -> None:
        first_layout = self.layouts.setdefault(key, layout)
        if self.groups is not None:
            self.groups.add(key, suite, layout, increment)
        if key not in self._states:
            self._states[key] = suite.opening(increment)
            return
        state = self._states[key]
        if layout.tokens != first_layout.tokens:
            longest = layout if layout.tokens > first_layout.tokens else first_layout
            state, increment = (_padded(suite, part, longest) for part in (state, increment))
            self.layouts[key] = longest
        fields = suite.fields(layout)
        self._states[key] = merge_states({name: fields[name] for name in increment}, state, increment)

    def _merge_stack(self, keys: tuple[Key, ...], suite: Suite, layout: Layout, increment: State) -> None:
        """As :meth:`_merge`, for many keys at once; what is measured so has no axis over positions."""
        for index, key in enumerate(keys):
            self.layouts.setdefault(key, layout)
            if self.groups is not None:
                part = {name: increment[name][index] for name in GROUPED_FIELDS if name in increment}
                self.groups.add(key, suite, layout, part)
        fields = suite.fields(layout)
        if keys not in self._stacks:
            self._stacks[keys] = suite.opening(increment)
        else:
            increment_fields = {name: fields[name] for name in increment}
            self._stacks[keys] = merge_states(increment_fields, self._stacks[keys], increment)


def _has_one_vector_a_token(value: torch.Tensor, batch: int, tokens: int) -> bool:
    """(batch, token, channel), (batch · token, channel), or (batch, token, head, width) either way round."""
    shape = tuple(value.shape)
    if len(shape) == 4:
        return shape[0] == batch and tokens in shape[1:3]
    return shape[:-1] in ((batch, tokens), (batch * tokens,))


def _layout(kind: str, x: torch.Tensor) -> Layout:
    if kind == "heads":
        _, heads, tokens, width = x.shape
        return Layout(channels=heads * width, heads=heads, head_channels=width, tokens=tokens)
    return Layout(channels=x.shape[-1], tokens=x.shape[1])


def _padded(suite: Suite, state: State, layout: Layout) -> State:
    """``state`` with its position axes extended to the layout's length by the identity of merging."""
    out = {}
    fields = suite.fields(layout)
    for name, value in state.items():
        spec = fields[name]
        for axis, dim in enumerate(spec.dims):
            missing = layout.tokens - value.shape[axis] if dim in GROWING else 0
            if missing > 0:
                shape = list(value.shape)
                shape[axis] = missing
                value = torch.cat([value, value.new_full(shape, spec.identity)], dim=axis)
        out[name] = value
    return out
