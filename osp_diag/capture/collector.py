"""From activations and attention calls to estimator states, on the device where they appear."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from osp_diag.capture.attention_measuring import Masks, measure_attention
from osp_diag.capture.compiling import compile_once
from osp_diag.capture.cross_attention import (
    Crossing,
    joined_crossings,
    key_tokens,
    measure_cross_attention,
)
from osp_diag.capture.decoding import (
    UNCOUNTED,
    CachedPass,
    CachedSequences,
    cache_without_count,
    cached_tokens,
)
from osp_diag.capture.documents import Documents, cuts_of_call, documents_of
from osp_diag.capture.down_projection import output_projection
from osp_diag.capture.gradients import SiteGradients, TokensOfPass, has_gradient
from osp_diag.capture.hooks import ForwardPass, batch_first, heads_first, unobserved
from osp_diag.capture.routing import by_expert, measure_routing
from osp_diag.capture.snapshots import Snapshots
from osp_diag.capture.states import EstimatorChoice, Key, SiteStates, is_weight
from osp_diag.capture.strata import strata_of
from osp_diag.capture.token_groups import TokenGroups
from osp_diag.capture.token_kinds import TokenKinds
from osp_diag.capture.weight_measuring import Projection, measure_expert_weights, measure_gate, measure_weight
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.attention import AttentionMask, TokenIds
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.estimators.mixer_state import StateObservation
from osp_diag.estimators.query_key import HeadsObservation
from osp_diag.estimators.super_weight import ProductObservation
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    CROSS_HEAD_SITES,
    DOWN_WEIGHT,
    GATE_WEIGHT,
    MIXER_STATE,
    ROUTER,
    STRATA,
)
from osp_diag.sites.names import Tap

if TYPE_CHECKING:
    from osp_diag.capture.fused import FusedFolding
    from osp_diag.seams.attention import AttentionCall

__all__ = ["Collector"]

HELD_BYTES = 2**30
"""What is held of sequences that are made token by token, before they are folded as far as they go."""


@dataclass(frozen=True)
class _Part:
    """Sequences that are folded together: all of a pass, or some of its documents."""

    documents: Documents | None
    strata: torch.Tensor
    ids: torch.Tensor

    def on(self, device: torch.device) -> _Part:
        documents = None if self.documents is None else self.documents.on(device)
        return _Part(documents, self.strata.to(device), self.ids.to(device))

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """(sequence, token, …) → the same of these sequences."""
        return values if self.documents is None else self.documents.rows(values)


class Collector:
    """Keeps one small state for every (site, layer) and folds each observation into it.

    Parameters
    ----------
    includes : whether a site is measured
    estimators : the estimators to use; None for the default ones of each site
    delimiter_ids : token ids of the ``delimiter`` stratum
    token_kinds : kinds of tokens that the model has beside text, which decide the strata; None for text
    tokens_first : whether the stream is (token, batch, channel)
    vocabulary : how many token ids the model has; None where that is not known, and then no statistic is
        told by token
    compiled : fold with ``torch.compile``, so that one site is read in few passes
    whole_sequences : whether each pass is over whole sequences, so that what it leaves in a cache is not
        gone on with
    asks_for_cuts : look once, for which the host waits, whether attention cuts its rows where nothing says so
    snapshots : keeps the raw activations of a first sequence for pictures, or None
    groups : keeps some sums apart by group of forward passes, or None
    output_projections : layer → attention's output projection, for measurements that read its weight
    expert_projections : layer → the experts' down projections, where experts are modules
    up_projections : layer → the up projection of a gated MLP, and which part of a fused one
    loss_scale : also measure gradients, of a loss that the loop multiplies by so much; None measures none
    """

    def __init__(
        self,
        includes: Callable[[str], bool],
        *,
        estimators: EstimatorChoice = None,
        delimiter_ids: Sequence[int] = (),
        token_kinds: TokenKinds | None = None,
        tokens_first: bool = False,
        vocabulary: int | None = None,
        compiled: bool = False,
        whole_sequences: bool = False,
        asks_for_cuts: bool = True,
        snapshots: Snapshots | None = None,
        groups: TokenGroups | None = None,
        output_projections: Mapping[int, nn.Module] | None = None,
        expert_projections: Mapping[int, Sequence[nn.Module]] | None = None,
        up_projections: Mapping[int, Projection] | None = None,
        loss_scale: float | None = None,
    ) -> None:
        self.includes = includes
        self.delimiter_ids = tuple(delimiter_ids)
        self.token_kinds = token_kinds
        self.stratum_names = STRATA if token_kinds is None else token_kinds.strata
        self.tokens_first = tokens_first
        self.vocabulary = vocabulary
        self.compiled = compiled
        self.whole_sequences = whole_sequences
        self.snapshots = snapshots
        self.output_projections = output_projections or {}
        self.expert_projections = expert_projections or {}
        self.up_projections = up_projections or {}
        self.gradients = None if loss_scale is None else SiteGradients(self._fold_gradient, loss_scale)
        self._sites = SiteStates(estimators, groups)
        self._fused: FusedFolding | None = None
        self.skipped: dict[str, str] = {}
        self.forward_passes = 0
        self.block_runs: dict[str, int] = {}
        """How often each block ran in the pass in which it ran most."""
        self._parts: dict[torch.device, list[_Part]] = {}
        self.notes: dict[str, None] = {}
        """What the reader of the numbers should know, in order."""
        self._sequences = CachedSequences()
        self._cached_pass: CachedPass | None = None
        self._measures_calls, self._is_put_together = True, False
        self._valid = torch.ones(0)
        """(batch, token) of the pass, 0 for padding"""
        self._pass: ForwardPass | None = None
        self._tokens: tuple[int, int] | None = None
        """(sequences, tokens of each) of the pass, once the stream has entered the first block"""
        self._masks = Masks()
        self._before_stream: list[tuple[Tap, int, torch.Tensor]] = []
        self._layers_called: set[int] = set()
        self._layers_crossed: set[int] = set()
        self._cut_apart, self._asks_for_cuts = True, asks_for_cuts
        self._values: dict[int, torch.Tensor] = {}
        self._asks_for_masks = True  # in the first pass alone: the host waits
        self._tokens_of_gradients: TokensOfPass | None = None
        self._layers_chosen: set[int] = set()
        """where the choice of experts is known in this pass: the router and the experts may both tell"""

    def needs(self, tap: Tap) -> bool:
        """Whether a tap is read: its site is measured, or attention statistics take their values there."""
        if is_weight(tap.site) and tap.side not in self.suites_at(tap.site):
            return False
        return self.includes(tap.site) or (tap.site == "value" and self.includes(ATTENTION))

    @property
    def states(self) -> dict[Key, State]:
        """The state of every (site, layer, kind) that was observed."""
        return self._sites.whole

    @property
    def groups(self) -> TokenGroups | None:
        """Some sums apart, by group of forward passes."""
        return self._sites.groups

    @property
    def layouts(self) -> dict[Key, Layout]:
        """The sizes of each state."""
        return self._sites.layouts

    def suites_at(self, site: str) -> dict[str, Suite]:
        """The estimators that apply at a site, by what they observe."""
        return self._sites.suites_at(site)

    def _note_unread_mask(self, forward_pass: ForwardPass, batch: int, tokens: int) -> None:
        mask = forward_pass.mask_of_other_tokens(batch)
        if mask is not None and not bool((mask != 0).all()):
            self.notes.setdefault(
                f"padding counts as tokens: the attention mask is of {mask.shape[1]} tokens, the stream of "
                f"{tokens}; run sequences of one length together to leave padding out"
            )

    def _strata(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None = None,
        start: int = 0,
    ) -> torch.Tensor:
        return strata_of(ids, mask, self.delimiter_ids, positions, kinds=self.token_kinds, start=start)

    # One forward pass

    def start(self, forward_pass: ForwardPass) -> None:
        """A forward pass begins; which tokens it is about is known when the stream enters the first block."""
        self._pass = forward_pass
        self._sites.begin(self.forward_passes)
        self._layers_called, self._layers_crossed, self._values = set(), set(), {}
        self._layers_chosen = set()
        self._before_stream, self._tokens, self._masks = [], None, Masks()
        self._cached_pass, self._measures_calls = None, True
        self._tokens_of_gradients = None if self.gradients is None else self.gradients.start()

    def on_stream(self, forward_pass: ForwardPass) -> None:
        """Learn from what enters the first block how many sequences and tokens there are, and which."""
        stream = forward_pass.stream
        assert stream is not None, "it has just entered"
        batch, tokens = _shape_of_stream(forward_pass, self.tokens_first)
        ids = forward_pass.token_ids(batch, tokens, tokens_first=self.tokens_first)
        if ids is None:
            # Made inside the model: patches, frames, learned prompts, labels moved on by one.
            ids = torch.full((batch, tokens), -1, device=stream.device)
        mask = forward_pass.padding_mask(batch, tokens)
        if mask is None and self._asks_for_masks:
            self._note_unread_mask(forward_pass, batch, tokens)
        self._asks_for_masks = False
        positions = forward_pass.position_ids(batch, tokens)
        strata = self._strata(ids, mask, positions)
        self._tokens = (batch, tokens)
        self._valid = strata[0]
        if self._opens_or_continues(forward_pass, ids, strata):
            self._tell_gradients(is_cached=True)
            return
        documents = documents_of(forward_pass, strata[0] > 0)
        parts = [self._documents_alone(documents_alike, ids) for documents_alike in documents]
        self._parts = {strata.device: parts or [_Part(None, strata, ids)]}
        self._tell_gradients(is_cached=False)
        waiting, self._before_stream = self._before_stream, []
        for tap, layer, value in waiting:
            self.on_activation(tap, layer, value)

    def _tell_gradients(self, *, is_cached: bool) -> None:
        """Say of which tokens the gradients of this pass will be."""
        tokens, parts = self._tokens_of_gradients, self._parts
        if tokens is not None:
            tokens.shape, tokens.is_cached = self._tokens, is_cached
            tokens.parts = lambda device: [(part.rows, part.strata) for part in _parts_on(parts, device)]

    def _opens_or_continues(self, forward_pass: ForwardPass, ids: torch.Tensor, strata: torch.Tensor) -> bool:
        """Whether the pass is one of several over the same sequences, which are put together at their end."""
        self._cached_pass = None
        cached, cache = cached_tokens(forward_pass), cache_without_count(forward_pass)
        if self._sequences.passes and not self._sequences.continues(cached, ids.shape[0], cache):
            self.finish()
            # What was finished stays, should this pass raise.
            self._sites.begin(self.forward_passes)
        if cached is None or (cached == 0 and self.whole_sequences):
            return False
        present = strata[0] > 0
        if cached == UNCOUNTED:
            cached = self._sequences.tokens or 1
        elif cache is not None:
            self._sequences.cache = weakref.ref(cache)
        if cached > 0 and not self._sequences.passes:
            self.notes.setdefault(
                "passes that went on with a cache whose beginning was not measured, or is too large to hold, "
                "are measured token by token: of them no attention, and each counts as sequences of its own"
            )
            # Behind a token that is not there, none of these is a first one.
            before = functional.pad(ids, (1, 0), value=-1), functional.pad(present, (1, 0), value=True)
            strata = self._strata(*before, start=cached - 1)[..., 1:]
            self._parts = {strata.device: [_Part(None, strata, ids)]}
            self._measures_calls = False
            return True
        self._parts = {strata.device: [_Part(None, strata, ids)]}
        self._cached_pass = CachedPass(ids, present, cached)
        self._sequences.passes.append(self._cached_pass)
        return True

    def finish(self) -> None:
        """Fold the sequences that were made token by token with a cache, as one pass over their tokens."""
        sequences, self._sequences, self._cached_pass = self._sequences, CachedSequences(), None
        if not sequences.passes:
            return
        of_this_pass = (self._tokens, self._parts, self._masks, self._valid)
        ids, present = sequences.whole("ids"), sequences.whole("present")
        self._is_put_together = True
        with unobserved(ids.device):
            strata = self._strata(ids, present)
            self._tokens, self._masks, self._valid = (ids.shape[0], ids.shape[1]), Masks(), strata[0]
            self._parts = {strata.device: [_Part(None, strata, ids)]}
            for (site, layer, kind), values in sequences.activations().items():
                self._fold_held(site, layer, kind, values)
            for layer in sequences.layers():
                call = sequences.call(layer)
                if call is None:
                    self.skipped[ATTENTION] = "the cache was reordered while tokens were made (beam search)"
                else:
                    self._fold_whole_call(call, layer)
            self._fold_mixer_states(sequences.passes[-1])
            for layer in sequences.passes[0].crossings:
                crossing = joined_crossings([each.crossings.get(layer) for each in sequences.passes])
                if isinstance(crossing, str):
                    self.skipped[CROSS_ATTENTION] = crossing
                else:
                    self._fold_crossing(crossing, layer)
        self._is_put_together = False
        self._tokens, self._parts, self._masks, self._valid = of_this_pass

    def _fold_held(self, site: str, layer: int, kind: str, values: torch.Tensor) -> None:
        if kind == "activation":
            self._fold(site, layer, kind, values, self._parts_on(values.device)[0].strata)
        elif kind == "routed":
            self._fold_routed(layer, values)
        elif site == ROUTER:
            self._fold_router(layer, kind, values)
        else:
            self._fold_heads(site, layer, values.transpose(1, 2))

    def _hold(self, key: tuple[str, int, str], values: torch.Tensor) -> None:
        """Keep what a pass with a cache gave until its sequences end."""
        assert self._cached_pass is not None, "asked only then"
        self._cached_pass.keep(key, values)
        self._spill()

    def _spill(self) -> None:
        """Fold a first pass that is too large to hold at once, as a pass without a cache."""
        held = self._cached_pass
        if held is None or len(self._sequences.passes) > 1 or held.size <= HELD_BYTES:
            return
        self._sequences, self._cached_pass = CachedSequences(), None
        for key, values in held.activations.items():
            self._fold_held(*key, values)
        for layer, call in held.calls.items():
            if call.lengths[0] == call.lengths[1] == held.key_counts[layer]:
                self._fold_whole_call(call, layer)
        for layer, crossing in held.crossings.items():
            self._fold_crossing(crossing, layer)
        self._fold_mixer_states(held)

    def _fold_mixer_states(self, held: CachedPass) -> None:
        for layer, (layout, increment) in held.mixer_states.items():
            suite = self.suites_at(MIXER_STATE)["state"]
            self._sites.merge((MIXER_STATE, layer, "state"), suite, layout, increment)

    def _documents_alone(self, documents: Documents, ids: torch.Tensor) -> _Part:
        documents_of_ids = documents.on(ids.device)
        rows = documents_of_ids.rows(ids)
        strata = self._strata(rows, documents_of_ids.valid)
        return _Part(documents, strata, torch.where(documents_of_ids.valid, rows, -1))

    def stop(self, raised: bool) -> None:
        """A pass that raised is forgotten whole: half of its sites would bias the averages."""
        if self._fused is not None:
            self._fused.forget() if raised else self._fused.finish()
        if raised:
            if self._cached_pass is not None:
                self._sequences.passes.remove(self._cached_pass)
            if self.snapshots is not None and self.forward_passes == 0:
                self.snapshots.clear()
        else:
            self.forward_passes += 1
            for path, runs in self._pass.runs.items() if self._pass is not None else ():
                self.block_runs[path] = max(runs, self.block_runs.get(path, 0))
        self._sites.end(forget=raised)
        self._pass, self._values = None, {}
        self._before_stream, self._tokens, self._masks = [], None, Masks()
        self._cached_pass = None
        if self._sequences.size > HELD_BYTES:
            self.finish()

    def forget_unfinished(self) -> None:
        """Forget a pass that Ctrl-C cut short, of which no hook tells."""
        if self._pass is not None:
            self.stop(True)

    def _parts_on(self, device: torch.device) -> list[_Part]:
        return _parts_on(self._parts, device)

    # What hooks deliver

    def on_activation(self, tap: Tap, layer: int, value: torch.Tensor) -> None:
        """Fold one tapped tensor."""
        if self._tokens is None:
            # A copy, since the model may go on to write to it.
            self._before_stream.append((tap, layer, value.clone()))
            return
        batch, tokens = self._tokens
        shape, rows = tuple(value.shape), batch_first(tap, value, batch, tokens)
        if rows is None:
            self.skipped[tap.site] = (
                f"its tensor {shape} does not hold one vector a token ({batch} × {tokens})"
            )
            return
        value = rows
        if tap.heads:
            tensor = heads_first(tap, value, batch, tokens)
            if tap.site == "value":
                self._values[layer] = tensor
            if self.includes(tap.site):
                self._fold_heads(tap.site, layer, tensor)
        elif tap.site == ROUTER:
            self._on_router(layer, tap.scores, value.reshape(batch, tokens, -1))
        elif self.includes(tap.site):
            value = value.reshape(batch, tokens, -1)
            if self._cached_pass is not None:
                self._hold((tap.site, layer, "activation"), value)
                return
            for part in self._parts_on(value.device):
                self._fold(tap.site, layer, "activation", part.rows(value), part.strata)

    def on_attention(self, call: AttentionCall, layer: int | None) -> None:
        """Fold one self-attention call: its heads' tensors and the statistics of its probabilities.

        A layer that calls attention several times (DiffLlama) counts once, by its first call.
        """
        if layer is None or layer in self._layers_called or self._tokens is None:
            return
        if not self._measures_calls or (self._cached_pass is None and call.lengths[1] > call.lengths[0]):
            return
        self._layers_called.add(layer)
        shape = (call.tensor.shape[0], call.tensor.shape[2])
        if shape != self._tokens:
            self.skipped[ATTENTION] = (
                f"its queries are of {shape[0]} sequences of {shape[1]}, the stream's tokens of "
                f"{self._tokens[0]} of {self._tokens[1]} (attention within windows of an image, perhaps)"
            )
            return
        if self._cached_pass is not None:
            if call.value is None and call.logits is not None:
                call = replace(call, value=self._values.pop(layer, None))
            self._cached_pass.keep_call(layer, call)
            if call.key is not None:
                self._sequences.last_keys[layer] = call.key
            self._spill()
            return
        with unobserved(call.tensor.device, traced=self.compiled):
            self._fold_whole_call(call, layer)

    def on_cross_attention(self, call: AttentionCall, layer: int) -> None:
        """Fold one call of attention to another sequence, a layer's first in a pass."""
        if layer in self._layers_crossed or self._tokens is None or self._pass is None:
            return
        if not self._measures_calls or not any(map(self.includes, (CROSS_ATTENTION, *CROSS_HEAD_SITES))):
            return
        self._layers_crossed.add(layer)
        shape = (call.tensor.shape[0], call.tensor.shape[2])
        parts = self._parts_on(call.tensor.device)
        if shape != self._tokens:
            self.skipped[CROSS_ATTENTION] = (
                f"its queries are of {shape[0]} sequences of {shape[1]}, the stream's tokens of "
                f"{self._tokens[0]} of {self._tokens[1]}"
            )
            return
        if any(part.documents is not None for part in parts):
            self.skipped[CROSS_ATTENTION] = (
                "the queries' sequences hold several documents, and which keys are whose is not known"
            )
            return
        with unobserved(call.tensor.device):
            crossing = key_tokens(self._pass, call, self.delimiter_ids, self.stratum_names)
            if self._cached_pass is not None:
                self._cached_pass.keep_crossing(layer, crossing)
                self._spill()
                return
            self._fold_crossing(crossing, layer)

    def _fold_crossing(self, crossing: Crossing, layer: int) -> None:
        """Fold the queries, keys and values of cross-attention, and what its probabilities say."""
        call = crossing.call
        strata = self._parts_on(call.tensor.device)[0].strata
        for site, tensor, own in (
            ("cross_attention_query", call.query, strata),
            ("cross_attention_key", call.key, crossing.key_strata),
            ("cross_attention_value", call.value, crossing.key_strata),
        ):
            if tensor is not None and call.logits is None and self.includes(site):
                self._fold(site, layer, "activation", tensor.transpose(1, 2).flatten(2), own, snapshot=False)
                self._fold(site, layer, "heads", tensor, own)
        suite = self.suites_at(CROSS_ATTENTION).get("attention")
        if suite is not None and self.includes(CROSS_ATTENTION):
            layout, increment = measure_cross_attention(
                suite, crossing, strata, self.vocabulary, self.stratum_names
            )
            self._sites.merge((CROSS_ATTENTION, layer, "attention"), suite, layout, increment)

    def _fold_whole_call(self, call: AttentionCall, layer: int) -> None:
        for site, tensor in (
            ("query_post_rope", call.query),
            ("key_post_rope", call.key),
            ("value", call.value),
        ):
            # Beside logits that the model made, values come from a tap, which folds them.
            if tensor is not None and call.logits is None and self.includes(site):
                self._fold_heads(site, layer, tensor)
        if call.value is None and call.logits is not None:
            call = replace(call, value=self._values.pop(layer, None))
        self._fold_call(call, layer)

    def _fold_call(self, call: AttentionCall, layer: int) -> None:
        """Fold what a call's probabilities say, of each document apart where a sequence holds several."""
        parts = self._parts_on(call.tensor.device)
        if self.snapshots is None and not self.includes(ATTENTION):
            return
        mask = self._mask_of(call)
        if not self._is_cut_as_declared(call, mask, layer):
            return
        for part in parts:
            part_call, part_mask = call, mask
            if part.documents is not None:
                part_call, part_mask = part.documents.call(call), part.documents.mask(mask)
            if self.snapshots is not None:
                self.snapshots.offer_call(layer, part_call, part_mask)
            if self.includes(ATTENTION) and part.strata.shape[-1] > 1:
                self._fold_attention(part_call, layer, part, part_mask)

    def _is_cut_as_declared(self, call: AttentionCall, mask: AttentionMask, layer: int) -> bool:
        """Whether attention keeps apart documents told by offsets; notes cuts that nothing tells of.

        Only the first call of a pass is asked about the former, of a run about the latter.
        """
        forward_pass = self._pass
        if forward_pass is None or self._tokens is None:
            return True
        if forward_pass.cut_by_attention:
            if len(self._layers_called) == 1:
                cuts = cuts_of_call(call, mask, self._valid.to(call.tensor.device))
                self._cut_apart = bool(cuts[self._starts_of_parts(cuts.device)].all())
            if not self._cut_apart:
                self.skipped[ATTENTION] = (
                    "the documents that the model was told of see one another in its attention"
                )
            return self._cut_apart
        is_open = all(part.documents is None for part in self._parts_on(call.tensor.device))
        has_mask = mask.tensor is not None or mask.function is not None or call.logits is not None
        if is_open and has_mask and self._asks_for_cuts:
            self._asks_for_cuts = False
            valid = self._valid.to(call.tensor.device) > 0
            inside = cuts_of_call(call, mask, valid) & valid & (valid.cumsum(1) > 1)
            if bool(inside.any()):
                self.notes.setdefault(
                    f"attention of layer {layer} is cut where no token sees an earlier one (documents in a "
                    "row, or chunks) and nothing that the model was called with says so: first tokens, "
                    "positions and sinks are those of whole rows"
                )
        return True

    def _starts_of_parts(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(sequence, position) where each document begins."""
        documents = [part.documents for part in self._parts_on(device) if part.documents is not None]
        return torch.cat([d.sequence for d in documents]), torch.cat([d.position[:, 0] for d in documents])

    def on_gradient(self, tap: Tap, layer: int, value: torch.Tensor) -> Callable[[torch.Tensor], None] | None:
        """What to call with the gradient of a tapped tensor; None where it is not measured."""
        if self.gradients is None or not has_gradient(tap) or not self.includes(tap.site):
            return None
        return self.gradients.receiver(tap, layer, value)

    def _fold_gradient(self, site: str, layer: int, x: torch.Tensor, strata: torch.Tensor) -> None:
        # As they are: they come one by one in the backward pass, between which nothing can be put off.
        for kind, suite in self.suites_at(site).items():
            observation = ActivationObservation(x, strata, stratum_names=self.stratum_names)
            self._sites.merge((site, layer, kind), suite, observation.layout, suite.measure(observation))

    def on_routed(self, layer: int, rows: torch.Tensor, slots: int) -> None:
        """Fold the experts' hidden activations: each token's ``slots`` rows as so many parallel sequences."""
        if self._tokens is None:
            return
        batch, tokens = self._tokens
        if rows.shape[0] != batch * tokens * slots:
            self.skipped["mlp_hidden"] = "its experts dropped or padded tokens, so rows cannot be told apart"
            return
        rows = rows.reshape(batch, tokens, slots, -1)
        if self._cached_pass is not None:
            self._hold(("mlp_hidden", layer, "routed"), rows)
            return
        self._fold_routed(layer, rows)

    def _fold_routed(self, layer: int, rows: torch.Tensor) -> None:
        """(batch, token, slot, channel): the rows of each slot are sequences of their own."""
        slots = rows.shape[2]
        for part in self._parts_on(rows.device):
            x = part.rows(rows).transpose(1, 2).flatten(0, 1)
            self._fold("mlp_hidden", layer, "activation", x, part.strata.repeat_interleave(slots, dim=1))

    def on_choice(self, layer: int, experts: torch.Tensor, peaks: torch.Tensor, count: int) -> None:
        """Fold which of ``count`` experts each token was sent to, and the largest |y| that each gave for it.

        Both are (batch · token, slot).
        """
        if self._tokens is None or experts.shape[0] != self._tokens[0] * self._tokens[1]:
            return
        for kind, values in by_expert(experts, peaks, count).items():
            self._on_router(layer, kind, values.reshape(*self._tokens, count))

    def _on_router(self, layer: int, kind: str, values: torch.Tensor) -> None:
        if kind == "choice":
            if layer in self._layers_chosen:
                return
            self._layers_chosen.add(layer)
        if self._cached_pass is not None:
            self._hold((ROUTER, layer, kind), values)
            return
        self._fold_router(layer, kind, values)

    def _fold_router(self, layer: int, kind: str, values: torch.Tensor) -> None:
        """(batch, token, expert) of one kind: logits, probabilities, choice or peaks."""
        suite = self.suites_at(ROUTER).get("routing")
        if suite is None:
            return
        for part in self._parts_on(values.device):
            measured = measure_routing(suite, kind, part.rows(values), part.strata, self.stratum_names)
            self._sites.merge((ROUTER, layer, "routing"), suite, *measured)

    def on_weight(self, tap: Tap, layer: int, module: nn.Module, hidden: torch.Tensor) -> None:
        """Measure a projection's weights, once a step: they are the same in all its forward passes."""
        key = (tap.site, layer, tap.side)
        if key in self._sites:
            return
        suite = self.suites_at(tap.site)[tap.side]
        experts = self.expert_projections.get(layer) if tap.site == DOWN_WEIGHT else None
        if tap.site == GATE_WEIGHT:
            measured = measure_gate(suite, (module, tap.fused), self.up_projections[layer], hidden)
        elif experts is None:
            measured = measure_weight(suite, module, hidden, tap.fused)
        else:
            measured = measure_expert_weights(suite, experts, hidden.shape[-1])
        if isinstance(measured, str):
            self.skipped[tap.site] = measured
            return
        self._sites.merge(key, suite, *measured)

    def on_product(self, tap: Tap, layer: int, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Fold what a projection was given and what it gave."""
        if self._tokens is None:
            return
        batch, tokens = self._tokens
        rows = [batch_first(tap, value, batch, tokens) for value in (inputs, outputs)]
        suite = self.suites_at(tap.site)["product"]
        key = (tap.site, layer, "product")
        if "weight" in self.suites_at(tap.site) and (tap.site, layer, "weight") not in self._sites:
            return  # The matrix cannot be read, which ``skipped`` says.
        if any(row is None for row in rows):
            return
        whole = [row.reshape(batch, tokens, -1) for row in rows if row is not None]
        for part in self._parts_on(inputs.device):
            observation = ProductObservation(part.rows(whole[0]), part.rows(whole[1]), part.strata[0])
            increment = suite.measure(observation)
            if not self._measures_calls or self._cached_pass is not None:
                # Of a part of a sequence: which of all its tokens is the largest is not known.
                names = ("product_peak.same_token", "product_peak.sequences")
                increment |= {n: torch.zeros_like(increment[n]) for n in names if n in increment}
            self._sites.merge(key, suite, observation.layout, increment)

    def on_state(self, tap: Tap, layer: int, state: torch.Tensor | str) -> None:
        """Fold the state that a recurrent mixer has after a pass, of sequences without padding.

        Of sequences that are made token by token it is the state after their last pass.
        """
        suite = self.suites_at(MIXER_STATE).get("state")
        if suite is None or self._tokens is None:
            return
        reason = state if isinstance(state, str) else self._why_no_state(tap, state)
        if reason or isinstance(state, str):
            self.skipped[MIXER_STATE] = reason
            return
        held = self._cached_pass
        present = self._valid > 0 if held is None else self._sequences.whole("present")
        observation = StateObservation(state, present.all(1).to(state.device))
        increment = suite.measure(observation)
        if held is not None:
            held.mixer_states[layer] = observation.layout, increment
            return
        self._sites.merge((MIXER_STATE, layer, "state"), suite, observation.layout, increment)

    def _why_no_state(self, tap: Tap, state: torch.Tensor) -> str:
        """Why a tensor is not the state after the last token of each sequence; empty where it is."""
        batch, _ = self._tokens or (0, 0)
        if tuple(state.shape) != (batch, *tap.state_shape):
            expected = ", ".join(map(str, tap.state_shape))
            return f"its state is {tuple(state.shape)}, not ({batch} sequences, {expected})"
        if not self._measures_calls:
            return "passes went on with a cache whose beginning was not measured"
        if any(part.documents is not None for part in self._parts_on(state.device)):
            return "rows hold several documents, and a state runs through all of a row"
        return ""

    # Folding

    def _fold_heads(self, site: str, layer: int, tensor: torch.Tensor) -> None:
        if (tensor.shape[0], tensor.shape[2]) != self._tokens:
            self.skipped[site] = (
                f"its tensor {tuple(tensor.shape)} is not (batch, head, token, width) for these tokens"
            )
            return
        if self._cached_pass is not None:
            self._hold((site, layer, "heads"), tensor.transpose(1, 2))
            return
        for part in self._parts_on(tensor.device):
            x = part.rows(tensor.transpose(1, 2))
            self._fold(site, layer, "activation", x.flatten(2), part.strata, snapshot=False)
            self._fold(site, layer, "heads", x.transpose(1, 2), part.strata)

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
        # The kernels know three strata beside ``all``.
        is_of_text = self.token_kinds is None
        if kind == "activation" and self._compiles and x.device.type == "cuda" and is_of_text:
            increment = self._fused_folding().fold(key, suite, x, strata)
        else:
            increment = self._measure_function(site, kind, x)(x, strata)
        if increment:
            self._sites.merge(key, suite, _layout(kind, x, self.stratum_names), increment)

    def _measure_function(self, site: str, kind: str, x: torch.Tensor) -> Callable[..., State]:
        """The function (x, strata) → increments of a site, compiled once for all sites that are alike."""
        suite, names = self.suites_at(site)[kind], self.stratum_names

        def measure(x: torch.Tensor, strata: torch.Tensor) -> State:
            if kind == "heads":
                return suite.measure(HeadsObservation(x, strata, stratum_names=names))
            return suite.measure(ActivationObservation(x, strata, stratum_names=names))

        if not self._compiles:
            return measure
        name = (suite.measurements, kind, names, x.shape, x.stride(), x.dtype, x.device)
        return compile_once(name, measure)

    def _mask_of(self, call: AttentionCall) -> AttentionMask:
        return self._masks.of(call, self._valid.to(call.tensor.device))

    def _fold_attention(self, call: AttentionCall, layer: int, part: _Part, mask: AttentionMask) -> None:
        suite = self.suites_at(ATTENTION).get("attention")
        if suite is None:
            return
        ids = None if self.vocabulary is None else TokenIds(part.ids, self.vocabulary)
        layout, increment = measure_attention(
            suite,
            call,
            part.strata,
            stratum_names=self.stratum_names,
            mask=mask,
            compiled=self._compiles,
            token_ids=ids,
            output_weight=self._output_weight(suite, call, layer),
        )
        self._sites.merge((ATTENTION, layer, "attention"), suite, layout, increment)

    def _output_weight(self, suite: Suite, call: AttentionCall, layer: int) -> torch.Tensor | None:
        """W_O by head where a measurement reads it; of a weight that cannot be read a note says why."""
        if call.value is None or not any(m.reads_output_weight for m in suite.measurements):
            return None
        heads, width = call.tensor.shape[1], call.value.shape[-1]
        module = self.output_projections.get(layer)
        weight: torch.Tensor | str = "no output projection reads the heads' outputs"
        if module is not None:
            weight = output_projection(module, heads, width)
        if isinstance(weight, str):
            self.notes.setdefault(f"values after the output projection are not measured: {weight}")
            return None
        return weight

    @property
    def _compiles(self) -> bool:
        """Whether statistics are compiled: not of shapes that are others in every pass."""
        return (
            self.compiled
            and not self._is_put_together
            and all(part.documents is None for part in next(iter(self._parts.values())))
        )

    def _fused_folding(self) -> FusedFolding:
        if self._fused is None:
            # Triton comes with torch's CUDA builds alone.
            from osp_diag.capture.fused import FusedFolding

            self._fused = FusedFolding(self._sites.merge_stack)
        return self._fused


def _parts_on(parts: dict[torch.device, list[_Part]], device: torch.device) -> list[_Part]:
    """The parts of a pass on a device, copied there at its first use."""
    if device not in parts:
        parts[device] = [part.on(device) for part in next(iter(parts.values()))]
    return parts[device]


def _shape_of_stream(forward_pass: ForwardPass, tokens_first: bool) -> tuple[int, int]:
    """(sequences, tokens of each): a stream of rows is one sequence, unless the ids say otherwise."""
    stream = forward_pass.stream
    assert stream is not None, "asked when it has entered"
    shape = tuple(stream.shape)
    if stream.ndim == 2:
        for arguments in reversed(forward_pass.levels):
            ids = arguments.get(f"{forward_pass.prefix}input_ids", arguments.get("input_ids"))
            if isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() == shape[0]:
                return ids.shape[0], ids.shape[1]
        return 1, shape[0]
    if stream.ndim == 4:
        return shape[0], shape[1] * shape[2]
    return (shape[1], shape[0]) if tokens_first else (shape[0], shape[1])


def _layout(kind: str, x: torch.Tensor, strata: tuple[str, ...]) -> Layout:
    if kind == "heads":
        _, heads, tokens, width = x.shape
        return Layout(channels=heads * width, heads=heads, head_channels=width, tokens=tokens, strata=strata)
    return Layout(channels=x.shape[-1], tokens=x.shape[1], strata=strata)
